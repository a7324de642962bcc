"""Metrics made of two others without training: their features side by side, or one network with both's mean weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.audit import UnboundedModuleError
from lipsim.certificates.numbers import check_number
from lipsim.layers import OrthogonalLinear, OrthogonalPatches, ParallelMixing, evaluation_mode, freeze
from lipsim.layers.encoder import declared_image_size
from lipsim.metric.distance import require_metric
from lipsim.metric.encoders import encoder_class, encoder_name, registered_names
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.students import FoldedNetwork
from lipsim.teachers.lora_tuning import merged
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError

# Joins of joins: a file may ask for any number, and each is audited with all that is in it.
DEEPEST = 8


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
        A metric with weights of its own, frozen. Its bound is audited, or where the audit finds none the larger of the
        two, which holds for every share; without one where one of the two has none. It covers as much rounding as the
        two do.

    Raises:
        ValueError: metrics of other images than each other's or of tiles, in other dtypes or in half precision, on
            other devices, an encoder of a class that no file can name or that changes its input in place, or a share
            out of range.

    Example:
        >>> import lipsim
        >>> both = join(lipsim.load("photos"), lipsim.load("scattering"), share=0.5)
        >>> f"{both.lipschitz:.4f}", both.embed(torch.rand(2, 3, 64, 64)).shape
        ('1.0000', torch.Size([2, 6592]))
    """
    share = checked_share(share)
    check_alike(first, second)
    for metric in (first, second):
        _check_keeps_input(metric)
    encoder = JoinedEncoder(deepcopy(first.encoder), deepcopy(second.encoder), share)
    encoder.to(first.device, first.dtype)
    if not (first.has_bound and second.has_bound):
        return _metric_like(first, encoder, math.inf)
    error = encoder.combine([first.feature_error, second.feature_error])
    try:
        return _metric_like(first, encoder, None, error)
    except UnboundedModuleError:
        # Of any angle: a bound that is declared does not follow one that is trained.
        return _metric_like(first, encoder, encoder.combine(2 * [max(first.lipschitz, second.lipschitz)]), error)


def average_weights(first: PerceptualMetric, second: PerceptualMetric, share: float = 0.5) -> PerceptualMetric:
    """One network with the mean of two networks' weights, ``(1 − s)·θ₁ + s·θ₂`` (Wortsman et al. 2022, "Model soups").

    For two stages of one training, or two that continue the same one: a dial between them, at the cost of one network.
    Of orthogonal layers the matrices count that their parameters stand for, and the mean of two is the orthonormal
    matrix nearest to their arithmetic mean, so that no layer shrinks what it keeps. Other parameters are averaged as
    they are.

    Args:
        first: a metric.
        second: a metric with an encoder of the same class and arguments.
        share: ``s`` in (0, 1), of the second.

    Returns:
        A metric with weights of its own, frozen, with the anchor of the first.

    Raises:
        ValueError: networks that differ in more than weights, or whose derived weights are folded for good; metrics of
            other images than each other's or of tiles, in other dtypes or in half precision, on other devices; or a
            share out of range.
        lipsim.audit.UnboundedModuleError: the first metric has a bound, and the audit finds none for the mean.

    Example:
        >>> from lipsim.students import OrthogonalProjection
        >>> one, other = (PerceptualMetric(OrthogonalProjection(8, 4), image_size=8) for _ in range(2))
        >>> f"{average_weights(one, other).lipschitz:.4f}"
        '1.0000'
    """
    share = checked_share(share)
    check_alike(first, second)
    own, others = (merged(metric.encoder) for metric in (first, second))  # factors of LoRA have no mean of their own
    _check_same_network(own, others)
    encoder = deepcopy(own)
    with torch.no_grad():
        for module, one, other in zip(encoder.modules(), own.modules(), others.modules(), strict=True):
            for (name, weight), (_, another) in zip(_weights(one), _weights(other), strict=True):
                mean = weight.double().lerp(another.double(), share)
                if name == _matrix_of(module):
                    mean = _nearest_orthonormal(mean.flatten(1)).view_as(mean)
                module.get_parameter(name).copy_(mean)
    if not first.has_bound:
        return _metric_like(first, encoder, math.inf)
    return _metric_like(first, encoder, None, max(first.feature_error, second.feature_error))


def checked_share(share: float) -> float:
    """A share of two, in (0, 1).

    Raises:
        ValueError: it is something else.
    """
    share = check_number("share", share, above=True, most=1)
    if share == 1:
        raise LipsimError("expected share to be below 1, got 1")
    return share


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


@records_arguments(first=_described, second=_described, share=float)
class JoinedEncoder(ParallelMixing):
    """Two encoders side by side, ``(N, 3, S, S) → (N, D + D')``; see :func:`join`.

    Args:
        first: an encoder of a class that files can name, or its name and arguments.
        second: another one for images of the same size.
        share: of the second in squared distances, at the start; the angle ``asin √share`` is learned.

    Raises:
        ValueError: encoders for images of other sizes than each other's, without a name, joined more than
            :data:`DEEPEST` times over, or a share out of range.
    """

    config: dict[str, Any]
    depth: int

    def __init__(
        self, first: nn.Module | Mapping[str, Any], second: nn.Module | Mapping[str, Any], share: float = 0.5
    ) -> None:
        share = checked_share(share)
        both = [_built(first), _built(second)]
        depth = 1 + max(encoder.depth if isinstance(encoder, JoinedEncoder) else 0 for encoder in both)
        if depth > DEEPEST:
            raise LipsimError(f"expected metrics that are joined at most {DEEPEST} times over, got {depth}")
        sizes = [declared_image_size(encoder) for encoder in both]
        if None not in sizes and sizes[0] != sizes[1]:
            raise LipsimError(f"expected encoders for images of one size, got {sizes[0]} and {sizes[1]} pixels")
        super().__init__(both[0], both[1], angle=math.asin(math.sqrt(share)))
        self.depth = depth
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


def check_alike(first: PerceptualMetric, second: PerceptualMetric) -> None:
    """Refuse two metrics that cannot see the same images.

    Raises:
        ValueError: metrics of other images than each other's or of tiles, in other dtypes or in half precision, on
            other devices.
    """
    require_metric(first, second)
    for metric in (first, second):
        if isinstance(metric, TiledMetric):
            raise LipsimError("expected metrics of whole images; combine those of one tile (TiledMetric.tile)")
    views = [
        (metric.image_size, metric.preprocess.resize, metric.preprocess.framing, metric.dtype, metric.device)
        for metric in (first, second)
    ]
    if first.dtype in (torch.float16, torch.bfloat16):
        raise LipsimError("expected metrics in float32 or float64; combine them so, and call .half() on the result")
    if views[0] != views[1]:
        shown = [", ".join(map(str, view)) for view in views]
        raise LipsimError(
            "expected two metrics that see images in the same way, with the same size, resize, framing, dtype and "
            f"device, got {shown[0]} and {shown[1]}"
        )


def _check_keeps_input(metric: PerceptualMetric) -> None:
    """Two encoders read the same images; one of torch's in-place layers at the start of the first would change them."""
    size = metric.image_size
    images = torch.linspace(0, 1, 3 * size**2, device=metric.device, dtype=metric.dtype).view(1, 3, size, size)
    given = images.clone()
    with torch.no_grad(), evaluation_mode(metric.encoder):
        metric.encoder(given)
    if not torch.equal(given, images):
        raise LipsimError(f"this {type(metric.encoder).__name__} changes its input in place; give it a copy of that")


def _check_same_network(first: nn.Module, second: nn.Module) -> None:
    """Refuse two networks that differ in more than parameters, or whose parameters do not say what they stand for."""
    for encoder in (first, second):
        if any(isinstance(module, FoldedNetwork) for module in encoder.modules()):
            raise LipsimError(
                "expected networks that derive their weights, got a FoldedNetwork: a mean of folded weights is no "
                "orthogonal layer's; combine the metrics that were folded"
            )
    kinds = [
        [(name, type(module), module.extra_repr()) for name, module in encoder.named_modules()]
        for encoder in (first, second)
    ]
    shapes = [{name: tensor.shape for name, tensor in encoder.state_dict().items()} for encoder in (first, second)]
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        shown = [f"{type(encoder).__name__} of {getattr(encoder, 'config', None)}" for encoder in (first, second)]
        raise LipsimError(
            f"expected two networks of one class and with the same arguments, got {shown[0]} and {shown[1]}"
        )
    others = dict(second.named_buffers())
    for name, buffer in first.named_buffers():
        if not torch.equal(buffer, others[name]):
            raise LipsimError(f"expected networks that differ in their parameters alone, and {name} is none")


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The own parameters of a module; of an orthogonal one the matrix that it multiplies by."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, module.weights()[0] if name == _matrix_of(module) else parameter  # type: ignore[operator]


def _matrix_of(module: nn.Module) -> str | None:
    """The parameter that stands for an orthonormal matrix; None where there is none."""
    if isinstance(module, OrthogonalLinear):
        return "weight"
    return "kernel" if isinstance(module, OrthogonalPatches) else None


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor, nearest to a matrix in the Frobenius norm."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = left @ right
    return factor


def _metric_like(
    first: PerceptualMetric, encoder: nn.Module, lipschitz: float | None, feature_error: float = 0.0
) -> PerceptualMetric:
    metric = PerceptualMetric(
        encoder,
        first.image_size,
        anchor=first.anchor,
        lipschitz=lipschitz,
        resize=first.preprocess.resize,
        framing=first.preprocess.framing,
    )
    metric.requires_grad_(False)
    freeze(metric)
    if metric.has_bound:
        metric.require_feature_error(feature_error)
    return metric
