"""Data modules: their contract, and how their images are resized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from lipsim.data import BuiltinTriplets, Preprocess, TripletDataModule
from lipsim.data.contracts import facts_of, resizes_of
from lipsim.datamodules import (
    BappsData,
    BuiltinData,
    ImageFolderData,
    MaterialData,
    NightsData,
    PhotoData,
    TableData,
    TripletData,
)


def test_all_keep_the_contract(tmp_path: Path) -> None:
    modules: list[TripletDataModule] = [
        BuiltinData(),
        NightsData(),
        BappsData(),
        MaterialData(),
        PhotoData(),
        TableData(),
        ImageFolderData(tmp_path, triplets=NightsData()),
    ]
    for module in modules:
        assert isinstance(module, TripletDataModule)
        assert (module.preprocess is None) == isinstance(module, BuiltinData)


@pytest.mark.parametrize("kind", [NightsData, BappsData, MaterialData, TableData])
def test_a_module_follows_the_metric_unless_told_otherwise(kind: type[NightsData]) -> None:
    for resize, followed in ((None, "pil"), ("float", "float"), ("pil", "pil")):
        for outer in (lambda data: data, lambda data: ImageFolderData(triplets=data)):
            data = outer(kind(image_size=16, resize=resize))
            assert data.preprocess.resize == (resize or "float")
            data.follow(Preprocess(8, "pil"))
            assert data.preprocess.resize == followed and data.preprocess.image_size == 16
    with pytest.raises(ValueError, match="resize to be one of"):
        kind(resize="nearest")


def test_material_is_resized_as_the_module_says(material: Path) -> None:
    sets = {}
    for resize in ("float", "pil"):
        data = MaterialData(material, image_size=16, val_triplets=200, resize=resize)
        data.setup("test")
        assert list(data.test_sets) == ["triplets", "materials", "official"]
        assert list(data.val_sets) == ["triplets", "materials"] and data.train_set is not None
        assert all(triplets.preprocess.resize == resize for triplets in data.test_sets.values())
        sets[resize] = data.test_sets["official"][0].reference
    assert (sets["float"] - sets["pil"]).abs().max() > 1e-4


def test_what_a_foreign_module_says_is_read(nights: Path, tmp_path: Path) -> None:
    facts = facts_of(object(), "test")
    assert (facts.names, facts.groups, facts.preprocess, facts.tells_resize) == ([], {}, None, False)
    data = NightsData(nights, image_size=8, resize="pil", num_workers=0)
    data.setup("test")
    facts = facts_of(data, "test")
    assert facts.names == ["nights"] and facts.preprocess is data.preprocess and facts.tells_resize
    assert set(facts.groups["nights"]) == {"imagenet", "non_imagenet"}
    nights_set, builtin = data.test_sets["nights"], BuiltinTriplets("test", 2, image_size=16)
    assert resizes_of(Subset(nights_set, [0])) == {"pil"}  # type: ignore[arg-type]
    assert resizes_of(torch.utils.data.ConcatDataset([nights_set, builtin])) == {"pil"}  # type: ignore[list-item]
    assert resizes_of(builtin) == resizes_of([1, 2]) == set()


def test_a_set_of_another_kind_has_no_parts() -> None:
    data = TripletData(2)
    data.test_sets = {"few": Subset(BuiltinTriplets("test", 4, image_size=16), [0, 2])}  # type: ignore[dict-item]
    assert data.test_groups == {"few": {}} and data.test_names == ["few"]


def test_images_and_triplets_are_apart(tmp_path: Path, nights: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
        Image.new("RGB", (12, 9), "red").save(tmp_path / "images" / part / "0.png")
    data = ImageFolderData(tmp_path / "images", 8, short_side=8, triplets=NightsData(nights, 8), num_workers=0)
    data.setup("fit")
    assert data.val_names == ["images", "nights"] and list(data.val_sets) == ["nights"]
    assert data.val_images is not None and data.val_images[0].shape == (3, 8, 8)
