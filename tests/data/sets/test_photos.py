"""Triplets of photographs: each kind has the answer that it says, and depends on seed and index alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim.data import Preprocess
from lipsim.data.distortions import DISTORTIONS, distort
from lipsim.data.sets.image_store import ImageStore, load_image_store
from lipsim.data.sets.photos import KINDS, POOL, PhotoTriplets
from lipsim.datamodules.base import as_fetched

ALL = {"semantic": 2.0, "distortion": 1.0, "teacher": 1.0}


@pytest.fixture
def store(photos: Path) -> ImageStore:
    return load_image_store(photos / "train", Preprocess(16))


@pytest.fixture
def embeddings() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(12, 5), dim=1)


def test_batches_do_not_change_a_triplet(store: ImageStore, embeddings: Tensor) -> None:
    triplets = PhotoTriplets(store, 60, kinds=ALL, embeddings=embeddings, seed=3)
    whole = triplets.__getitems__(list(range(60)))
    assert whole.index.tolist() == list(range(60)) and whole.reference.shape == (60, 3, 16, 16)
    longer = PhotoTriplets(store, 10**9, kinds=ALL, embeddings=embeddings, seed=3)  # costs no more
    loader = DataLoader(triplets, 7, shuffle=True, collate_fn=as_fetched)
    for batch in (triplets[41], longer.__getitems__([5, 59, 0]), *loader):
        for part in ("reference", "left", "right", "right_vote"):
            assert torch.equal(getattr(batch, part), getattr(whole, part)[batch.index])
    other = PhotoTriplets(store, 60, kinds=ALL, embeddings=embeddings, seed=4)
    assert other.manifest() != triplets.manifest() and len(set(triplets.manifest())) > 55
    assert len(longer) == 10**9 and longer.__getitems__([10**9 - 1]).index.item() == 10**9 - 1
    with pytest.raises(IndexError):
        triplets[60]


def test_shares_sides_and_groups(store: ImageStore, embeddings: Tensor) -> None:
    triplets = PhotoTriplets(store, 4000, kinds=ALL, embeddings=embeddings)
    recipes = triplets.recipes(torch.arange(4000))
    for number, (kind, share) in enumerate(zip(KINDS, (0.5, 0.25, 0.25), strict=True)):
        mask = triplets.groups[kind]
        assert torch.equal(mask, recipes.kind == number)
        assert float(mask.float().mean()) == pytest.approx(share, abs=0.03)  # four standard deviations
        assert float(recipes.right_vote[mask].mean()) == pytest.approx(0.5, abs=0.07)
    families = torch.stack([triplets.groups[name] for name in DISTORTIONS]).sum(0)
    assert torch.equal(families.bool(), triplets.groups["distortion"]) and int(families.max()) == 1
    alone = triplets.only("semantic", 50)
    assert alone.kinds == {"semantic": 1.0} and len(alone) == 50 and alone.groups == {}


def test_semantic_triplets_are_of_two_classes(store: ImageStore) -> None:
    triplets = PhotoTriplets(store, 500, kinds={"semantic": 1})
    recipes = triplets.recipes(torch.arange(500))
    labels = store.classes()[recipes.ids]
    near = torch.where(recipes.right_vote.bool(), 2, 1)
    assert set(recipes.right_vote.tolist()) == {0.0, 1.0}
    for row, side in enumerate(near.tolist()):
        reference, same, other = recipes.ids[row, 0], recipes.ids[row, side], recipes.ids[row, 3 - side]
        assert (
            labels[row, 0] == labels[row, side] != labels[row, 3 - side]
            and len({*map(int, (reference, same, other))}) == 3
        )
    assert len(set(recipes.ids.flatten().tolist())) == 12  # every picture, in every place
    assert all(len(set(column.tolist())) == 12 for column in recipes.ids.unbind(1))
    batch = triplets.__getitems__([11, 4])
    for part, column in (("reference", 0), ("left", 1), ("right", 2)):
        assert torch.equal(getattr(batch, part), store.floats(recipes.ids[[11, 4], column]))


def test_classes_of_one_image_are_never_the_reference(store: ImageStore) -> None:
    names = np.array([b"a/0", b"b/1", b"b/2", b"c/3", b"d/4"])
    few = ImageStore(store.folder, names, store.images[:5], store.sha256[:5], store.preprocess)
    ids = PhotoTriplets(few, 100, kinds={"semantic": 1}).recipes(torch.arange(100)).ids
    assert set(ids[:, 0].tolist()) == {1, 2} and set(ids.flatten().tolist()) == {0, 1, 2, 3, 4}


def test_the_weaker_distortion_has_the_vote(store: ImageStore) -> None:
    triplets = PhotoTriplets(store, 300, kinds={"distortion": 1}, seed=2)
    recipes = triplets.recipes(torch.arange(300))
    left, right = recipes.strength.unbind(1)
    assert bool((recipes.right_vote == (right < left).float()).all())
    assert float((left - right).abs().min()) >= 0.2 - 1e-6
    assert float(recipes.strength.min()) >= 0.05 and float(recipes.strength.max()) <= 1
    assert set(recipes.family.tolist()) == set(range(len(DISTORTIONS)))
    batch = triplets.__getitems__(list(range(300)))
    distances = [(part - batch.reference).flatten(1).norm(dim=1) for part in (batch.left, batch.right)]
    agrees = (distances[1] < distances[0]).float() == batch.right_vote
    warped = torch.stack([triplets.groups[name] for name in ("shift", "rotation", "zoom")]).any(0)
    assert bool(agrees[~warped].all())  # of these tiles, which are noise, a turn by 30° is no further than one by 20°
    row = int((recipes.family == list(DISTORTIONS).index("noise")).nonzero()[0])
    expected = distort(
        batch.reference[[row]], recipes.family[[row]], left[[row]], seed=2 * 3 + 2, index=torch.tensor([row])
    )
    assert torch.equal(batch.left[row], expected[0])


def test_equal_candidates_have_a_tied_vote(store: ImageStore) -> None:
    black = ImageStore(store.folder, store.names, torch.zeros_like(store.images), store.sha256, store.preprocess)
    triplets = PhotoTriplets(black, 200, kinds={"distortion": 1})
    votes = triplets.__getitems__(list(range(200))).right_vote
    for name in DISTORTIONS:
        if name != "jpeg":  # at some qualities it makes black a dark grey
            assert bool(((votes == 0.5) == (name not in ("noise", "occlusion")))[triplets.groups[name]].all()), name


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_the_teacher_votes_by_its_distances(store: ImageStore, embeddings: Tensor, temperature: float) -> None:
    kinds = {"teacher": 1}
    triplets = PhotoTriplets(store, 200, kinds=kinds, embeddings=embeddings, temperature=temperature)
    recipes = triplets.recipes(torch.arange(200))
    z, z0, z1 = (embeddings.double()[column] for column in recipes.ids.unbind(1))
    gap = (1 - (z * z1).sum(1)) - (1 - (z * z0).sum(1))  # right is further by so much
    expected = (gap < 0).double() if not temperature else 1 / (1 + torch.exp(gap / temperature))
    assert torch.allclose(recipes.right_vote.double(), expected, atol=1e-5)
    assert all(len(set(row)) == 3 for row in recipes.ids.tolist())
    assert all(len(set(column.tolist())) == 12 for column in recipes.ids.unbind(1))


def test_near_candidates_are_the_nearest_of_a_pool(store: ImageStore, embeddings: Tensor) -> None:
    """Of 64 pictures out of 11 the nearest of all is among them but once in 450 times; of one it is any."""
    ranks = (embeddings @ embeddings.T).argsort(1, descending=True).argsort(1)
    for near_share, expected in ((1.0, 1.0), (0.0, 2 / 11), (0.5, 0.5 + 1 / 11)):
        triplets = PhotoTriplets(store, 600, kinds={"teacher": 1}, embeddings=embeddings, near_share=near_share)
        ids = triplets.recipes(torch.arange(600)).ids
        nearest = ranks[ids[:, :1], ids[:, 1:]].amin(1) == 1
        assert POOL == 64 and float(nearest.float().mean()) == pytest.approx(expected, abs=0.08)


def test_what_cannot_be_is_refused(store: ImageStore, embeddings: Tensor) -> None:
    flat = ImageStore(
        store.folder, np.array([b"0.png", b"1.png"]), store.images[:2], store.sha256[:2], store.preprocess
    )
    assert PhotoTriplets(store).kinds == {"semantic": 0.5, "distortion": 0.5}
    assert PhotoTriplets(flat).kinds == {"distortion": 1.0}
    assert set(PhotoTriplets(store, embeddings=embeddings).kinds) == set(KINDS)
    for images, options, message in (
        (flat, {"kinds": {"semantic": 1}}, "semantic triplets need a class of two images and another class"),
        (store, {"kinds": {"teacher": 1}}, "give the cache that lipsim cache-teacher writes"),
        (store, {"kinds": {"human": 1}}, "among semantic, distortion, teacher, got human"),
        (store, {"kinds": {"semantic": 0}}, "a positive share of one of"),
        (store, {"kinds": {"semantic": -1}}, "share of semantic ≥ 0"),
        (store, {"near_share": 2}, "near_share"),
        (store, {"temperature": -1}, "temperature"),
        (store, {"num_triplets": 0}, "num_triplets"),
        (store, {"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            PhotoTriplets(images, **options)  # type: ignore[arg-type]
