"""Where files that come with the package are found: in a clone, and in an installed wheel."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest

from lipsim.results import commit
from lipsim.utils.paths import clone, find_config, packaged

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel lays it out, beside a folder that another package brought."""
    site = tmp_path / "site-packages"
    for folder in ("lipsim/configs/nights", "lipsim/checkpoints", "configs"):
        (site / folder).mkdir(parents=True)
    (site / "lipsim/configs/nights/finetune.yaml").touch()
    monkeypatch.setattr(importlib.resources, "files", lambda package: site / package)
    return site / "lipsim"


def test_files_lie_at_the_top_of_a_clone() -> None:
    assert clone() == ROOT
    assert packaged("checkpoints") == ROOT / "checkpoints"


def test_files_lie_inside_an_installed_package(installed: Path) -> None:
    assert clone() is None
    assert packaged("configs") == installed / "configs"
    assert find_config("nights/finetune") == installed / "configs/nights/finetune.yaml"


@pytest.mark.usefixtures("installed")
def test_an_installed_package_has_no_commit() -> None:
    """Its environment may lie in the repository of another project, whose commit says nothing about it."""
    assert commit() is None


@pytest.mark.parametrize("name", ["nights/finetune", "nights/finetune.yaml", "./configs/nights/finetune.yaml"])
def test_packaged_configs_have_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "configs/nights/finetune.yaml"
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.touch()
    assert find_config(name) == Path(name)


@pytest.mark.parametrize("name", ["nights", "nights/finetun", "/configs/nights/finetune.yaml", "../nights/finetune"])
def test_other_names_are_refused_with_a_list(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no config {name}; .* bapps/finetune, .* table/finetune$"):
        find_config(name)
