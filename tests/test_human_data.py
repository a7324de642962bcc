"""docs/human_data.md: the converter, on made-up responses of the public layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from lipsim.data import Preprocess, TableTriplets

PAGE = Path(__file__).parents[1] / "docs" / "human_data.md"
HEADER = "assignment,worker,img_pivot,img_left,img_right,dlevel_left,dlevel_pivot,dlevel_right,is_trap,is_bias,response"
# Three judges find a more different than b, one is not sure; the trap has the source on the right.
RESPONSES = [
    *["1,2,src.png,a.png,b.png,5,0,2,0,0,left"] * 3,
    "1,2,src.png,a.png,b.png,5,0,2,0,0,not sure",
    "1,2,src.png,b.png,a.png,2,0,5,0,0,right",
    "1,2,src.png,a.png,a.png,5,0,5,0,1,left",
    "1,2,src.png,worst.png,src.png,10,0,0,1,0,left",
]


def converter() -> str:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
               if "def convert" in block)  # fmt: skip
    return code


def test_responses_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PTC_images").mkdir()
    for name in ("src", "a", "b"):
        Image.new("RGB", (4, 4)).save(f"PTC_images/{name}.png")
    Path("responses.csv").write_text("\r\n".join(["\ufeff" + HEADER, *RESPONSES]), encoding="utf-8")
    exec(converter(), {})
    rows = TableTriplets("triplets.csv", Preprocess(4)).rows
    assert [row.paths for row in rows] == [
        ("PTC_images/src.png", "PTC_images/a.png", "PTC_images/b.png"),
        ("PTC_images/src.png", "PTC_images/b.png", "PTC_images/a.png"),
    ]
    # b is the more similar one, whichever side it is on.
    assert [row.right_vote for row in rows] == [3.5 / 4, 0]


def test_answers_the_other_way_round_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = RESPONSES[-1].replace(",left", ",right")
    Path("responses.csv").write_text("\n".join([HEADER, *RESPONSES[:-1], other]))
    with pytest.raises(ValueError, match="name the more different image"):
        exec(converter(), {})
