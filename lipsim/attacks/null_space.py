"""Null-space perturbations: changes of the image that an encoder's first linear operator cannot see.

Ozbulak et al., "Exact Feature Collisions in Neural Networks". The published construction tiles one null vector of the
unfolded kernel, which is exact only where the stride equals the kernel. Here the projection onto the kernel of the
operator itself is computed matrix-free, for every stride and padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipsim.attacks.projections import Box, expand, sample_norm
from lipsim.layers.encoder import first_weight
from lipsim.utils.errors import LipsimError

_SATURATED = 0.02  # of the box
_EXACT = 1e-6  # what the operator sees of the perturbation, relative to what it sees of the direction


@dataclass(frozen=True)
class FirstOperator:
    """The linear part ``A`` of the first layer that an encoder applies to an image.

    Attributes:
        name: path of the layer in the encoder.
        kind: its class.
        forward: ``A``, on image perturbations ``(N, 3, H, W)``.
    """

    name: str
    kind: str
    forward: Callable[[Tensor], Tensor]


def first_operator(encoder: nn.Module, image_size: int) -> FirstOperator | None:
    """Find the first layer with weights that reads the image, together with all that comes before it.

    Runs the encoder once on a probe and records the first call of a Conv2d, a Linear or another module with parameters
    of its own. The operator is everything up to that layer's pre-activation, checked to be affine; None if it is not
    (a layer that is nonlinear inside, such as an SLL block, which hands all of its input on).
    """
    weight = first_weight(encoder)
    probe = torch.zeros(1, 3, image_size, image_size)
    probe = probe if weight is None else probe.to(weight)
    found: list[tuple[str, nn.Module]] = []

    def record(name: str, layer: nn.Module) -> Callable[..., None]:
        return lambda *_: found.append((name, layer)) if not found else None

    hooks = [
        layer.register_forward_pre_hook(record(name, layer))
        for name, layer in encoder.named_modules()
        if any(True for _ in layer.parameters(recurse=False)) and not any(True for _ in layer.children())
    ]
    try:
        with torch.no_grad():
            encoder(probe)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    name, layer = found[0]

    def affine(x: Tensor) -> Tensor:
        return _output_of(encoder, layer, x)

    offset = affine(probe)

    def linear(x: Tensor) -> Tensor:
        return affine(x) - offset

    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, *probe.shape, generator=generator).to(probe)
    with torch.no_grad():
        expected, got = linear(a) - 2 * linear(b), linear(a - 2 * b)
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return None
    return FirstOperator(name, type(layer).__name__, linear)


class _Found(Exception):
    """Carries a layer's output out of the encoder, so that nothing behind it is computed.

    By a hook: tracing, as torchvision's ``create_feature_extractor`` does, fails on encoders whose forward passes look
    at their input, every student here among them.
    """

    def __init__(self, output: Tensor) -> None:
        self.output = output


def _output_of(encoder: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    def stop(_module: nn.Module, _args: object, output: Tensor) -> None:
        raise _Found(output)

    hook = layer.register_forward_hook(stop)
    try:
        encoder(x)
    except _Found as found:
        return found.output
    finally:
        hook.remove()
    raise RuntimeError("the first layer was not called again")


def project_to_kernel(
    operator: Callable[[Tensor], Tensor], v: Tensor, *, iterations: int = 200, tolerance: float = 1e-10
) -> Tensor:
    """Project ``v`` onto ``ker A``: ``P = v − Aᵀy`` with ``(A Aᵀ) y = A v``, by conjugate gradients, per sample.

    Matrix-free: ``A`` is a callable, ``Aᵀ`` its vector-Jacobian product. A trivial kernel shows as ``‖P‖/‖v‖ ≈ 0``.

    Args:
        operator: linear map of images ``(N, 3, H, W)``.
        v: directions ``(N, 3, H, W)``; float64 gives exactness to rounding.
        iterations: at most this many steps.
        tolerance: stop at this relative residual.
    """
    with torch.enable_grad():
        primal = v.detach().clone().requires_grad_(True)
        output = operator(primal)

    def adjoint(y: Tensor) -> Tensor:
        return torch.autograd.grad(output, primal, y, retain_graph=True)[0]

    with torch.no_grad():
        b = output.detach()
        y = torch.zeros_like(b)
        residual, direction = b.clone(), b.clone()
        energy = _dot(residual, residual)
        goal = energy * tolerance**2
        for _ in range(iterations):
            if (energy <= goal).all():
                break
            image = operator(adjoint(direction))
            curvature = _dot(direction, image)
            rate = torch.where(curvature > 0, energy / curvature.clamp(min=1e-300), torch.zeros_like(curvature))
            y = y + expand(rate, y) * direction
            residual = residual - expand(rate, y) * image
            energy, previous = _dot(residual, residual), energy
            direction = residual + expand(energy / previous.clamp(min=1e-300), y) * direction
        return v - adjoint(y)


def null_space(
    operator: Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    *,
    eps: float | None = None,
    box: Box = (0.0, 1.0),
    iterations: int = 200,
) -> Tensor:
    """Move along the part of ``direction`` that ``operator`` cannot see, as far as budget and box allow.

    Clipping would destroy exactness. Inside a box the perturbation is ``δ = D u`` with ``u ∈ ker(A D)``, where the
    diagonal ``D`` is each value's room in the box: (nearly) saturated values stay, the others move in proportion, and
    ``|u| ≤ 1`` keeps ``x + δ`` inside.

    Args:
        operator: linear map ``A`` of images, such as :attr:`FirstOperator.forward`.
        x: images ``(N, 3, H, W)`` inside the box.
        direction: ``(N, 3, H, W)``, noise for a texture.
        eps: ℓ2 budget; None: only the box limits.
        box: the range of valid images; None needs ``eps``.
        iterations: of the projection; five times as many for samples that have not converged by then.

    Returns:
        ``x_adv`` like ``x`` with ``operator(x_adv − x) ≈ 0``; ``x`` itself where the kernel is trivial.

    Raises:
        ValueError: neither ``eps`` nor ``box`` limits the perturbation.
    """
    if eps is None and box is None:
        raise LipsimError("expected a budget eps where there is no box")
    if box is None:
        room = torch.ones_like(x)
    else:
        room = torch.minimum(x - box[0], box[1] - x)
        # Nearly saturated values could hardly move and would make A D ill-conditioned.
        room = torch.where(room < _SATURATED * (box[1] - box[0]), 0.0, room)
    unit = project_to_kernel(lambda u: operator(room * u), direction, iterations=iterations)
    # Where much is saturated A D is ill-conditioned: those samples alone are worth more iterations.
    seen = sample_norm(operator(room * unit)) / sample_norm(operator(room * direction)).clamp(min=1e-38)
    slow = (seen > _EXACT).nonzero().flatten()
    if len(slow):
        part = room[slow]
        unit[slow] = project_to_kernel(lambda u: operator(part * u), direction[slow], iterations=5 * iterations)
    perturbation = room * unit
    length = sample_norm(perturbation)
    # Conjugate gradients leave rounding: what is left of a trivial kernel is no perturbation.
    trivial = length <= 1e-4 * sample_norm(direction) * room.amax()
    scale = torch.full_like(length, torch.inf) if eps is None else eps / length.clamp(min=1e-38)
    if box is not None:
        scale = torch.minimum(scale, 1 / sample_norm(unit, "inf").clamp(min=1e-38))
    scale = torch.where(trivial, torch.zeros_like(scale), scale)
    x_adv = x + expand(scale, x) * perturbation
    return x_adv if box is None else x_adv.clamp(*box)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
