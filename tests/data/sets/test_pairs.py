"""Tables of pairs with opinion scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim.data import PairTable, Preprocess, load_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level, name in enumerate(("ref.png", "x.png", "y.png")):
        Image.fromarray(np.full((8, 8, 3), 40 * level, dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, text: str, columns: dict[str, str] | None = None) -> PairTable:
    (folder / "pairs.csv").write_text(text)
    return PairTable.read(folder / "pairs.csv", columns)


def test_high_opinion_is_little_difference(folder: Path) -> None:
    dmos = read(folder, "reference,distorted,dmos\nref.png,y.png,2.5\nref.png,x.png,-1\n")
    assert (dmos.kind, len(dmos), dmos.images) == ("dmos", 2, ("ref.png", "x.png", "y.png"))
    assert dmos.pairs.tolist() == [[0, 2], [0, 1]] and dmos.difference.tolist() == [2.5, -1]
    mos = read(folder, "mos,distorted,reference\n2.5,y.png,ref.png\n-1,x.png,ref.png\n")
    assert mos.kind == "mos" and mos.difference.tolist() == [-2.5, 1] and torch.equal(mos.pairs, dmos.pairs)
    expected = [load_image(folder / name, Preprocess(4)) for name in ("y.png", "ref.png")]
    assert torch.equal(dmos.load([2, 0], Preprocess(4)), torch.stack(expected))


def test_the_layout_of_jpeg_aic_4(folder: Path) -> None:
    text = (
        "img_num,codec,dlevel,img_source,img_distorted,distortion,CI_min,CI_max\n2,1,1,ref.png,x.png,0.12,0.09,0.15\n"
    )
    columns = {"reference": "img_source", "distorted": "img_distorted", "dmos": "distortion"}
    table = read(folder, text, columns)
    assert (table.kind, table.scores.tolist(), table.pairs.tolist()) == ("dmos", [0.12], [[0, 1]])


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("reference,distorted,score\nref.png,x.png,1", None, "has no scores: expected a column mos"),
        ("reference,distorted,mos,dmos\nref.png,x.png,1,2", None, "both mos and dmos; name the one that counts"),
        ("reference,other,mos\nref.png,x.png,1", None, "no column distorted; name .* as distorted=COLUMN"),
        ("reference,distorted,mos\nref.png,../x.png,high", None, "2 problems: line 2: distorted is .*; line 2: mos is"),
        ("reference,distorted,mos\nref.png,x.png,inf", None, "mos is 'inf', expected a number"),
        ("reference,distorted,mos\nref.png,x.png,1", {"mos": "quality"}, "no column quality; it has reference"),
        ("reference,distorted,mos\nref.png,x.png,1", {"left": "distorted"}, "columns among reference, distorted, mos"),
    ],
)
def test_what_is_no_table_is_refused(folder: Path, text: str, columns: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(folder, text, columns)


def test_one_of_two_scores_can_be_named(folder: Path) -> None:
    text = "reference,distorted,mos,dmos\nref.png,x.png,1,2\nref.png,y.png,3,0"
    assert read(folder, text, {"mos": "mos"}).scores.tolist() == [1, 3]
    assert read(folder, text, {"dmos": "dmos"}).scores.tolist() == [2, 0]
    with pytest.raises(FileNotFoundError, match=r"line 2: no image gone.png"):
        read(folder, "reference,distorted,mos\nref.png,gone.png,1\n")
