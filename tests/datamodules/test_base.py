"""Data modules: their contract, and how their images are resized."""

from __future__ import annotations

import json
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


def test_implied_votes_are_trained_on_alone(material: Path) -> None:
    for file in (material / "data").glob("*.json"):  # of votes that say something: for the nearer number
        content = json.loads(file.read_text())
        for name in ("answers", "answers_diff"):
            content[name] = [[r, *sorted(pair, key=lambda x: abs(x - r))] for r, *pair in content[name]]
        file.write_text(json.dumps(content))
    data, plain = (MaterialData(material, image_size=16, val_triplets=200, implied=count) for count in (40, 0))
    plain.setup("fit")
    data.setup("test")
    assert len(data.train_set) == len(plain.train_set)  # not before they are needed
    data.setup("fit")
    before, after = plain.train_set.answers, data.train_set.answers
    assert len(after.ids) == len(before.ids) + 40 and torch.equal(after.ids[:-40], before.ids)
    assert torch.isin(after.ids[-40:], before.ids).all()  # no image of a held-out material
    for name, triplets in plain.val_sets.items():
        assert torch.equal(data.val_sets[name].answers.right_vote, triplets.answers.right_vote)
    data.setup("fit")
    assert len(data.train_set) == len(after.ids)
    for resize in ("pil", "float"):  # as an evaluation of another metric between two trainings has it
        data.follow(Preprocess(16, resize))
    data.setup("fit")
    assert torch.equal(data.train_set.answers.ids, after.ids)


def test_votes_of_a_table_imply_others(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    triplets = [(r, x, y) for r in range(8) for x in range(8) for y in range(8) if len({r, x, y}) == 3]
    rows = [f"{r}.png,{x}.png,{y}.png,{float(abs(r - y) < abs(r - x))}" for r, x, y in triplets if x + y != 2 * r]
    (tmp_path / "t.csv").write_text("\n".join(["reference,left,right,right_vote", *rows]))
    data = TableData(tmp_path / "t.csv", image_size=8, implied=30)
    data.setup("fit")
    implied = data.train_set.rows[-30:]
    assert [row.line for row in implied] == [0] * 30 and data.train_set.rows[-31].line > 0
    references = {row.paths[0] for row in data.train_set.rows[:-30]}
    assert len(references) == 6 and {row.paths[0] for row in implied} <= references  # the others are held out
    places = [[int(Path(path).stem) for path in row.paths] for row in implied]
    right = [abs(r - x) - abs(r - y) for r, x, y in places]
    agree = [(row.right_vote > 0.5) == (nearer > 0) for row, nearer in zip(implied, right, strict=True) if nearer]
    assert sum(agree) >= 0.85 * len(agree)
    with pytest.raises(ValueError, match="whole number implied ≥ 0, got -1"):
        TableData(tmp_path / "t.csv", implied=-1)
