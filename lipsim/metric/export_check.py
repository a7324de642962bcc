"""Exported files held against the metric that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim import certificates
from lipsim.certificates import geometry
from lipsim.layers.base import evaluation_mode, exact_copy
from lipsim.metric.graphs import GraphName
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.utils.precision import full_precision

Graph = Callable[..., tuple[Tensor, ...]]
RELATIVE = 1e-5  # difference of an exported graph, besides what the rounding of features does
_COUNTS = (1, 7)


@dataclass(frozen=True)
class GraphCheck:
    """One graph beside its metric.

    Attributes:
        graph: its name.
        difference: the largest that was found: of distances and radii relative to these, of features relative to their
            length.
        used: the largest difference in units of what is allowed: 1e-5, relative, and what the ``feature_error`` of the
            metric lets a distance or a radius change by. Of features: their distance to those of float64 in units of
            that error, which certificates cover.
        answers: triplets whose answer is another one though its radius is above 0.
    """

    graph: str
    difference: float
    used: float
    answers: int = 0

    @property
    def passed(self) -> bool:
        """Whether the graph may stand for the metric."""
        return self.used <= 1 and not self.answers

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        answers = f", {self.answers} other answers" if self.answers else ""
        return (
            f"{'ok' if self.passed else 'FAILED':<7}{self.graph:<10} largest relative difference "
            f"{self.difference:.3g}, {self.used:.3g} of what is allowed{answers}"
        )


def check_images(image_size: int, count: int, seed: int = 0) -> Tensor:
    """Images to check with, ``(count, 3, S, S)`` in [0, 1]: of one colour, of noise, and smooth ones, in turn."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    colours[::2] = colours[::2].round()  # saturated, where errors are largest
    images = colours.expand(-1, -1, image_size, image_size).clone()
    images[1::3] = torch.rand(len(images[1::3]), 3, image_size, image_size, generator=generator)
    smooth = torch.rand(len(images[2::3]), 3, 4, 4, generator=generator)
    images[2::3] = torch.nn.functional.interpolate(smooth, size=(image_size, image_size), mode="bilinear")
    return images


@torch.no_grad()
def check_graphs(metric: PerceptualMetric, graphs: Mapping[GraphName, Graph]) -> list[GraphCheck]:
    """Compare graphs with a metric on constant, random and smooth images, and on near-duplicates, one and several.

    Args:
        metric: the metric, on the CPU.
        graphs: by name, functions of images.
    """
    error = metric.feature_error or metric.measure_feature_error(thorough=False)
    with full_precision(), evaluation_mode(metric):
        exact = exact_copy(metric.encoder)
        compare = {"distance": _distance, "embedding": _embedding, "radius": _radius}
        return [compare[name](metric, exact, graph, error) for name, graph in graphs.items()]


def _batches(metric: PerceptualMetric, images: int) -> list[tuple[Tensor, ...]]:
    """For each size of a batch, ``images`` batches; in the last ones the second is a near-duplicate of the first."""
    found = []
    for count in _COUNTS:
        x = check_images(metric.image_size, images * count, seed=count).to(metric.dtype)
        batches = x.chunk(images)
        found.append(tuple(batches))
        if images > 1:
            near = (batches[0] + 0.02 * (batches[1] - batches[0])).clamp(0, 1)
            found.append((batches[0], near, *batches[2:]))
    return found


def _distance(metric: PerceptualMetric, exact: Any, graph: Graph, error: float) -> GraphCheck:
    difference = used = 0.0
    for x, y in _batches(metric, 2):
        (found,) = graph(x, y)
        z, z_other = (exact(images.double()) for images in (x, y))
        true = geometry.cosine_distance(z, z_other, metric.anchor)
        off = (found.double() - true).abs()
        # Both vectors turn by at most error/‖e‖, and d = s²/2 of their chord s.
        turn = sum(error / geometry.anchored_norm(f, metric.anchor) for f in (z, z_other))
        allowed = RELATIVE * true + (2 * true).sqrt() * turn + turn**2 / 2
        difference = max(difference, float((off / true.clamp(min=1e-12)).max()))
        used = max(used, float((off / allowed).max()))
    return GraphCheck("distance", difference, used)


def _embedding(metric: PerceptualMetric, exact: Any, graph: Graph, error: float) -> GraphCheck:
    difference = used = 0.0
    for (x,) in _batches(metric, 1):
        (found,) = graph(x)
        true = exact(x.double())
        off = torch.linalg.vector_norm(found.double() - true, dim=-1)
        difference = max(difference, float((off / torch.linalg.vector_norm(true, dim=-1)).max()))
        used = max(used, float((off / error).max()) if error else float(off.max() > 0))
    return GraphCheck("embedding", difference, used)


def _radius(metric: PerceptualMetric, exact: Any, graph: Graph, error: float) -> GraphCheck:
    difference = used = 0.0
    answers = 0
    options = metric.certificate_options
    for images in _batches(metric, 3):
        radius, prefers_left = graph(*images)
        z, z0, z1 = (exact(x.double()) for x in images)
        true = certificates.reference_radius(z, z0, z1, **options)
        # What the radius loses where features are off by one more error is what it may differ by.
        wider = {**options, "feature_error": options["feature_error"] + error}
        slack = true - certificates.reference_radius(z, z0, z1, **wider)
        off = (radius - true).abs()
        certain = true > 0
        difference = max(difference, float((off / true)[certain].max()) if certain.any() else 0.0)
        used = max(used, float((off / (RELATIVE * true + slack)).nan_to_num().max()))
        left = certificates.margin(z, z0, z1, anchor=metric.anchor) > 0
        answers += int(((left != prefers_left) & certain & (radius > 0)).sum())
    return GraphCheck("radius", difference, used, answers)


def check_onnx(metric: PerceptualMetric, files: Mapping[GraphName, Path]) -> list[GraphCheck]:
    """:func:`check_graphs` of files of :func:`lipsim.metric.onnx.export_onnx`, in onnxruntime.

    Raises:
        ValueError: onnxruntime is not installed.
    """
    from lipsim.metric.onnx import OnnxGraph

    return check_graphs(metric, {name: OnnxGraph(file) for name, file in files.items()})


def check_torch(metric: PerceptualMetric, files: Mapping[GraphName, Path]) -> list[GraphCheck]:
    """:func:`check_graphs` of files of :func:`lipsim.metric.torch_export.export_torch`."""
    from lipsim.metric.torch_export import TorchGraph

    return check_graphs(metric, {name: TorchGraph(file) for name, file in files.items()})


def check_metric(metric: PerceptualMetric, other: PerceptualMetric) -> list[GraphCheck]:
    """:func:`check_graphs` of another metric, as one that was folded, written and loaded; of tiles, of one of them."""
    if isinstance(metric, TiledMetric) and isinstance(other, TiledMetric):
        return check_metric(metric.tile, other.tile)

    def radius(*images: Tensor) -> tuple[Tensor, Tensor]:
        certificate = other.certify(*images)
        return certificate.radius, certificate.prefers_left

    graphs: dict[GraphName, Graph] = {
        "distance": lambda x, y: (other(x, y),),
        "embedding": lambda x: (other.embed(x),),
    }
    if metric.has_bound:
        graphs["radius"] = radius
    return check_graphs(metric, graphs)
