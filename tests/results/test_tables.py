"""Tables in a terminal: nothing is cut, whatever its width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lipsim.results.tables import print_table

EPS = [f"{numerator}/255" for numerator in (36, 72, 108, 144)]
COLUMNS = ["triplets", "natural", "vote share", *EPS, "1", "2", "median R"]
NAMES = ["run [a]: teacher (apgd, minimal_norm, square; 20 steps)", "known_images"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_heading_and_no_cell_is_cut(width: int) -> None:
    rows = [{"metric": name, **{c: f"{10 * i + j}.5" for j, c in enumerate(COLUMNS)}} for i, name in enumerate(NAMES)]
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), rows, "Majority score in %, natural and certified")
    text = stream.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    cells = {cell.strip() for cell in re.split(" {2,}|\n", text)}
    assert cells >= {*COLUMNS, "metric", "known_images", *(row[c] for row in rows for c in COLUMNS)}
    assert set(text.split()) >= set(NAMES[0].split())
    assert text.count("known_images") == 1 + text.count("(continued)")
    if width == 200:
        assert "(continued)" not in text and NAMES[0] in text
