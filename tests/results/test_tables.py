"""Tables in a terminal: nothing is cut, whatever its width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from sections import attacked_section, certified_section

from lipsim.results import eps_label, update_results
from lipsim.results.comparison import attacked_tables, certified_tables, print_tables
from lipsim.results.runs import load_runs
from lipsim.results.schema import Scores
from lipsim.results.tables import certified_rows, print_table

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Default budgets, votes that are fractions, triplets without a gradient: every column there is."""
    eps = [36 / 255, 72 / 255, 108 / 255, 1.0]
    left: Scores = dict.fromkeys(map(eps_label, eps), 0.5)
    attacked = attacked_section({"metric": (0.9, left), "teacher": (0.9, left)}, eps)
    attacked["sets"]["builtin"]["metrics"]["metric"]["no_gradient"] = 1234
    certified = certified_section({"builtin": [0.8, 0.7, 0.6, 0.5]}, eps, majority=0.9, vote=0.875)
    update_results(tmp_path / "run" / "results.json", {"certified": certified, "attacked": attacked})
    return tmp_path / "run"


def test_tables_of_runs_in_a_terminal_of_80_columns(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = load_runs([f"{name}={run}" for name in ("student", "a_name_of_some_length")])
    tables = [*certified_tables(runs, "builtin", ["certified", "joint"]), *attacked_tables(runs, "builtin")]
    print_tables(tables, Console())
    print_table(Console(), certified_rows(runs[0].results["certified"]), "of one run")
    text = capsys.readouterr().out
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    headings = [lines[number - 1].split() for number, line in enumerate(lines) if set(line) == {"─"}]
    assert headings == [
        ["metric", "natural", "vote", "share", "36/255", "72/255", "108/255", "1"],
        ["metric", "natural", "36/255", "72/255", "108/255", "1", "no", "gradient"],
        ["set", "triplets", "natural", "vote", "share", "36/255", "72/255", "108/255", "1", "median", "R"],
    ]
