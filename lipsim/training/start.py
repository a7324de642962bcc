"""What a stage begins with: an encoder given by class, or that of an exported metric."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from lipsim.data import Preprocess
from lipsim.layers.encoder import ResizingEncoder, declared_image_size
from lipsim.metric import PerceptualMetric, TiledMetric, load
from lipsim.students.folded_network import FoldedNetwork
from lipsim.utils.errors import LipsimError


class Start(NamedTuple):
    """What a stage begins with.

    Attributes:
        encoder: that it trains.
        images: how images come to it, stretched and by a resize in "float" where nobody says.
        anchor: of the metric it is from; None of a new encoder.
    """

    encoder: nn.Module
    images: Preprocess
    anchor: float | None


def start_from(module: nn.Module | None, path: str | Path | None, role: str) -> Start:
    """The encoder that a stage trains: one given by class, or one loaded from an exported metric.

    Raises:
        ValueError: both are given, or none; or a metric of tiles, which are not trained on.
    """
    if (module is None) == (path is None):
        raise LipsimError(
            f"expected either a {role} (class_path and init_args) or a file to start from, not both or none"
        )
    if module is not None:
        resize = module.resize if isinstance(module, ResizingEncoder) else "float"
        return Start(module, Preprocess(image_size_of(module), resize), None)
    assert path is not None
    metric = load(path)
    if isinstance(metric, TiledMetric):
        raise LipsimError(
            f"{path} is a metric of tiles, and stages train on whole images; save the metric of a tile first: "
            "lipsim.metric.save(lipsim.load(path, framing='stretch'), other_path)"
        )
    return Start(metric.encoder.train().requires_grad_(True), metric.preprocess, metric.anchor)


def student_metric(student: nn.Module | None, path: str | Path | None, anchor: float | None) -> PerceptualMetric:
    """The metric that a stage trains, of a student given by class or of an exported metric.

    Args:
        student: the encoder.
        path: the file to start from instead.
        anchor: constant coordinate; None: that of the file, 1 of a student.

    Raises:
        ValueError: as of :func:`start_from`, or the anchor is none; or folded weights, which nothing keeps 1-Lipschitz.
    """
    encoder, images, own = start_from(student, path, "student")
    if any(isinstance(module, FoldedNetwork) for module in encoder.modules()):
        raise LipsimError(
            f"the weights of {path or 'the student'} are folded, and nothing would keep them 1-Lipschitz in training; "
            "start from the metric that was folded"
        )
    anchor = anchor if anchor is not None else 1.0 if own is None else own
    size = image_size_of(encoder)
    return PerceptualMetric(encoder, size, anchor=anchor, resize=images.resize, framing=images.framing)


def image_size_of(encoder: nn.Module) -> int:
    """Side of the images that an encoder takes, its attribute ``image_size``.

    Raises:
        ValueError: it has none.
    """
    size = declared_image_size(encoder)
    if not isinstance(size, int):
        raise LipsimError(f"{type(encoder).__name__} needs an attribute image_size, the side of the images it takes")
    return size
