"""Metrics made of two others without training: their features side by side, or one network with both's mean weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lipsim.certificates.numbers import check_number
from lipsim.layers import OrthogonalLinear, OrthogonalPatches, ParallelMixing, freeze
from lipsim.layers.encoder import declared_image_size
from lipsim.metric.encoders import encoder_class, encoder_name, registered_names
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


def join(first: PerceptualMetric, second: PerceptualMetric, share: float = 0.5) -> PerceptualMetric:
    """A metric that sees what either of two does: their features side by side, ``(√(1 − s)·f(x), √s·g(x))``.

    Squared distances of features are ``(1 − s)·‖f(x) − f(y)‖² + s·‖g(x) − g(y)‖²``, and the map is 1-Lipschitz where
    both are, so that it is certified as any other. Features of different lengths weigh by these, too: whose are twice
    as long counts four times its share. It can be trained further, the shares as well.

    Args:
        first: a metric ``f``, whose anchor the joined one has.
        second: a metric ``g`` of images of the same size, brought to it in the same way.
        share: ``s`` in (0, 1), of the second.

    Returns:
        A metric with weights of its own, frozen; without a bound where one of the two has none.

    Raises:
        ValueError: metrics of other images than each other's or of tiles, in other dtypes or on other devices, an
            encoder of a class that no file can name, or a share out of range.

    Example:
        >>> import lipsim
        >>> both = join(lipsim.load("photos"), lipsim.load("scattering"), share=0.5)
        >>> f"{both.lipschitz:.4f}", both.embed(torch.rand(2, 3, 64, 64)).shape
        ('1.0000', torch.Size([2, 6592]))
    """
    _check_alike(first, second)
    encoder = JoinedEncoder(deepcopy(first.encoder), deepcopy(second.encoder), share)
    encoder.to(first.device, first.dtype)
    return _metric_like(first, encoder, bounded=first.has_bound and second.has_bound)


def average_weights(first: PerceptualMetric, second: PerceptualMetric, share: float = 0.5) -> PerceptualMetric:
    """One network with the mean of two networks' weights, ``(1 − s)·θ₁ + s·θ₂`` (Wortsman et al. 2022, "Model soups").

    Useful between two stages of one training, or two that continue the same one: with a share of each it is often
    better than either, at the cost of one. Of orthogonal layers the matrices count that their parameters stand for, and
    the mean of two is the orthonormal matrix nearest to their arithmetic mean, so that no layer shrinks what it keeps.

    Args:
        first: a metric.
        second: a metric with an encoder of the same class and arguments.
        share: ``s`` in (0, 1), of the second.

    Returns:
        A metric with weights of its own, frozen, with the anchor of the first.

    Raises:
        ValueError: networks that differ in more than weights, metrics of other images than each other's or of tiles, in
            other dtypes or on other devices, or a share out of range.

    Example:
        >>> from lipsim.students import OrthogonalProjection
        >>> one, other = (PerceptualMetric(OrthogonalProjection(8, 4), image_size=8) for _ in range(2))
        >>> f"{average_weights(one, other).lipschitz:.4f}"
        '1.0000'
    """
    share = _checked_share(share)
    _check_alike(first, second)
    kinds = [(type(metric.encoder), getattr(metric.encoder, "config", None)) for metric in (first, second)]
    states = [metric.encoder.state_dict() for metric in (first, second)]
    if kinds[0] != kinds[1] or _shapes(states[0]) != _shapes(states[1]):
        raise LipsimError(
            "expected two networks of one class and with the same arguments, got "
            f"{kinds[0][0].__name__} of {kinds[0][1]} and {kinds[1][0].__name__} of {kinds[1][1]}"
        )
    encoder = deepcopy(first.encoder)
    modules = [dict(metric.encoder.named_modules()) for metric in (first, second)]
    with torch.no_grad():
        for name, module in encoder.named_modules():
            pairs = zip(_weights(modules[0][name]), _weights(modules[1][name]), strict=True)
            for (key, one), (_, other) in pairs:
                mean = one.double().lerp(other.double(), share)
                if _is_orthogonal(module) and key != "bias":
                    mean = _nearest_orthonormal(mean.flatten(1)).view_as(mean)
                getattr(module, key).copy_(mean)
    for name, buffer in encoder.named_buffers():
        if not torch.equal(buffer, second.encoder.get_buffer(name)):
            raise LipsimError(f"expected networks that differ in their parameters alone, and {name} is none")
    return _metric_like(first, encoder, bounded=first.has_bound)


def _described(encoder: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """What builds an encoder again, as the header of a metric says it."""
    if isinstance(encoder, Mapping):
        return dict(encoder)
    if (kind := encoder_name(encoder)) is None:
        raise LipsimError(
            f"cannot join an encoder of class {type(encoder).__name__}, which no file can name; register it by "
            "lipsim.metric.register_encoder"
        )
    return {"encoder": kind, "config": encoder.config}


@records_arguments(first=_described, second=_described)
class JoinedEncoder(ParallelMixing):
    """Two encoders side by side, ``(N, 3, S, S) → (N, D + D')``; see :func:`join`.

    Args:
        first: an encoder of a class that files can name, or its name and arguments.
        second: another one for images of the same size.
        share: of the second in squared distances, at the start; the angle ``asin √share`` is learned.

    Raises:
        ValueError: encoders for images of other sizes than each other's, without a name, or a share out of range.
    """

    config: dict[str, Any]

    def __init__(
        self, first: nn.Module | Mapping[str, Any], second: nn.Module | Mapping[str, Any], share: float = 0.5
    ) -> None:
        share = _checked_share(share)
        both = [_built(first), _built(second)]
        sizes = [declared_image_size(encoder) for encoder in both]
        if None not in sizes and sizes[0] != sizes[1]:
            raise LipsimError(f"expected encoders for images of one size, got {sizes[0]} and {sizes[1]} pixels")
        super().__init__(both[0], both[1], angle=math.asin(math.sqrt(share)))
        self.image_size = sizes[1] if sizes[0] is None else sizes[0]
        widths: list[Any] = [getattr(encoder, "out_features", None) for encoder in both]
        if None not in widths:
            self.out_features: int = sum(widths)

    def of(self, first: nn.Module, second: nn.Module) -> JoinedEncoder:
        """Other encoders joined at the same angle."""
        joined = JoinedEncoder(first, second, self.config["share"])
        joined.angle = nn.Parameter(self.angle.detach().clone(), requires_grad=self.angle.requires_grad)
        return joined.train(self.training)


def _built(encoder: nn.Module | Mapping[str, Any]) -> nn.Module:
    if isinstance(encoder, nn.Module):
        return encoder
    if (name := encoder["encoder"]) not in registered_names():
        raise LipsimError(
            f"it joins the encoder {name}, which this version does not have; update lipsim, or import the module that "
            "registers it first"
        )
    return encoder_class(name)(**encoder["config"])


def _checked_share(share: float) -> float:
    """A share of two, in (0, 1).

    Raises:
        ValueError: it is something else.
    """
    share = check_number("share", share, above=True, most=1)
    if share == 1:
        raise LipsimError("expected share to be below 1, got 1")
    return share


def _check_alike(first: PerceptualMetric, second: PerceptualMetric) -> None:
    for metric in (first, second):
        if isinstance(metric, TiledMetric):
            raise LipsimError("expected metrics of whole images; combine those of one tile, TiledMetric.tile")
    views = [
        (metric.image_size, metric.preprocess.resize, metric.preprocess.framing, metric.dtype, metric.device)
        for metric in (first, second)
    ]
    if views[0] != views[1]:
        shown = [", ".join(map(str, view)) for view in views]
        raise LipsimError(
            "expected two metrics that see images in the same way, with the same size, resize, framing, dtype and "
            f"device, got {shown[0]} and {shown[1]}"
        )


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The own parameters of a module; of an orthogonal one the matrix that it multiplies by."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, module.weights()[0] if _is_orthogonal(module) and name != "bias" else parameter


def _is_orthogonal(module: nn.Module) -> TypeGuard[OrthogonalLinear | OrthogonalPatches]:
    return isinstance(module, OrthogonalLinear | OrthogonalPatches)


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor, nearest to a matrix in the Frobenius norm."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = left @ right
    return factor


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _metric_like(first: PerceptualMetric, encoder: nn.Module, *, bounded: bool) -> PerceptualMetric:
    metric = PerceptualMetric(
        encoder,
        first.image_size,
        anchor=first.anchor,
        lipschitz=None if bounded else math.inf,
        resize=first.preprocess.resize,
        framing=first.preprocess.framing,
    )
    metric.requires_grad_(False)
    freeze(metric)
    if bounded:
        metric.require_feature_error(0.0)
    return metric
