"""Where numbers come from: versions of packages, and the commit of the code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from lipsim.utils.paths import clone
from lipsim.utils.version import __version__

_PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "lipsim": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Commit of the clone this runs from, with "+changes" where it was edited; None for an installed package."""
    here = clone()  # an installed package may lie in the repository of another project
    if here is None:
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
