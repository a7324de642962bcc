"""What the rows of an evaluation belong to: fingerprints of metrics, and the settings of callbacks."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from lipsim.evaluation.journal import RowCallback
from lipsim.layers.fingerprint import structure
from lipsim.metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import state_fingerprint


def metric_fingerprint(metric: PerceptualMetric) -> str:
    """SHA-256 over what a metric answers by: its encoder with its weights, the anchor, the bound, how it resizes.

    The same for a metric in memory and for the file that it was loaded from.
    """
    encoder = metric.encoder
    content = {
        "encoder": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "structure": structure(encoder),
        "config": _plain(getattr(encoder, "config", None)),
        "weights": state_fingerprint(encoder.state_dict()),
        "image_size": metric.image_size,
        "anchor": metric.anchor,
        "resize": metric.preprocess.resize,
        "lipschitz": f"{metric.lipschitz:.9g}" if metric.has_bound else None,
    }
    if metric.preprocess.framing != "stretch":  # so that others are called as before there were any
        content["framing"] = metric.preprocess.describe()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def callback_settings(callback: RowCallback) -> dict[str, Any]:
    """A callback's class and the arguments that it was made with, as JSON, without the place that it writes to.

    A callback keeps each argument of its constructor under the argument's name, as estimators of scikit-learn do.

    Raises:
        ValueError: it does not, so that nobody could tell which rows are of the same kind.
    """
    settings = {}
    for name in _arguments(type(callback)):
        if not hasattr(callback, name):
            raise LipsimError(
                f"{type(callback).__name__} does not keep its argument {name}, which tells whether the rows of a run "
                f"that was cut short are of the same kind; set self.{name} in its constructor"
            )
        settings[name] = _plain(getattr(callback, name))
    settings.pop("directory", None)
    return {"class_path": f"{type(callback).__module__}.{type(callback).__qualname__}", "init_args": settings}


def _arguments(cls: type) -> list[str]:
    """Names of the constructor's arguments, those of the classes above included where it hands them on."""
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = list(inspect.signature(vars(parent)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))


def _plain(value: Any) -> Any:
    """A setting as JSON; of a metric its fingerprint, of other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PerceptualMetric):
        return metric_fingerprint(value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
