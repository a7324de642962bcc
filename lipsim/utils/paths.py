"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path with ``~`` for the home folder, which no shell replaces in ``--option=~/x``, in YAML or in Python."""
    return Path(os.path.expanduser(path))
