"""The data module of photographs: what it trains on and what it scores apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipsim.data import Preprocess, TripletDataModule
from lipsim.data.sets.image_store import load_image_store
from lipsim.data.sets.mixed import MixedTriplets
from lipsim.data.sets.photos import PhotoTriplets
from lipsim.datamodules import BuiltinData, ImageFolderData, LabelledFolderData, MaterialData, PhotoData, TableData


def _data(photos: Path, **options: object) -> PhotoData:
    return PhotoData(photos, 16, **{"batch_size": 8, "num_train": 64, "num_val": 20, "num_test": 30} | options)  # type: ignore[arg-type]


def test_every_kind_is_scored_apart_whatever_is_trained_on(photos: Path, photo_cache: Path) -> None:
    data = _data(photos, kinds={"teacher": 1.0}, cache=photo_cache)
    assert isinstance(data, TripletDataModule)
    data.setup("fit")
    data.setup("test")
    assert data.val_names == data.test_names == ["semantic", "distortion", "teacher"]
    for stage, sets, size in (("val", data.val_sets, 20), ("test", data.test_sets, 30)):
        for kind, triplets in sets.items():
            assert isinstance(triplets, PhotoTriplets) and len(triplets) == size and triplets.kinds == {kind: 1.0}
            assert triplets.store.folder == photos / "val"
        loaders = data.val_dataloader() if stage == "val" else data.test_dataloader()
        assert [sum(len(batch) for batch in loader) for loader in loaders] == [size] * 3
    assert data.val_sets["semantic"].manifest() != data.test_sets["semantic"].manifest()[:20]
    assert isinstance(data.train_set, PhotoTriplets) and data.train_set.kinds == {"teacher": 1.0}
    assert data.train_set.store.folder == photos / "train" and len(data.train_set) == 64
    other = _data(photos, kinds={"teacher": 1.0}, cache=photo_cache, seed=7)
    other.setup("fit")
    assert other.train_set is not None and other.train_set.manifest() != data.train_set.manifest()
    assert other.val_sets["teacher"].manifest() == data.val_sets["teacher"].manifest()
    batch = next(iter(data.train_dataloader()))
    assert batch.reference.shape == (8, 3, 16, 16) and set(batch.right_vote.tolist()) <= {0.0, 1.0}
    assert set(data.test_groups["distortion"]) <= set("blur noise jpeg shift rotation zoom colour occlusion".split())


def test_a_test_has_other_triplets_of_the_images_of_validation(photos: Path) -> None:
    data = _data(photos, num_images=4, seed=5, eval_seed=1)
    data.setup("fit")
    data.setup("test")
    val, test = data.val_sets["distortion"], data.test_sets["distortion"]
    assert (
        isinstance(val, PhotoTriplets) and isinstance(test, PhotoTriplets) and isinstance(data.train_set, PhotoTriplets)
    )
    drawn = [
        load_image_store(photos / part, Preprocess(16), num_images=4, seed=seed).names.tolist()
        for part, seed in (("train", 5), ("val", 1), ("val", 2))
    ]
    assert drawn[1] != drawn[2]  # the seed of the triplets of a test
    assert [data.train_set.store.names.tolist(), val.store.names.tolist()] == drawn[:2]
    assert test.store.names.tolist() == drawn[1] and val.manifest() != test.manifest()[: len(val)]


def test_human_votes_are_mixed_in_and_scored_besides(photos: Path, material: Path) -> None:
    human = MaterialData(material, 16, val_triplets=50)
    data = _data(photos, human=human, human_share=0.5)
    data.follow(Preprocess(16, "pil"))
    assert human.preprocess is not None and human.preprocess.resize == "pil"
    data.setup("fit")
    data.setup("test")
    assert data.val_names == ["semantic", "distortion", "triplets", "materials"]
    assert data.test_names == [*data.val_names, "official"]
    assert isinstance(data.train_set, MixedTriplets) and data.train_set.other is human.train_set
    votes = torch.cat([batch.right_vote for batch in data.train_dataloader()])
    assert float(((votes > 0) & (votes < 1)).float().mean()) == pytest.approx(0.5, abs=0.25)  # people seldom agree
    with pytest.raises(ValueError, match=r"expected human votes on images of 16 pixels, got 20; set image_size alike"):
        _data(photos, human=MaterialData(material, 20))
    with pytest.raises(ValueError, match="expected votes of people as human, got PhotoData"):
        _data(photos, human=_data(photos))
    for other in (ImageFolderData(photos, image_size=16), LabelledFolderData(photos, image_size=16)):
        with pytest.raises(ValueError, match=r"votes of people as human, got \w+FolderData, which has no triplets"):
            _data(photos, human=other)
    study = photos.parent / "study.csv"
    files = [str(path.relative_to(photos.parent)) for path in sorted(photos.rglob("*.png"))[:3]]
    study.write_text("\n".join(["reference,left,right,right_vote", ",".join([*files, "1"])]))
    data = _data(photos, human=TableData(study, 16, test_fraction=1.0, name="semantic", num_workers=0))
    with pytest.raises(
        ValueError, match=r"semantic is the name of triplets of photographs and of a set in data\.human"
    ):
        data.setup("test")


def test_images_without_size_of_their_own_go_with_any(photos: Path) -> None:
    data = _data(photos, human=BuiltinData(num_train=4, num_val=2, num_test=2, image_size=16), human_share=0.2)
    data.setup("fit")
    assert data.val_names == ["semantic", "distortion", "builtin"]
    # Single triplets, which the human votes' own loader collates.
    for loader, size in zip(data.val_dataloader(), (20, 20, 2), strict=True):
        assert [len(batch.reference) for batch in loader] == ([8, 8, 4] if size == 20 else [2])
    assert all(len(batch) == 8 for batch in data.train_dataloader())
