"""Labelled pairs: of tables, and of two folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from lipsim.data.sets.labelled import LabelledPairs


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number in range(4):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (60 * number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    return tmp_path / "a", tmp_path / "b"


def test_a_table(folders: tuple[Path, Path]) -> None:
    table = folders[0].parent / "pairs.csv"
    words = ("1", "0", "TRUE", "no", "same", "Different")
    table.write_text("left,right,same\n" + "".join(f"a/{i % 4}.png,b/{i % 3}.png,{w}\n" for i, w in enumerate(words)))
    data = LabelledPairs.read(table)
    assert data.same.tolist() == [True, False] * 3 and len(data) == 6
    assert [data.images[i] for i in data.pairs[3].tolist()] == ["a/3.png", "b/0.png"]
    table.write_text("x,y,match\na/0.png,b/0.png,1\na/0.png,b/1.png,0\n")
    assert len(LabelledPairs.read(table, {"left": "x", "right": "y", "same": "match"})) == 2
    for rows, message in (
        ("a/0.png,b/0.png,maybe\n", "line 2: same is 'maybe', expected 1"),
        ("a/0.png,b/0.png,1\n", "both kinds, got 1 the same and 0 different"),
    ):
        table.write_text("left,right,same\n" + rows)
        with pytest.raises(ValueError, match=message):
            LabelledPairs.read(table)


def test_folders_make_every_pair_across_names_or_some(folders: tuple[Path, Path]) -> None:
    data = LabelledPairs.from_folders(*folders)
    pairs = [tuple(Path(data.images[i]) for i in pair) for pair in data.pairs.tolist()]
    names = [(left.name, right.name) for left, right in pairs]
    assert all(left.parent.name == "a" and right.parent.name == "b" for left, right in pairs)
    assert [left == right for left, right in names] == data.same.tolist() and int(data.same.sum()) == 4
    assert len(set(names)) == 16  # all there are: four the same and twelve across
    few = LabelledPairs.from_folders(*folders, different=5, seed=1)
    assert (
        len(few) == 9 and few.pairs.tolist() == LabelledPairs.from_folders(*folders, different=5, seed=1).pairs.tolist()
    )
    assert few.pairs.tolist() != LabelledPairs.from_folders(*folders, different=5, seed=2).pairs.tolist()
    with pytest.raises(ValueError, match="4 names make 12 different pairs, got 13"):
        LabelledPairs.from_folders(*folders, different=13)


def test_the_hash_is_of_labels_and_pixels_and_not_of_places(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before = LabelledPairs.from_folders(*folders).sha256()
    moved = [Path(shutil.copytree(folder, tmp_path / "moved" / folder.name)) for folder in folders]
    assert LabelledPairs.from_folders(*moved).sha256() == before
    assert LabelledPairs.from_folders(*moved, different=5).sha256() != before
    Image.new("RGB", (4, 4), "white").save(moved[0] / "2.png")
    assert LabelledPairs.from_folders(*moved).sha256() != before
