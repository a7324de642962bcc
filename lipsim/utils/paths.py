"""Paths as users write them, and the files that come with the package."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path with ``~`` for the home folder, which no shell replaces in ``--option=~/x``, in YAML or in Python."""
    return Path(os.path.expanduser(path))


def clone() -> Path | None:
    """The clone of the repository that the package is run from; None for an installed wheel."""
    root = Path(str(importlib.resources.files("lipsim"))).parent
    # A wheel lies among other packages, and any of them may have brought a folder of the same name.
    return root if (root / "pyproject.toml").is_file() and (root / "configs").is_dir() else None


def packaged(folder: str) -> Path:
    """A folder that comes with the package: ``configs`` or ``checkpoints``.

    They lie at the top of the repository, and inside the package in a wheel.
    """
    return (clone() or Path(str(importlib.resources.files("lipsim")))) / folder


def find_config(name: str | Path) -> Path:
    """A config file, or else the packaged one of that name.

    Args:
        name: a path, or a packaged config as ``nights/finetune`` or ``configs/nights/finetune.yaml``.

    Raises:
        FileNotFoundError: neither; the message lists the packaged configs.
    """
    file, configs = user_path(name), packaged("configs")
    if file.is_file():
        return file
    known = {path.relative_to(configs).with_suffix("").as_posix(): path for path in configs.rglob("*.yaml")}
    key = file.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if key not in known:
        raise FileNotFoundError(f"no config {name}; those that come with lipsim are {', '.join(sorted(known))}")
    return known[key]
