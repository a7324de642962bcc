"""Teachers: encoders whose embedding a 1-Lipschitz student learns to follow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipsim.teachers.branch import BranchConfig
    from lipsim.teachers.dreamsim import DreamSim, Ensemble
    from lipsim.teachers.efficientnet_lite import EfficientNetLite
    from lipsim.teachers.named import named_teacher
    from lipsim.teachers.vit import SmallViT

__all__ = ["BranchConfig", "DreamSim", "EfficientNetLite", "Ensemble", "SmallViT", "named_teacher"]

# Loaded at first use: timm takes seconds to import, and a student that is loaded for use needs none.
_HOMES = {
    "BranchConfig": "branch",
    "DreamSim": "dreamsim",
    "EfficientNetLite": "efficientnet_lite",
    "Ensemble": "dreamsim",
    "SmallViT": "vit",
    "named_teacher": "named",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
