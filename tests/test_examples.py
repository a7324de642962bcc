"""The examples in docstrings: they run, and the public functions have some."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import lipsim
from lipsim import attacks, certificates

PACKAGE = Path(lipsim.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FUNCTIONS = [
    *(getattr(certificates, name) for name in certificates.__all__ if name.endswith(("_radius", "_radii", "_pixels"))),
    *(getattr(attacks, name) for name in ("pgd", "apgd", "mi_fgsm", "square", "minimal_norm", "one_pixel")),
    *(lipsim.PerceptualMetric, lipsim.load, lipsim.audit.lipschitz_bound, lipsim.data.Triplet),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_have_an_example(function: object) -> None:
    assert ">>> " in (function.__doc__ or "")
