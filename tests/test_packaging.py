"""What is written twice agrees: the version, and the files that the documents name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from lipsim import __version__, load
from lipsim.metric.files import BUNDLED
from lipsim.utils.files import state_fingerprint

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "SECURITY.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    names = re.findall(r"`((?:\.ci|lipsim|tests|docs|benchmarks|configs)/[^`\s]*)", text)
    assert names
    for name in names:
        assert "NAME" in name or "FAMILY" in name or (ROOT / name).exists(), name


def test_every_dependency_has_a_lower_bound_and_a_version_that_was_tested() -> None:
    """jsonargparse[signatures]>=4.40 and jsonargparse==4.53.0, for example."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tested = {_name(pin) for pin in content["tool"]["uv"]["constraint-dependencies"]}
    for requirement in content["project"]["dependencies"]:
        assert ">=" in requirement, requirement
        assert _name(requirement) in tested, requirement


def test_every_dependency_has_a_reason() -> None:
    """Behind it, or in the lines above it for a group of them."""
    sections = re.split(r"^\[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    known = ("project]", "project.optional-dependencies]", "dependency-groups]")
    lines = [line for part in sections if part.startswith(known) for line in part.splitlines()]
    assert len([line for line in lines if re.search(r'"[\w-]+[^"]*[<>=]=?[\d.]+', line)]) > 40
    reason = False
    for line in lines:
        if re.match(r'\s*"[\w-]+(\[[\w,]+\])?[<>=][^"]*",?\s*$', line):
            assert reason, line
        else:  # of those that follow, where it stands alone or begins a list
            reason = bool(re.match(r"\s*#|.*\[\s+#", line))


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=]", requirement)[0].replace("_", "-")


@pytest.mark.parametrize("file", sorted(BUNDLED.glob("*.safetensors")), ids=lambda file: file.stem)
def test_the_card_of_a_bundled_metric_is_of_its_file(file: Path) -> None:
    metric = load(file.stem)
    _, _, card = (ROOT / "checkpoints/README.md").read_text(encoding="utf-8").partition(f"## {file.name}\n")
    card, _, _ = card.partition("\n## ")
    assert f"`{state_fingerprint(metric.encoder.state_dict())}`" in card
    assert f"audited Lipschitz bound: {metric.lipschitz:.8f};" in card
    assert f"covered by certificates: {metric.declared_feature_error:.1e}" in card
