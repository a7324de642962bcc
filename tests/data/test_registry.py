"""The data sets by name: every one is served as the metric that will see it says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lipsim.data import BuiltinTriplets, Preprocess, Triplet, TripletSet, load_image, open_sets, sample_triplets
from lipsim.data.registry import DATA, SOURCES
from lipsim.data.sets.material import (
    MaterialTriplets,
    load_material_answers,
    load_material_images,
    split_material,
)
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.sets.table import TableTriplets

OPTIONS = {
    "builtin": {"num_triplets": 3},
    "nights": {},
    "bapps": {},
    "material": {"num_triplets": 200},
    "photos": {},
    "table": {},
}


def _root(data: str, request: pytest.FixtureRequest) -> Path | None:
    return request.getfixturevalue(data) if SOURCES[data].on_disk else None


@pytest.mark.parametrize("data", DATA)
def test_every_part_is_a_set_of_triplets(data: str, request: pytest.FixtureRequest) -> None:
    root, parts = _root(data, request), SOURCES[data].parts
    assert SOURCES[data].held_out in parts
    sets = open_sets(data, parts, image_size=16, resize="pil", root=root, **OPTIONS[data])
    assert tuple(sets) == parts
    for triplets in sets.values():
        assert isinstance(triplets, TripletSet) and len(triplets) > 0
        assert triplets[0].reference.shape[-3:] == (3, 16, 16)
        assert all(mask.shape == (len(triplets),) for mask in triplets.groups.values())
        assert len(triplets.manifest()) in (0, len(triplets))
        assert (triplets.preprocess is None) == (not SOURCES[data].on_disk)
        assert triplets.preprocess is None or triplets.preprocess.resize == "pil"


@pytest.mark.parametrize("resize", ["float", "pil"])
@pytest.mark.parametrize("data", ["nights", "bapps", "material", "table"])
def test_images_are_those_of_the_preprocess(data: str, resize: str, request: pytest.FixtureRequest) -> None:
    root, preprocess = _root(data, request), Preprocess(16, resize)
    part = SOURCES[data].held_out
    triplets = open_sets(data, [part], image_size=16, resize=resize, root=root, **OPTIONS[data])[part]
    assert root is not None
    if isinstance(triplets, MaterialTriplets):
        files = sorted((root / "data/havran1_ennis_298x298_LDR").iterdir())
        expected = [load_image(files[i], preprocess)[None] for i in triplets.answers.ids[5].tolist()]
    elif isinstance(triplets, NightsTriplets | TableTriplets):
        folder = root if root.is_dir() else root.parent
        expected = [load_image(folder / path, preprocess) for path in triplets.rows[5].paths]
    else:
        expected = [load_image(root / path, preprocess) for path in triplets.files[5][:3]]  # type: ignore[attr-defined]
    found = triplets[5]
    for image, own in zip((found.reference, found.left, found.right), expected, strict=True):
        assert torch.equal(image, own)


@pytest.mark.parametrize("data", ["nights", "bapps", "material", "photos", "table"])
def test_samples_depend_on_seed_and_resize(data: str, request: pytest.FixtureRequest) -> None:
    root = _root(data, request)
    first, again, other = (sample_triplets(data, 3, 16, resize="float", root=root, seed=seed) for seed in (1, 1, 2))
    assert first.reference.shape == first.right.shape == (3, 3, 16, 16)
    assert torch.equal(first.left, again.left) and not torch.equal(first.left, other.left)
    pil = sample_triplets(data, 3, 16, resize="pil", root=root, seed=1)
    assert torch.equal(pil.index, first.index) and (first.reference - pil.reference).abs().max() > 1e-4
    with pytest.raises(ValueError, match="pass it as --root"):
        sample_triplets(data, 3, 16, resize="float")


def test_samples_of_a_table_without_splits_are_of_the_whole(table: Path) -> None:
    """As an evaluation takes it: nothing says that any of them was trained on."""
    assert len(sample_triplets("table", 12, 16, resize="float", root=table).index) == 12
    rows = [line.split(",") for line in table.read_text().splitlines()]
    table.write_text("\n".join(",".join([*row[:6], *row[7:]]) for row in rows))
    assert rows[0][6] == "split"
    found = sample_triplets("table", 36, 16, resize="float", root=table)
    assert sorted(found.index.tolist()) == list(range(36))


def test_fewer_samples_than_asked_are_said(bapps: Path, photos: Path) -> None:
    with pytest.warns(UserWarning, match="bapps has 36 of the 50 samples that were asked for"):
        found = sample_triplets("bapps", 50, 16, resize="float", root=bapps)
    assert sorted(found.index.tolist()) == list(range(36))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = sample_triplets("photos", 2001, 4, resize="float", root=photos)
    assert sorted(made.index.tolist()) == list(range(2001))


def test_samples_of_the_builtin_set_are_its_beginning() -> None:
    found, expected = (
        sample_triplets("builtin", 2, 16, resize="pil", seed=3),
        BuiltinTriplets("test", 2, image_size=16, seed=3),
    )
    assert isinstance(found, Triplet) and torch.equal(found.right, torch.stack([expected[0].right, expected[1].right]))


def test_nothing_is_resized_that_has_its_size(bapps: Path, tmp_path: Path) -> None:
    """Built-in images in a file, and patches of a metric's own size, are the same in either way."""
    builtin = BuiltinTriplets("test", 1, image_size=16)
    Image.fromarray(builtin.images[0, 0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    for resize in ("float", "pil"):
        assert torch.equal(Preprocess(16, resize)(tmp_path / "image.png"), builtin[0].reference)
    float_, pil = (sample_triplets("bapps", 4, 20, resize=resize, root=bapps) for resize in ("float", "pil"))
    assert torch.equal(float_.reference, pil.reference)


def test_bad_requests_are_refused(nights: Path) -> None:
    with pytest.raises(TypeError, match="resize"):
        sample_triplets("builtin", 1, 16)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="resize"):
        open_sets("nights", ["test"], image_size=16, root=nights)  # type: ignore[call-arg]
    for arguments, message in (
        ({"data": "imagenet"}, "one of builtin, material, nights, bapps, photos, table"),
        ({"parts": ["test", "tset"]}, "parts of nights among train, val, test, got tset"),
        ({"resize": "nearest"}, "resize to be one of float, pil"),
        ({"image_size": 0}, "image_size"),
        ({"root": None}, "pass it as --root"),
    ):
        given = {"data": "nights", "parts": ["test"], "image_size": 16, "resize": "float", "root": nights}
        with pytest.raises(ValueError, match=message):
            open_sets(**(given | arguments))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 sample"):
        sample_triplets("builtin", 0, 16, resize="float")


def test_samples_of_material_are_of_the_division_of_a_training(material: Path) -> None:
    """Another one has trained on what the default holds out."""
    for division in ({}, {"seed": 1}, {"num_triplets": 50, "seed": 3}):
        options: dict[str, Any] = {"num_triplets": 40, "num_materials": 2} | division
        answers = load_material_answers(material, "train", seed=options.get("seed", 0))
        split = split_material(answers, **options)
        found = sample_triplets("material", 30, 16, resize="float", root=material, division=options)
        images, _ = load_material_images(material, Preprocess(16))
        number = {image.numpy().tobytes(): i for i, image in enumerate(images)}
        columns = ([number[x.numpy().tobytes()] for x in part] for part in (found.reference, found.left, found.right))
        drawn = set(zip(*columns, strict=True))
        held_out, trained = ({tuple(ids) for ids in part.ids.tolist()} for part in (split.triplets, split.train))
        assert drawn <= held_out and not drawn & trained
