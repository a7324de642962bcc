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


def loaded_after(steps: dict[str, str], tmp_path: Path) -> dict[str, set[str]]:
    """The modules that one fresh Python has after each of the steps, which it runs in turn."""
    report = tmp_path / "modules.json"
    code = "import json, sys\nloaded = {}\n"
    for name, step in steps.items():
        code += f"{step}\nloaded[{name!r}] = sorted(sys.modules)\n"
    code += f"open({str(report)!r}, 'w').write(json.dumps(loaded))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, timeout=300)
    return {name: set(modules) for name, modules in json.loads(report.read_text()).items()}


def test_neither_the_import_nor_help_loads_torch(tmp_path: Path) -> None:
    steps = {
        "import": "import lipsim",
        "help": HELP.format(arguments=["--help"]),
        "version": HELP.format(arguments=["--version"]),
    }
    for step, loaded in loaded_after(steps, tmp_path).items():
        assert "lipsim" in loaded
        assert loaded & (HEAVY | {"torch", "numpy"}) == set(), step


def test_a_metric_is_used_without_what_trains_it(tmp_path: Path) -> None:
    steps = {
        "public names": "import lipsim as l\n"
        "l.PerceptualMetric, l.TwoAFCCertificate, l.attacks.pgd, l.data, l.students.SLLNetwork",
        "load": "import lipsim; lipsim.load('quickstart')",
        "audit": HELP.format(arguments=["audit", "--help"]),
        "certify": HELP.format(arguments=["certify", "--help"]),
        "distance": f"from PIL import Image; Image.new('RGB', (70, 70)).save({str(tmp_path / 'x.png')!r})"
        + HELP.format(arguments=["distance", *[str(tmp_path / "x.png")] * 2]),
        "same": HELP.format(arguments=["same", *[str(tmp_path / "x.png")] * 2, "--threshold", "0.1"]),
        "info": HELP.format(arguments=["info"]),
    }
    for step, loaded in loaded_after(steps, tmp_path).items():
        assert "torch" in loaded
        assert loaded & HEAVY == set(), step


def test_public_names_are_all_there() -> None:
    import lipsim

    assert all(getattr(lipsim, name) is not None for name in lipsim.__all__)
    assert set(lipsim.__all__) <= set(dir(lipsim))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lipsim.nonsense  # noqa: B018
