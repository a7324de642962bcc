"""Tables of triplets: what they mean, and what is wrong with them, by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim.data import Preprocess, TableTriplets, load_image
from lipsim.data.sets.table import SPLITS
from lipsim.datamodules import TableData

NAMES = [f"{letter}.png" for letter in "abcdef"]
HEADER = "reference,left,right,right_vote\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for name in (*NAMES, "deep/a.png"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def table_of(folder: Path, text: str | bytes, part: str = "all", **options: Any) -> TableTriplets:
    return TableTriplets(write(folder, text), Preprocess(8), part, **options)


def test_triplets_are_those_of_the_table(table: Path) -> None:
    whole = TableTriplets(table, Preprocess(16, "pil"))
    assert len(whole) == 36 and len(set(whole.manifest())) == 36
    for index in (0, 17, -1):
        number, found = index % 36, whole[index]
        right = found.right_vote > 0.5
        assert found.right_vote == torch.tensor(0.8 if right else 0.0) and found.index == number
        names = ["ref", *(("far", "near") if right else ("near", "far"))]
        for image, name in zip((found.reference, found.left, found.right), names, strict=True):
            assert torch.equal(image, load_image(table.parent / f"images/{number}-{name}.png", whole.preprocess))
    assert {name: mask.nonzero().flatten().tolist() for name, mask in whole.groups.items()} == {
        "blur": list(range(1, 36, 2)),
        "noise": list(range(0, 36, 2)),
    }
    with pytest.raises(IndexError):
        whole[36]
    for number, split in enumerate(SPLITS):
        part = TableTriplets(table, Preprocess(16, "pil"), split)
        assert part.rows == whole.rows[12 * number : 12 * number + 12] and part[3].index == 3
        assert torch.equal(part[3].left, whole[12 * number + 3].left)


def test_any_spreadsheet_is_read(folder: Path) -> None:
    expected = table_of(folder, HEADER + "a.png,b.png,deep/a.png,0.25\nb.png,c.png,d.png,1\n")
    for text in (
        b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode() + b"a.png,b.png,deep\\a.png,.25\r\nb.png,c.png,d.png,1",
        HEADER.replace("\n", "\r") + "a.png,b.png,deep/a.png,0.25\rb.png,c.png,d.png,1.0",
        '\n"reference", left ,right,right_vote,\n"a.png",./b.png,  deep/a.png , 25e-2,\n\n,,,,\nb.png,c.png,d.png,1,',
        "id,right_vote,right,left,reference\n7,0.25,deep/a.png,b.png,a.png\n8,1,d.png,c.png,b.png\n",
        "reference,left,right,left_votes,right_votes\na.png,b.png,deep/a.png,9,3\nb.png,c.png,d.png,0,2\n",
    ):
        found = table_of(folder, text)
        assert [(r.paths, r.right_vote) for r in found.rows] == [(r.paths, r.right_vote) for r in expected.rows]
    renamed = "img_pivot,l,r,vote,reference\na.png,b.png,deep/a.png,0.25,x\nb.png,c.png,d.png,1,y\n"
    columns = {"reference": "img_pivot", "left": "l", "right": "r", "right_vote": "vote"}
    found = table_of(folder, renamed, columns=columns)
    assert found.manifest() == expected.manifest()


def test_everything_wrong_is_told_at_once(folder: Path) -> None:
    lines = [
        "a.png,b.png,c.png,0.5",
        "a.png,../a.png,/etc/passwd,0.5",
        "a.png,b.png,C:\\c.png,nan",
        "~/a.png,deep\\..\\..\\c.png,c.png,1.5",
        ",b.png,gone.png,x",
        "a.png,b.png",
        "a.png,b.png,c.png,0.5,more",
        *["a.png,b.png,c.png,2"] * 11,
    ]
    with pytest.raises(ValueError, match="problems: ") as error:
        table_of(folder, HEADER + "\n".join(lines))
    message = str(error.value)
    assert "\n" not in message and "t.csv has 23 problems" in message and message.endswith("; and 3 more")
    for part in (
        "line 3: left is '../a.png', which leads out of the table's folder",
        "line 3: right is '/etc/passwd', expected a path relative to the table's folder",
        "line 4: right is 'C:\\\\c.png', expected a path relative",
        "line 4: right_vote is 'nan', expected a number in [0, 1]",
        "line 5: reference is '~/a.png', expected a path relative",
        "line 5: left is 'deep\\\\..\\\\..\\\\c.png', which leads out",
        "line 5: right_vote is '1.5'",
        "line 6: reference is empty",
        "line 6: right_vote is 'x'",
        "line 6: no image gone.png",
        "line 7: 2 cells, expected 4; line 8: 5 cells, expected 4; line 9: right_vote",
    ):
        assert part in message
    assert "line 2" not in message
    with pytest.raises(ValueError, match=r"line 2: left is \., expected the path of an image; line 2: right is empty"):
        table_of(folder, "reference,left,right,right_vote\na.png,.,,1")
    with pytest.raises(ValueError, match=r"1 problem: line 2: nobody voted"):
        table_of(folder, "reference,left,right,left_votes,right_votes\na.png,b.png,c.png,0,0")
    with pytest.raises(ValueError, match=r"left_votes is '-1', expected a number ≥ 0"):
        table_of(folder, "reference,left,right,left_votes,right_votes\na.png,b.png,c.png,-1,2")
    with pytest.raises(ValueError, match=r"line 2: split is '', expected one of train, val, test"):
        table_of(folder, "reference,left,right,right_vote,split\na.png,b.png,c.png,1,")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a line of column names"),
        (HEADER, "has no rows below"),
        (b"\xff\xfer\x00e\x00", "not text in UTF-8"),
        (HEADER + 'a.png,"b.png', r"is no CSV file \(line 2: unexpected end"),
        (HEADER + 'a.png,b.png,c.png,1\na.png, "b.png" ,c.png,1', r"is no CSV file \(line 3: ',' expected after"),
        (HEADER + "a.png,b.png,c.png,0_1", "line 2: right_vote is '0_1', expected a number"),
        ("reference,left,right,left_votes,right_votes\na.png,b.png,c.png,1e308,1e308", "beyond the largest number"),
        ("reference,left,right,left,right_vote\na,b,c,d,1", "the column left more than once"),
        ("reference;left;right;right_vote\na;b;c;1", "separated by semicolons, expected commas"),
        ("reference;left;right;choice\na;b;c;1", "separated by semicolons, expected commas"),
        ("reference,left,right\na,b,c", "has no column right_vote; name the one .*, as right_vote=COLUMN"),
        ("reference,left,right,left_votes\na,b,c,1", "has no column right_votes"),
        ("reference,left,right,left_votes,right_votes,right_vote\na,b,c,1,2,1", "both right_vote and counts"),
        (HEADER.replace("\n", ",group\n") + "".join(f"a.png,b.png,c.png,1,{i}\n" for i in range(101)), "101 values"),
    ],
)
def test_what_is_no_table_is_refused(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(folder, text)


def test_bad_requests_are_refused(folder: Path) -> None:
    good = HEADER + "a.png,b.png,c.png,1\n"
    with pytest.raises(FileNotFoundError, match=r"1 problem: line 2: no image gone\.png; paths are relative to"):
        table_of(folder, HEADER + "gone.png,b.png,c.png,1")
    with pytest.raises(FileNotFoundError, match="no table"):
        TableTriplets(folder / "other.csv", Preprocess(8))
    with pytest.raises(ValueError, match="expected the CSV file of a table, got the folder"):
        TableTriplets(folder, Preprocess(8))
    for columns, message in (
        ({"pivot": "a"}, "expected columns among reference, left, right, right_vote.*, got pivot"),
        ({"reference": "pivot"}, "no column pivot; it has reference, left, right, right_vote"),
        ({"left": "x", "right": "x"}, "got x twice"),
        ({"left": "right"}, r"no column right \(the one of that name stands for another\); name .* as right=COLUMN"),
    ):
        with pytest.raises(ValueError, match=message):
            table_of(folder, good, columns=columns)
    swapped = table_of(folder, good, columns={"left": "right", "right": "left"})
    assert swapped.rows[0].paths == ("a.png", "c.png", "b.png")
    with pytest.raises(ValueError, match="part among all, train, val, test, got 'tset'"):
        table_of(folder, good, "tset")
    with pytest.raises(ValueError, match=r"nothing of .* is for 'train': its 1 references are divided by val"):
        table_of(folder, good, "train")
    with pytest.raises(ValueError, match=r"nothing of .* is for 'val': its column split has test, train"):
        rows = "a.png,b.png,c.png,1,test\na.png,b.png,c.png,1,train"
        table_of(folder, HEADER.replace("\n", ",split\n") + rows, "val")
    with pytest.raises(ValueError, match=r"test_fraction ≥ 0 and at most 1, got 1\.5"):
        table_of(folder, good, test_fraction=1.5)
    with pytest.raises(ValueError, match=r"of at most 1 together, got 0\.6 and 0\.5"):
        table_of(folder, good, val_fraction=0.6, test_fraction=0.5)
    assert len(table_of(folder, good, "test", test_fraction=1)) == 1  # with the default val_fraction


def test_no_reference_is_in_two_parts(folder: Path) -> None:
    rng = np.random.default_rng(1)
    references = [f"r{i}.png" for i in range(20)]
    for name in references:
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    rows = [f"{'./' * int(rng.integers(2))}{references[i % 20]},a.png,b.png,{i / 100}" for i in range(100)]
    file = write(folder, HEADER + "\n".join(rows))
    parts = {part: TableTriplets(file, Preprocess(8), part, test_fraction=0.25, seed=3) for part in SPLITS}
    seen = {part: {row.paths[0] for row in triplets.rows} for part, triplets in parts.items()}
    assert {part: len(names) for part, names in seen.items()} == {"train": 13, "val": 2, "test": 5}
    assert len(set.union(*seen.values())) == 20 and sum(len(triplets) for triplets in parts.values()) == 100
    # A part of a part is what both have: the division is of the whole table.
    assert parts["test"].part("test").rows == parts["test"].rows
    with pytest.raises(ValueError, match="is for 'test'"):
        parts["train"].part("test")
    again = TableTriplets(file, Preprocess(8), "test", test_fraction=0.25, seed=3)
    other = TableTriplets(file, Preprocess(8), "test", test_fraction=0.25, seed=4)
    assert again.rows == parts["test"].rows != other.rows
    assert len(TableTriplets(file, Preprocess(8), "test", test_fraction=1.0)) == 100
    data = TableData(file, image_size=8, num_workers=0, batch_size=4)
    data.setup("fit")
    data.setup("test")
    assert data.train_set is not None
    sizes = [len(data.train_set), len(data.val_sets["table"]), len(data.test_sets["table"])]
    assert sizes == [80, 10, 10]


def test_a_name_that_no_file_has_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: left is 'a\\x00.png', which no file can be called"):
        table_of(folder, HEADER + "b.png,a\0.png,c.png,1")


def test_links_in_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    """Who put one there has the folder; a table makes none."""
    elsewhere = tmp_path / "elsewhere.png"
    (folder / "a.png").rename(elsewhere)
    (folder / "a.png").symlink_to(elsewhere)
    assert len(table_of(folder, HEADER + "a.png,b.png,c.png,1")) == 1


def test_links_to_nothing_and_folders_are_no_images(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "a.png")
    table_of(folder, HEADER + "link.png,b.png,c.png,1")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "inside.png").mkdir()
    for name in ("gone.png", "inside.png"):
        with pytest.raises(FileNotFoundError, match=f"no image {name}"):
            table_of(folder, HEADER + f"{name},b.png,c.png,1")
