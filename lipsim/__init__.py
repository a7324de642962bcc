"""Certifiably robust perceptual similarity metrics.

Importing this loads nothing else, torch neither: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lipsim.utils.version import __version__

if TYPE_CHECKING:
    from lipsim import (
        attacks,
        audit,
        callbacks,
        certificates,
        data,
        datamodules,
        evaluation,
        layers,
        metric,
        results,
        students,
        teachers,
        training,
    )
    from lipsim.callbacks.run_evaluation import evaluate
    from lipsim.certificates import TwoAFCCertificate
    from lipsim.certificates.errors import LipsimError
    from lipsim.metric import PerceptualMetric, load
    from lipsim.metric.torchmetric import LipSimilarity
    from lipsim.training.run import train

__all__ = [
    "LipSimilarity",
    "LipsimError",
    "PerceptualMetric",
    "TwoAFCCertificate",
    "__version__",
    "attacks",
    "audit",
    "callbacks",
    "certificates",
    "data",
    "datamodules",
    "evaluate",
    "evaluation",
    "layers",
    "load",
    "metric",
    "results",
    "students",
    "teachers",
    "train",
    "training",
]

_HOMES = {
    "LipSimilarity": "lipsim.metric.torchmetric",
    "LipsimError": "lipsim.certificates.errors",
    "PerceptualMetric": "lipsim.metric",
    "TwoAFCCertificate": "lipsim.certificates",
    "evaluate": "lipsim.callbacks.run_evaluation",
    "load": "lipsim.metric",
    "train": "lipsim.training.run",
}


def __getattr__(name: str) -> Any:
    """A public name, from the room that defines it; a room, as a module."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"lipsim.{name}")
    else:
        raise AttributeError(f"module 'lipsim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
