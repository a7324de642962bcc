"""Human votes strewn among the triplets of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lipsim.data import BuiltinTriplets, Triplet, TripletSet, collate_triplets, open_sets
from lipsim.data.sets.mixed import MixedTriplets
from lipsim.datamodules.base import as_fetched


def _photos(photos: Path, num_triplets: int = 200) -> TripletSet:
    return open_sets("photos", ["train"], image_size=16, resize="float", root=photos, num_triplets=num_triplets)[
        "train"
    ]


@pytest.mark.parametrize("human", ["builtin", "material"])
def test_places_are_taken_by_their_share(human: str, photos: Path, request: pytest.FixtureRequest) -> None:
    triplets, collate = _photos(photos), as_fetched
    if human == "builtin":  # single triplets
        other: TripletSet = BuiltinTriplets("train", 30, image_size=16)
        collate = collate_triplets
    else:  # whole batches that share their images
        root = request.getfixturevalue("material")
        other = open_sets("material", ["train"], image_size=16, resize="float", root=root, num_triplets=200)["train"]
    mixed = MixedTriplets(triplets, other, 0.3, collate, seed=1)
    whole = mixed.__getitems__(list(range(200)))
    assert isinstance(mixed, TripletSet) and isinstance(whole, Triplet) and len(whole) == len(mixed) == 200
    own = triplets.__getitems__(list(range(200)))  # type: ignore[attr-defined]
    same = (whole.reference == own.reference).flatten(1).all(1)
    assert float((~same).float().mean()) == pytest.approx(0.3, abs=0.1)
    assert torch.equal(whole.right_vote[same], own.right_vote[same]) and torch.equal(whole.left[same], own.left[same])
    everything = [other[i] for i in range(30)] if human == "builtin" else []
    for row in (~same).nonzero().flatten().tolist() if everything else []:
        assert any(torch.equal(whole.right[row], t.right) and whole.right_vote[row] == t.right_vote for t in everything)
    loader: DataLoader[Any] = DataLoader(mixed, 9, shuffle=True, collate_fn=as_fetched)
    for batch in (mixed[7], *loader):
        assert torch.equal(batch.left, whole.left[batch.index])
        assert torch.equal(batch.right_vote, whole.right_vote[batch.index])


def test_places_are_taken_from_every_kind_alike(photos: Path) -> None:
    triplets = _photos(photos, 1000)
    other = BuiltinTriplets("train", 4, image_size=16)
    mixed = MixedTriplets(triplets, other, 0.5, collate_triplets)  # of the same seed, 0
    whole, own = (data.__getitems__(list(range(1000))) for data in (mixed, triplets))  # type: ignore[attr-defined]
    taken = (whole.reference != own.reference).flatten(1).any(1)
    for kind in ("semantic", "distortion"):
        assert float(taken[triplets.groups[kind]].float().mean()) == pytest.approx(0.5, abs=0.1)


def test_all_or_nothing_and_what_cannot_be(photos: Path) -> None:
    triplets, other = _photos(photos, 20), BuiltinTriplets("train", 5, image_size=16)
    rows = list(range(20))
    nothing = MixedTriplets(triplets, other, 0, collate_triplets).__getitems__(rows)
    assert torch.equal(nothing.right, triplets.__getitems__(rows).right)  # type: ignore[attr-defined]
    everything = MixedTriplets(triplets, other, 1, collate_triplets).__getitems__(rows)
    assert {float(vote) for vote in everything.right_vote} <= {float(vote) for vote in other.right_vote}
    with pytest.raises(ValueError, match="share of the other set"):
        MixedTriplets(triplets, other, 1.5, collate_triplets)
    empty: Dataset[Any] = torch.utils.data.Subset(other, [])
    with pytest.raises(ValueError, match="size of the other set"):
        MixedTriplets(triplets, empty, 0.5, collate_triplets)  # type: ignore[arg-type]
