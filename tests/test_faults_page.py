"""The page of faults: each row names tests, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_ROW = re.compile(r"^\| (?!Fault |-)(?P<fault>.+?) \|.*\| (?P<tests>`tests/.+`) \|$", re.MULTILINE)
_PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = {match["fault"]: re.findall(r"`([^`]+)`", match["tests"]) for match in _ROW.finditer(_PAGE)}


def test_every_row_names_a_test() -> None:
    rows = [line for line in _PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Fault ")]
    assert len(rows) == len(ROWS) > 15


@pytest.mark.parametrize("fault", ROWS)
def test_the_tests_of_a_fault_exist(fault: str) -> None:
    for name in ROWS[fault]:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert any(found.startswith("test_") for found in defined) and (not function or function in defined), name
