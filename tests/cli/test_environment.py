"""The encoding of the terminal, the locale and the backend of a notebook end no command."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sections import certified_section

from lipsim import PerceptualMetric
from lipsim.cli import evaluate, main, train
from lipsim.cli.parser import one_line_errors
from lipsim.metric import save
from lipsim.results import update_results
from lipsim.students import OrthogonalProjection
from lipsim.utils.terminal import speak_any_encoding

ROOT = Path(__file__).parents[2]
COMMANDS = """
import sys
from lipsim.cli.main import main
for arguments in (["certify", "--metric", "metric.safetensors", *["a.png"] * 3], ["report", "ünlü=run"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, stop.code
"""


@pytest.mark.slow  # a process each; encodings within one are below
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "?"},
    ],
    ids=["cp1252", "ascii"],
)
def test_certify_and_report_in_any_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    """A process each, which is what takes seconds: encodings and backends are settled when Python starts."""
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "metric.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    update_results(tmp_path / "run" / "results.json", {"certified": certified_section({"ε": [0.25]}, [1.0])})
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMANDS.replace("ünlü", r"\xfcnl\xfc")]
    found = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, timeout=300)
    output = found.stdout.decode(environment["PYTHONIOENCODING"])
    assert found.returncode == 0, found.stderr.decode(errors="replace")
    assert "answer: tie" in output and "linf radius of the reference" in output
    assert ("R at 16×16" if environment["PYTHONIOENCODING"] == "cp1252" else "R at 16x16") in output
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "ε" in report
    for name in ("report.md", "report.html", "report.tex", "report.csv"):
        assert "ünlü" in (tmp_path / "report" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("main", [main.main, train.main, evaluate.main])
def test_every_command_speaks_ascii(main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and stream.errors == "lipsim.plain"


def test_signs_have_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    speak_any_encoding()
    print("‖δ‖₂ ≤ ε in ℓ∞, 16×16, Zürich, 漢, \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"||delta||2 <= eps in linf, 16x16, Zurich, ?, ?\n"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", utf8 := io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n"))
    with one_line_errors():
        print("‖δ‖₂ \udcff")  # a file name that is no UTF-8
    utf8.flush()
    assert utf8.buffer.getvalue() == "‖δ‖₂ ?\n".encode()  # type: ignore[attr-defined]


def test_configs_are_ascii_and_others_fail_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read in the encoding of the locale, which may have no more."""
    assert all(file.read_bytes().isascii() for file in (ROOT / "configs").rglob("*.yaml"))
    (tmp_path / "latin.yaml").write_bytes("# für\nseed_everything: 1\n".encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", str(tmp_path / "latin.yaml")])
    error = capsys.readouterr().err
    assert stop.value.code != 0 and "latin.yaml as utf-8" in error and "PYTHONUTF8=1" in error
    assert error.count("\n") == 1


def test_every_file_names_its_encoding() -> None:
    """Else it is the locale's: an empty report.md where that is ASCII."""
    lacking = []
    for file in (file for folder in ("lipsim", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            function = call.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            opens = (name == "open" and owner in ("", "io", "codecs")) or name == "fdopen"
            nodes = [node for argument in [*call.args, *call.keywords] for node in ast.walk(argument)]
            texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
            modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
            if (opens and not any("b" in mode for mode in modes)) or (owner and name in ("read_text", "write_text")):
                if not any(keyword.arg == "encoding" for keyword in call.keywords):
                    lacking.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not lacking
