"""What is loaded before it is needed: next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "lightning", "matplotlib", "torchvision.models", "torchvision", "timm", "open_clip", "skimage", "sklearn", "scipy",
    "torch._dynamo", "torchmetrics", "jsonargparse", "transformers",
}  # fmt: skip
HELP = """
from lipsim.cli.main import main
try:
    main({arguments})
except SystemExit as stop:
    assert stop.code == 0
"""


def loaded_by(code: str, tmp_path: Path) -> set[str]:
    """The modules that a fresh Python has after running ``code``."""
    report = tmp_path / "modules.json"
    code += f"\nimport json, sys; open({str(report)!r}, 'w').write(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, timeout=300)
    return set(json.loads(report.read_text()))


@pytest.mark.parametrize(
    "code",
    ["import lipsim", HELP.format(arguments=["--help"]), HELP.format(arguments=["--version"])],
    ids=["import", "help", "version"],
)
def test_neither_the_import_nor_help_loads_torch(code: str, tmp_path: Path) -> None:
    loaded = loaded_by(code, tmp_path)
    assert "lipsim" in loaded
    assert loaded & (HEAVY | {"torch", "numpy"}) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import lipsim as l; l.PerceptualMetric, l.TwoAFCCertificate, l.attacks.pgd, l.data, l.students.SLLNetwork",
        "import lipsim; lipsim.load('quickstart')",
        HELP.format(arguments=["audit", "--help"]),
        HELP.format(arguments=["certify", "--help"]),
    ],
    ids=["public names", "load", "audit", "certify"],
)
def test_a_metric_is_used_without_what_trains_it(code: str, tmp_path: Path) -> None:
    loaded = loaded_by(code, tmp_path)
    assert "torch" in loaded
    assert loaded & HEAVY == set()


def test_public_names_are_all_there() -> None:
    import lipsim

    assert all(getattr(lipsim, name) is not None for name in lipsim.__all__)
    assert set(lipsim.__all__) <= set(dir(lipsim))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lipsim.nonsense  # noqa: B018
