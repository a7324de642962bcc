"""A bound held against what a module reaches: it proves nothing, but a bound that is exceeded is refused.

Pairs of inputs are pushed apart by a few steps of power iteration. What counts is the growth between two outputs, which
needs no derivative; derivatives only choose the next pair, and where there are none it is random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_STEP = 0.1  # distance of a pair, relative to the norm of the input
# Roundoffs of the dtype, 1.2e-4 in float32. Outputs err by some 1e-6 of their norm there, and pairs are a tenth of it
# apart; the rest is for networks in one module, whose layers err one after another.
_TOLERANCE = 1024

PullBack = Callable[[Tensor], Tensor]


def sample_image(image_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An image ``(1, 3, S, S)`` in [0, 1], noise above a ramp."""
    image = torch.rand(3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    image[:, image_size // 2 :] = torch.linspace(0, 1, image_size)
    return image.unsqueeze(0).to(device, dtype)


def agree(outputs: Tensor, others: Tensor, inputs: Tensor, bound: float) -> bool:
    """Whether two computations ``(N, …)`` of the same map at the same inputs differ by rounding at most."""
    if not isinstance(outputs, Tensor) or outputs.shape != others.shape:
        return False
    allowed = _eps(inputs, outputs) * (_norm(others) + bound * _norm(inputs))
    return bool((_norm(outputs - others) <= allowed).all())


def check(module: nn.Module, x: Tensor, bound: float, iterations: int = 3) -> tuple[Tensor, str | None]:
    """Run a module in evaluation mode, and look for pairs that it takes further apart than ``bound`` allows.

    Args:
        module: maps ``(N, …)`` to ``(N, …)``, each sample alone.
        x: inputs as they reach the module, ``(N, …)``.
        bound: what it claims.
        iterations: of the power iteration. 0 takes random pairs only, for code that is known to be a function of each
            sample.

    Returns:
        Its outputs ``(N, …)`` at ``x``, and what is wrong with it: it exceeds the bound, returns something else than
        finite numbers for each sample, or not the same for the same input. None where nothing was found.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(count: int) -> Tensor:
        return torch.randn(count, *x.shape[1:], generator=generator).to(x)

    # Where it works, at zero, where activations bend, and anywhere.
    inputs = torch.cat([x, torch.zeros_like(x[:1]), normal(1)])
    with torch.no_grad():
        outputs = module(inputs.clone())  # clones, since a module may change its input in place
    fault = _output_fault(outputs, inputs, len(x))
    if fault:
        return outputs, fault
    length, size = _norm(inputs), _norm(outputs)
    if iterations:
        # In other company, in another order, and with gradients where they were without.
        again, usable = _run(module, inputs[:-1].flip(0))[0].flip(0), torch.isfinite(size[:-1])
        if not agree(again[usable], outputs[:-1][usable], inputs[:-1][usable], bound):
            return outputs[: len(x)], (
                "is random, mixes the samples of a batch, or changes from call to call, so no bound can hold; make it "
                "a function of each sample"
            )
    step = _STEP * torch.where(length > 0, length, inputs[0].numel() ** 0.5)
    direction, eps = normal(len(inputs)), _eps(inputs, outputs)
    direction[0] = 1
    for remaining in reversed(range(iterations + 1)):
        moved = inputs + direction * _columns(step / _norm(direction), direction).to(inputs)
        there, pull_back = _run(module, moved, derivative=remaining > 0)
        change, distance = there - outputs, _norm(moved - inputs)
        growth = _norm(change)
        allowed = bound * distance * (1 + eps) + eps / 16 * (size + _norm(there))
        exceeded = torch.isfinite(growth) & (growth > allowed)
        if exceeded.any():
            reached = float((growth / distance)[exceeded].max())
            return outputs[: len(x)], (
                f"is bounded by {bound:.9g} but reaches {reached:.9g}; correct its bound or what it computes"
            )
        if remaining:
            direction = _next_direction(change, pull_back, normal(len(inputs)))
    return outputs[: len(x)], None


def _output_fault(outputs: object, inputs: Tensor, count: int) -> str | None:
    if not isinstance(outputs, Tensor):
        return f"returns a {type(outputs).__name__}, expected a tensor"
    if not outputs.ndim or len(outputs) != len(inputs):
        return f"returns {tuple(outputs.shape)} for {len(inputs)} samples, expected one row for each"
    if not (outputs.is_floating_point() or outputs.is_complex()) or outputs.dtype in (torch.float16, torch.bfloat16):
        return f"returns {outputs.dtype}, whose rounding no bound covers; compute in float32 or float64"
    if not torch.isfinite(outputs[:count]).all():
        return "gives values that are not finite for images in [0, 1]"
    return None


def _run(module: nn.Module, x: Tensor, derivative: bool = True) -> tuple[Tensor, PullBack | None]:
    """Outputs, and the product of a cotangent with their derivative, where there is one and it is asked for."""
    if not derivative:
        with torch.no_grad():
            return module(x.clone()), None
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        try:
            outputs = module(leaf.clone())
        except RuntimeError:  # nothing that autograd can record
            with torch.no_grad():
                return module(x.clone()), None

        def pull_back(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(outputs, leaf, cotangent)[0]

        return outputs.detach(), pull_back if outputs.requires_grad else None


def _next_direction(change: Tensor, pull_back: PullBack | None, fresh: Tensor) -> Tensor:
    """``Jᵀ`` of the change, and a fresh direction for samples where this is nothing."""
    if pull_back is None:
        return fresh
    try:
        direction = pull_back(torch.nan_to_num(change))
    except RuntimeError:  # an operation without a derivative
        return fresh
    norm = _norm(direction)
    return torch.where(_columns(torch.isfinite(norm) & (norm > 0), fresh), direction, fresh)


def _norm(x: Tensor) -> Tensor:
    """Norm of each sample in float64, scaled where its squares could overflow or vanish."""
    rows, scale = x.flatten(1), torch.ones((), dtype=torch.float64, device=x.device)
    if x.dtype in (torch.float64, torch.complex128):
        largest = rows.abs().amax(1)
        scale = torch.where(largest > 0, largest, 1.0)
        rows = rows / scale.unsqueeze(1)
    wide = torch.complex128 if x.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide) * scale
    return norm


def _eps(*tensors: Tensor) -> float:
    return _TOLERANCE * max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _columns(factors: Tensor, like: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (like.ndim - 1))
