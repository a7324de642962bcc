"""Batches of photographs that share their images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lipsim.data import MaterialTriplets, PhotoTriplets, Preprocess, SharedTriplet
from lipsim.data.registry import open_sets
from lipsim.data.sets.image_store import load_image_store
from lipsim.data.sets.photo_batches import HumanVotes, PhotoBatches, SharedImages

SIZES = SharedImages(num_batches=3, num_images=9, per_class=3, num_triplets=90, num_distorted=4)


@pytest.fixture
def triplets(photos: Path) -> PhotoTriplets:
    store = load_image_store(photos / "train", Preprocess(16, "float"))
    embeddings = F.normalize(torch.randn(len(store), 5), dim=1)
    kinds = {"semantic": 0.5, "teacher": 0.3, "distortion": 0.2}
    return PhotoTriplets(store, kinds=kinds, embeddings=embeddings, seed=3)


def _nearer(batch: SharedTriplet) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the preferred and of the other candidate."""
    right = batch.right_vote > 0.5
    left_ids, right_ids = batch.ids[:, 1], batch.ids[:, 2]
    return torch.where(right, right_ids, left_ids), torch.where(right, left_ids, right_ids)


def test_semantic_triplets_prefer_the_class_and_never_the_image_itself(triplets: PhotoTriplets) -> None:
    batches = PhotoBatches(triplets.only("semantic", 1), SIZES)
    batch = batches[1]
    near, far = _nearer(batch)
    label = torch.arange(9) // 3  # classes lie side by side
    reference = batch.ids[:, 0]
    assert len(batch) == 90 and batch.distinct.shape == (9, 3, 16, 16)
    assert (label[near] == label[reference]).all() and (near != reference).all()
    assert (label[far] != label[reference]).all()
    assert 0 < batch.right_vote.mean() < 1 and 0 <= batch.distinct.min() and batch.distinct.max() <= 1
    # Of each class the pictures are of one colour: the views are of what the labels say.
    colour = batch.distinct.mean((2, 3)).argmax(1)
    assert all(len(set(colour[label == number].tolist())) == 1 for number in range(3))


def test_a_batch_depends_on_seed_and_index_alone(triplets: PhotoTriplets) -> None:
    batches, longer = (
        PhotoBatches(triplets, SIZES),
        PhotoBatches(triplets, SharedImages(**{**vars(SIZES), "num_batches": 9})),
    )
    first, again, other = batches[2], longer[2], batches[1]
    assert torch.equal(first.distinct, again.distinct) and torch.equal(first.ids, again.ids)
    assert torch.equal(first.right_vote, again.right_vote) and not torch.equal(first.distinct, other.distinct)
    with pytest.raises(IndexError):
        batches[3]


def test_the_teacher_votes_by_its_embeddings(triplets: PhotoTriplets, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    draw = PhotoBatches._pictures

    def spy(self: PhotoBatches, generator: torch.Generator) -> torch.Tensor:
        chosen.append(draw(self, generator))
        return chosen[-1]

    monkeypatch.setattr(PhotoBatches, "_pictures", spy)
    batch = PhotoBatches(triplets.only("teacher", 1), SIZES)[0]
    assert triplets.embeddings is not None
    z = triplets.embeddings[chosen[0]].double()
    near, far = _nearer(batch)
    reference = batch.ids[:, 0]
    assert ((z[reference] * (z[near] - z[far])).sum(1) > 0).all()
    assert all(len(set(row)) == 3 for row in batch.ids.tolist())


def test_distorted_images_are_embedded_once_and_the_weaker_one_is_nearer(triplets: PhotoTriplets) -> None:
    batch = PhotoBatches(triplets.only("distortion", 1), SIZES)[0]
    near, far = _nearer(batch)
    assert len(batch.distinct) == 9 + 2 * 4 and len(batch) == 90
    assert ((near >= 9) & (near < 13)).all() and torch.equal(far, near + 4) and (batch.ids[:, 0] < 9).all()
    distance = (batch.distinct[batch.ids[:, 0]] - batch.distinct[near]).flatten(1).norm(dim=1)
    farther = (batch.distinct[batch.ids[:, 0]] - batch.distinct[far]).flatten(1).norm(dim=1)
    assert (distance < farther).float().mean() > 0.7  # not every distortion moves pixels in the order of its strength


def test_candidates_that_are_equal_have_no_answer(triplets: PhotoTriplets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distortions of a black picture, whose contrast is nothing, are the same."""

    def darken(images: torch.Tensor, family: torch.Tensor, strength: torch.Tensor, **_: object) -> torch.Tensor:
        return images * (1 - strength).view(-1, 1, 1, 1) * (torch.arange(len(images)) % 4 != 2).view(-1, 1, 1, 1)

    monkeypatch.setattr("lipsim.data.sets.photo_batches.distort", darken)
    batch = PhotoBatches(triplets.only("distortion", 1), SIZES)[0]
    equal = (batch.ids[:, 1:] - 9) % 4 == 2
    assert equal[:, 0].equal(equal[:, 1]) and 0 < int(equal[:, 0].sum()) < len(batch)
    assert (batch.right_vote == 0.5).equal(equal[:, 0])


def test_shares_are_of_the_triplets_and_human_votes_take_theirs(triplets: PhotoTriplets, material: Path) -> None:
    human = open_sets("material", ["train"], image_size=16, resize="float", root=material, num_triplets=50)["train"]
    assert isinstance(human, MaterialTriplets)
    batches = PhotoBatches(triplets, SIZES, HumanVotes(human, 1 / 3, lambda batch: batch))
    batch = batches[0]
    assert (batches.num_human, batches.counts) == (30, {"semantic": 30, "teacher": 18, "distortion": 12})
    assert len(batch) == 90 and batch.ids.max() == len(batch.distinct) - 1
    judged = batch.ids[-30:]
    assert (judged >= 9 + 8).all()
    everything = human.images  # all images of the study
    found = batch.distinct[judged].flatten(0, 1)
    known = everything.float() / 255 if everything.dtype == torch.uint8 else everything
    assert all((known - image).flatten(1).abs().amax(1).min() < 1e-6 for image in found[:6])


def test_human_votes_of_nobody_are_refused(triplets: PhotoTriplets) -> None:
    nobody = MaterialTriplets.__new__(MaterialTriplets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaterialTriplets, "__len__", lambda self: 0)
        with pytest.raises(ValueError, match="number of human votes ≥ 1, got 0"):
            PhotoBatches(triplets, SIZES, HumanVotes(nobody, 0.5, lambda batch: batch))


@pytest.mark.parametrize(
    "change", [{"num_images": 8}, {"num_images": 12}, {"num_images": 3}, {"per_class": 1}, {"num_distorted": 10}]
)
def test_sizes_that_cannot_be_are_refused(triplets: PhotoTriplets, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_images|per_class"):
        PhotoBatches(triplets, replace(SIZES, **change))
