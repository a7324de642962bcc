"""The Material loader on a made-up folder, and on the real one where it is present."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lipsim.data.sets.material import (
    MaterialAnswers,
    MaterialTriplets,
    load_material_answers,
    load_material_images,
    split_material,
)
from lipsim.data.transforms import Preprocess
from lipsim.datamodules import MaterialData
from lipsim.utils.errors import LipsimError

REAL = Path(__file__).parents[4] / "shared" / "data" / "material-appearance-similarity"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(100, generator=rng)[:3].tolist() for _ in range(3200)]
    answers = list({(r, frozenset((a, b))): [r, a, b] for r, a, b in drawn}.values())[:3000]
    agreement = [[4, 1] if i % 10 else [2, 2] for i in range(3000)]
    untied = [i for i in range(3000) if i % 10]
    content = {
        "answers": answers,
        "agreement": agreement,
        "answers_diff": [answers[i] for i in untied],
        "agreement_diff": [agreement[i] for i in untied],
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "answers_processed_train.json").write_text(json.dumps(content))
    return tmp_path


def test_hidden_files_are_no_images_and_damaged_ones_are_named(tmp_path: Path) -> None:
    place = tmp_path / "data" / "havran1_ennis_298x298_LDR"
    place.mkdir(parents=True)
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number:03d}.jpg")
        (place / f"._{number:03d}.jpg").write_bytes(b"of macOS")
    images, names = load_material_images(tmp_path, Preprocess(8))
    assert images.shape == (100, 3, 8, 8) and names[:2] == ["000.jpg", "001.jpg"]
    (place / "042.jpg").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot read the image .*042\.jpg"):
        load_material_images(tmp_path, Preprocess(8))


def test_sides_are_shuffled_and_the_votes_follow(folder: Path) -> None:
    answers = load_material_answers(folder)
    original = torch.tensor(json.loads((folder / "data/answers_processed_train.json").read_text())["answers_diff"])
    assert len(answers.ids) == 2700
    swapped = answers.ids[:, 1] != original[:, 1]
    assert 0.45 < swapped.double().mean() < 0.55
    torch.testing.assert_close(answers.right_vote, torch.where(swapped, 0.8, 0.2))
    assert torch.equal(answers.ids[:, 0], original[:, 0])
    assert torch.equal(answers.ids.sort(1).values, original.sort(1).values)
    again = load_material_answers(folder)
    assert torch.equal(again.ids, answers.ids)


def test_ties_are_kept_on_request(folder: Path) -> None:
    answers = load_material_answers(folder, ties=True)
    assert len(answers.ids) == 3000 and int((answers.right_vote == 0.5).sum()) == 300


def test_validation_sets_are_never_trained_on(folder: Path) -> None:
    split = split_material(load_material_answers(folder), num_triplets=200, num_materials=20)
    held_out = torch.tensor(split.held_out)
    assert len(held_out) == 20 and len(split.triplets.ids) == 200
    assert not torch.isin(split.train.ids, held_out).any() and not torch.isin(split.triplets.ids, held_out).any()
    assert torch.isin(split.materials.ids, held_out).any(1).all()
    assert len(split.unseen.ids) == int(torch.isin(split.materials.ids, held_out).all(1).sum()) > 0
    assert torch.isin(split.unseen.ids, held_out).all()
    assert len(split.train.ids) + 200 + len(split.materials.ids) == 2700
    train = {tuple(row) for row in split.train.ids.tolist()}
    assert not any(tuple(row) in train for row in split.triplets.ids.tolist())
    assert split_material(load_material_answers(folder), num_triplets=200).held_out == split.held_out
    with pytest.raises(ValueError, match="nothing to train on"):
        split_material(load_material_answers(folder), num_triplets=2700)
    for counts, message in (
        ({"num_triplets": -5}, "whole number num_triplets ≥ 0, got -5"),
        ({"num_materials": -1}, "whole number num_materials ≥ 0, got -1"),
        ({"num_materials": 120}, "at most 100 materials to hold out, got num_materials = 120"),
    ):
        with pytest.raises(LipsimError, match=message):
            split_material(load_material_answers(folder), **counts)
    for counts, message in (
        ({"val_triplets": -5}, "whole number val_triplets ≥ 1, got -5"),
        ({"held_out_materials": -1}, "whole number held_out_materials ≥ 0, got -1"),
        ({"held_out_materials": 120}, "at most 100 held_out_materials, got 120"),
    ):
        with pytest.raises(LipsimError, match=message):
            MaterialData(folder, 8, **counts)  # type: ignore[arg-type]


def test_a_batch_holds_each_image_once() -> None:
    images = torch.rand(100, 3, 4, 4)
    ids = torch.randint(0, 10, (50, 3))
    answers = MaterialAnswers(ids, torch.rand(50))
    batch = MaterialTriplets(images, answers, Preprocess(4)).__getitems__([7, 3, 3])
    assert len(batch.distinct) == len(torch.unique(ids[[7, 3]]))
    for column, name in enumerate(("reference", "left", "right")):
        assert torch.equal(getattr(batch, name), images[ids[[7, 3, 3], column]])
    assert batch.index.tolist() == [7, 3, 3]
    calls = []
    features = batch.embed(lambda x: calls.append(len(x)) or x.flatten(1))
    assert calls == [len(batch.distinct)] and torch.equal(features[2], batch.right.flatten(1))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real Material data is not beside the checkout")
def test_the_real_folder() -> None:
    answers = load_material_answers(REAL)
    assert len(answers.ids) == 21_406 and len(load_material_answers(REAL, ties=True).ids) == 22_801
    images, names = load_material_images(REAL, Preprocess(16))
    assert images.shape == (100, 3, 16, 16) and names == sorted(names) and 0 <= images.min() < images.max() <= 1
    split = split_material(answers)
    assert len(split.triplets.ids) == 2000 and len(split.held_out) == 20
