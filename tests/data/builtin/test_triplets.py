"""The built-in triplets: reproducible, disjoint, in range, and judged by the size of the moves."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from lipsim.data import BuiltinTriplets, collate_triplets
from lipsim.data.builtin.photographs import PHOTOGRAPHS, PhotographParameters
from lipsim.data.builtin.scenes import SceneParameters
from lipsim.data.builtin.triplets import NUM_JUDGES, TripletRecipe, _cached, render_recipe, sample_recipe


def recipes(split: str = "train", num: int = 400, **kwargs: float) -> list[TripletRecipe]:
    return [sample_recipe(split, index, **kwargs) for index in range(num)]


def test_same_arguments_same_triplets() -> None:
    first = BuiltinTriplets("train", 3, image_size=24)
    _cached.cache_clear()
    second = BuiltinTriplets("train", 3, image_size=24)
    assert first.images is not second.images
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.right_vote, second.right_vote)


def test_a_shorter_set_begins_a_longer_one_whatever_the_workers() -> None:
    shorter = BuiltinTriplets("val", 5, image_size=16)
    longer = BuiltinTriplets("val", 70, image_size=16, num_workers=2)  # 70: more than two chunks
    assert torch.equal(longer.images[:5], shorter.images)
    assert torch.equal(longer.moves[:5], shorter.moves)
    assert torch.equal(longer.images[69], torch.from_numpy(render_recipe(sample_recipe("val", 69), 16)))


def test_renders_once_and_reports_progress() -> None:
    _cached.cache_clear()
    done: list[int] = []
    state = torch.get_rng_state()
    first = BuiltinTriplets("test", 40, image_size=16, progress=done.append)
    assert torch.equal(torch.get_rng_state(), state)  # else a training would depend on what was rendered before
    assert sum(done) == 40
    second = BuiltinTriplets("test", 40, image_size=16, progress=done.append)
    assert sum(done) == 40
    assert second.images is first.images


@pytest.mark.parametrize("image_size", [16, 48, 65])
def test_triplets_are_images_in_range(image_size: int) -> None:
    data = BuiltinTriplets("train", 4, image_size=image_size)
    batch = collate_triplets([data[i] for i in range(4)])
    for images in batch.images():
        assert images.shape == (4, 3, image_size, image_size)
        assert images.dtype == torch.float32
        assert 0 <= images.min() and images.max() <= 1
        assert (images.flatten(1).std(dim=1) > 0.01).all()
    assert batch.right_vote.shape == (4,)
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.reference[2], data.images[2, 0] / 255)


def test_past_the_end() -> None:
    data = BuiltinTriplets("train", 4, image_size=16)
    assert data[-1].index == 3
    with pytest.raises(IndexError):
        data[4]


def test_other_seed_other_triplets() -> None:
    first, second = (BuiltinTriplets("train", 4, image_size=16, seed=seed) for seed in (0, 1))
    assert all(not torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_scenes_of_splits_are_disjoint() -> None:
    seeds = [
        {r.reference.layout_seed for r in recipes(split, photograph_share=0.0)} for split in ("train", "val", "test")
    ]
    assert all(len(s) == 400 for s in seeds)
    assert len(set.union(*seeds)) == 1200


def test_photographs_of_splits_are_disjoint_and_all_used() -> None:
    used = {
        split: {r.reference.photograph for r in recipes(split, 60, photograph_share=1.0)}
        for split in ("train", "val", "test")
    }
    assert used == {split: set(names) for split, names in PHOTOGRAPHS.items()}
    assert len(set.union(*used.values())) == sum(map(len, used.values()))


def test_photograph_share() -> None:
    assert all(isinstance(r.reference, SceneParameters) for r in recipes(photograph_share=0.0))
    assert all(isinstance(r.reference, PhotographParameters) for r in recipes(photograph_share=1.0))
    share = np.mean([isinstance(r.reference, PhotographParameters) for r in recipes()])
    assert 0.25 == pytest.approx(share, abs=0.09)  # 4 standard deviations


def test_votes_follow_the_smaller_move() -> None:
    table = np.array([(r.left_move - r.right_move, r.right_vote) for r in recipes(num=2000)])
    difference, vote = table.T
    agrees = (difference > 0) == (vote > 0.5)
    assert 0.88 <= agrees.mean() <= 0.96  # an oracle is good, and voters are not perfect
    assert (difference > 0).mean() == pytest.approx(0.5, abs=0.05)  # no side is favoured
    close = np.abs(difference) < np.median(np.abs(difference))
    assert agrees[close].mean() < agrees[~close].mean()
    assert set(np.rint(vote * NUM_JUDGES)) == set(range(NUM_JUDGES + 1))
    assert not (vote == 0.5).any()


def test_references_are_not_disturbed_and_candidates_are() -> None:
    for recipe in recipes(num=50):
        assert recipe.reference.shift_x == recipe.reference.shift_y == 0
        assert recipe.left.shift_x != recipe.right.shift_x != 0
        assert asdict(recipe.left) != asdict(recipe.reference)


def test_pixels_say_little() -> None:
    """What shifts and rearranged layouts are for: the nearer image in l2 is often the one that was moved more."""
    data = BuiltinTriplets("test", 300, image_size=32, photograph_share=0.0)
    x = data.images.float()
    left, right = ((x[:, 0] - x[:, k]).flatten(1).norm(dim=1) for k in (1, 2))
    agrees = ((right < left) == (data.right_vote > 0.5)).float().mean()
    assert 0.5 < agrees < 0.72


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "train, val, test"),
        ({"num_triplets": 0}, "num_triplets"),
        ({"image_size": 15}, "at least 16"),
        ({"photograph_share": 1.5}, r"\[0, 1\]"),
        ({"photograph_share": float("nan")}, r"\[0, 1\]"),
        ({"seed": -1}, "seed"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuiltinTriplets(**({"split": "train", "num_triplets": 2} | arguments))  # type: ignore[arg-type]
