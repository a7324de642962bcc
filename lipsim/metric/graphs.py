"""What a metric computes as plain graphs of tensors: distance, embedding and certified radius, for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lipsim.certificates.rounding import rounding_error
from lipsim.layers import exact_copy, explicit_copy
from lipsim.layers.encoder import dtype_of
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.teachers.lora_tuning import merged
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import state_fingerprint
from lipsim.utils.version import __version__

GraphName = Literal["distance", "embedding", "radius"]


@dataclass(frozen=True)
class Signature:
    """Names of the inputs, images ``(N, 3, S, S)``, and of the outputs of a graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


GRAPHS: dict[GraphName, Signature] = {
    "distance": Signature(("x", "y"), ("distance",)),
    "embedding": Signature(("x",), ("features",)),
    "radius": Signature(("reference", "left", "right"), ("radius", "prefers_left")),
}


class _Doubled(nn.Module):
    """An encoder in float64 that takes images of any floating-point dtype."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = exact_copy(encoder)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x.double())
        return features


class _Graph(nn.Module):
    """Embeds several batches in one pass, and projects their features in float64."""

    anchor: Tensor

    def __init__(self, encoder: nn.Module, anchor: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.is_anchored = encoder, anchor > 0
        self.constant("anchor", anchor)
        self.dtype = dtype_of(encoder)

    def constant(self, name: str, value: float) -> None:
        """A number in float64: numbers in the code of a graph may become float32 on the way to another runtime."""
        self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def vectors(self, *images: Tensor) -> Tensor:
        """Anchored features ``(z, κ)`` of batches ``(N, 3, S, S)``, ``(batches, N, D + 1)``; ``z`` where κ is 0."""
        z = self.encoder(torch.cat(images)).double()
        z = z.reshape(len(images), -1, z.shape[-1])
        return torch.cat([z, self.anchor.expand(*z.shape[:-1], 1)], -1) if self.is_anchored else z


def _norm_and_unit(e: Tensor) -> tuple[Tensor, Tensor]:
    """``‖e‖``, and ``e/‖e‖``, which is 0 for a vector without a direction."""
    norm = e.square().sum(-1).sqrt()
    return norm, e / torch.where(norm > 0, norm, torch.ones_like(norm)).unsqueeze(-1)


class DistanceGraph(_Graph):
    """Images ``(N, 3, S, S)`` twice to distances ``(N,)``, as :func:`lipsim.certificates.geometry.cosine_distance`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        norm, unit = _norm_and_unit(self.vectors(x, y))
        distance = ((unit[0] - unit[1]).square().sum(-1) / 2).clamp(max=2)
        if not self.is_anchored:
            distance = torch.where((norm == 0).any(0), torch.ones_like(distance), distance)
        return distance.to(self.dtype)


class EmbeddingGraph(_Graph):
    """Images ``(N, 3, S, S)`` to features ``(N, D)``, before anchor and projection."""

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features


class RadiusGraph(_Graph):
    """Images ``(N, 3, S, S)`` thrice to the radius of the reference ``(N,)``, float64, and ``prefers_left``, bool.

    :func:`lipsim.certificates.reference_radius` with its constants in the graph. Optimizers of graphs drop what is
    nearly neutral, even a factor of 1.000003 (within 1e-5 of 1) or a term of 1e-12, and a certificate with it. So no
    constant is near 1 or 0: the bound is part of a factor of a quarter, and what float64 loses is added among numbers
    that are 2⁴⁰ times as large.

    Args:
        encoder: with explicit weights.
        options: keyword arguments of the certificate.
        features: dimension of the features.
    """

    error: Tensor
    rounding: Tensor
    quarter: Tensor

    def __init__(self, encoder: nn.Module, options: dict[str, float], features: int) -> None:
        super().__init__(encoder, options["anchor"])
        self.constant("error", options["feature_error"])
        self.constant("rounding", 2.0**40 * rounding_error(torch.empty(0, features)))
        bound = options["lipschitz"]
        # 16 roundings of float64 are taken off. Features that never move have no answer, and no radius.
        self.constant("quarter", 0.25 * (1 - 2.0**-48) / bound if bound else 0.0)

    def forward(self, reference: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        error, rounding, quarter = self.error, self.rounding, self.quarter
        vectors = self.vectors(reference, left, right)
        (norm, *norms), units = (t.unbind(0) for t in _norm_and_unit(vectors))
        difference = units[1] - units[2]
        along = (vectors[0] * difference).sum(-1)
        slope = (difference[..., :-1] if self.is_anchored else difference).square().sum(-1).sqrt()
        # A unit vector turns by at most η/‖e‖ when e moves by η; ‖e‖ itself is known to η only.
        turns = [error / (candidate - error) * 2.0**40 for candidate in norms]
        beta = (turns[0] + turns[1] + rounding) * 2.0**-40
        slack = error * slope + (norm + error) * beta
        known = (norm > error) & (norms[0] > error) & (norms[1] > error)
        radius = (along.abs() - slack) / (slope + beta) * quarter * 4
        # Not known where NaN, which is above nothing; ∞ has no digits.
        positive = known & (slope > 0) & (radius > 0) & torch.isfinite(radius)
        return torch.where(positive, radius, torch.zeros_like(radius)), along > 0


@dataclass(frozen=True)
class MetricGraphs:
    """The graphs of a metric, and what a file of one says beside it.

    Attributes:
        modules: the name of a graph → a module with explicit weights, in evaluation mode.
        metadata: constants that are baked in, and what the images have to be (text).
        image: an image of the shape and dtype that they take, ``(3, S, S)``.
    """

    modules: dict[GraphName, nn.Module]
    metadata: dict[str, str]
    image: Tensor

    def example(self, name: GraphName, count: int = 2) -> tuple[Tensor, ...]:
        """Inputs of a graph."""
        return tuple(self.image.repeat(count, 1, 1, 1) for _ in GRAPHS[name].inputs)


def default_graphs(metric: PerceptualMetric) -> tuple[GraphName, ...]:
    """All graphs that a metric has: a radius where there is a Lipschitz bound."""
    return tuple(name for name in GRAPHS if name != "radius" or metric.has_bound)


def metric_graphs(
    metric: PerceptualMetric, names: tuple[GraphName, ...] | None = None, *, double: bool = False
) -> MetricGraphs:
    """The graphs of a metric, on the CPU, with explicit weights.

    They take images as they come out of ``metric.preprocess``, of any number, and do not look at their values: whoever
    runs them has to keep these in [0, 1].

    Args:
        metric: the metric.
        names: among "distance", "embedding" and "radius"; None: all that it has.
        double: compute in float64 inside, with the same weights: twice the time, and the results of exact arithmetic
            to a relative 1e-9; those in float32 differ by how each runtime rounds.

    Raises:
        ValueError: a radius of a metric without a bound, weights in half precision, or a metric of another class.
    """
    if type(metric) is not PerceptualMetric:
        raise LipsimError(
            f"a {type(metric).__name__} has no graphs: its distance and its radius are not those of one embedding with "
            "an anchor; export the metric that it is made of, of tiles metric.tile (--framing stretch)"
        )
    names = default_graphs(metric) if names is None else names
    unknown = [name for name in names if name not in GRAPHS]
    if unknown or not names:
        raise LipsimError(f"expected graphs among {', '.join(GRAPHS)}, got {', '.join(unknown) or 'none'}")
    if "radius" in names and not metric.has_bound:
        raise LipsimError("the metric has no Lipschitz bound, so there is no radius; export distance and embedding")
    metric.check_precision()
    options = metric.certificate_options if metric.has_bound else {}
    encoder = explicit_copy(merged(metric.encoder)).to("cpu")
    encoder = _Doubled(encoder) if double else encoder
    image = torch.full((3, metric.image_size, metric.image_size), 0.5, dtype=metric.dtype)
    with torch.no_grad():
        features = encoder(image.unsqueeze(0)).shape[-1]
    build: dict[GraphName, Any] = {
        "distance": lambda: DistanceGraph(encoder, metric.anchor),
        "embedding": lambda: EmbeddingGraph(encoder),
        "radius": lambda: RadiusGraph(encoder, options, features),
    }
    metadata: dict[str, Any] = {
        "lipsim_version": __version__,
        "encoder": type(metric.encoder).__name__,
        "state_sha256": state_fingerprint(metric.encoder.state_dict()),
        "arithmetic": "float64" if double else str(metric.dtype).removeprefix("torch."),
        "anchor": metric.anchor,
        "images": f"(N, 3, {metric.image_size}, {metric.image_size}), RGB, values in [0, 1], which is not checked",
        "preprocess": metric.preprocess,
    }
    if metric.has_bound:
        metadata |= {"lipschitz": options["lipschitz"], "feature_error": options["feature_error"] / 2}
    return MetricGraphs(
        modules={name: build[name]().eval() for name in names},
        metadata={name: str(value) for name, value in metadata.items()},
        image=image,
    )
