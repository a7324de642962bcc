"""1-Lipschitz activations that preserve the norm of gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.layers.base import LipschitzLayer
from lipsim.utils.errors import LipsimError


class MaxMin(LipschitzLayer):
    """Sort pairs of channels, ``(x_i, x_{i + C/2}) → (max, min)`` (Anil et al. 2019, GroupSort with groups of two).

    A permutation of coordinates at every point, hence 1-Lipschitz and gradient-norm preserving. A backward pass takes
    the identity where a pair is equal; compiled code and forward derivatives average there, as torch's maximum does.

    Raises:
        ValueError: an odd number of channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, …)`` with even C to the same shape."""
        first, second = _halves(x)
        # What is recorded is of operations that others can run.
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if torch.is_grad_enabled() and x.requires_grad and not recorded:
            sorted_pairs: Tensor = _SortedPairs.apply(x)
            return sorted_pairs
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

    def lipschitz_bound(self) -> float:
        return 1.0


class _SortedPairs(torch.autograd.Function):
    """The same, with a backward pass of three operations where those of ``torch.maximum`` and ``torch.minimum`` have a
    dozen, which took a third of a training step of the default student.
    """  # noqa: D205

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        first, second = inputs[0].chunk(2, dim=1)
        exchanged = first < second
        ctx.save_for_backward(exchanged)
        ctx.save_for_forward(exchanged)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchange(gradient, ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _exchange(tangent, ctx.saved_tensors[0])


def _exchange(x: Tensor, where: Tensor) -> Tensor:
    """Pairs of channels, exchanged where a mask says so: its own inverse."""
    first, second = x.chunk(2, dim=1)
    if x.device.type != "cpu":
        return torch.cat([torch.where(where, second, first), torch.where(where, first, second)], dim=1)
    # On a CPU exact at 0 and 1, for what is finite, and several times faster than torch.where.
    share = where.to(x.dtype)
    return torch.cat([torch.lerp(first, second, share), torch.lerp(second, first, share)], dim=1)


class GroupSort(LipschitzLayer):
    """Sort each group of neighbouring channels in ascending order (Anil et al. 2019).

    A permutation of coordinates at every point, and the sorting of a whole vector is 1-Lipschitz.

    Args:
        group_size: channels in a group; None sorts all of them.

    Raises:
        ValueError: a number of channels that the groups do not divide.
    """

    def __init__(self, group_size: int | None = 2) -> None:
        super().__init__()
        if group_size is not None and group_size < 1:
            raise LipsimError(f"expected a group_size of at least 1, got {group_size}")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, …)`` to the same shape."""
        group = self.group_size or x.shape[1]
        if x.shape[1] % group:
            raise LipsimError(f"expected channels that groups of {group} divide, got {x.shape[1]}")
        sorted_groups: Tensor = x.unflatten(1, (-1, group)).sort(dim=2).values.flatten(1, 2)
        return sorted_groups

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return str(self.group_size)


class Householder(LipschitzLayer):
    """Learned reflections of pairs ``(x_i, x_{i + C/2})`` (Singla et al. 2022, "Improved deterministic l2 robustness").

    A pair on one side of the line at angle ``θ/2`` stays, one on the other side is mirrored at it: continuous, and an
    isometry on each side. It starts at ``θ = π/2``, which is :class:`MaxMin`.

    Args:
        channels: even number of channels ``C``.

    Raises:
        ValueError: an odd number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 2:
            raise LipsimError(f"expected an even number of channels, got {channels}")
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, …)`` to the same shape."""
        if x.shape[1] != 2 * len(self.angle):
            raise LipsimError(f"expected {2 * len(self.angle)} channels, got {x.shape[1]}")
        first, second = _halves(x)
        angle = self.angle.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        sine, cosine = torch.sin(angle), torch.cos(angle)
        stays = first * torch.sin(angle / 2) - second * torch.cos(angle / 2) > 0
        mirrored = first * cosine + second * sine, first * sine - second * cosine
        return torch.cat([torch.where(stays, first, mirrored[0]), torch.where(stays, second, mirrored[1])], dim=1)

    def lipschitz_bound(self) -> float:
        # The angle is one number, so both entries of the reflection belong to a point on the unit circle, up to
        # rounding: sin² + cos² within four ulp of the dtype.
        return 1.0 if self.angle.dtype == torch.float64 else 1 + 4 * torch.finfo(self.angle.dtype).eps


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] % 2:
        raise LipsimError(f"expected an even number of channels, got {x.shape[1]}")
    first, second = x.chunk(2, dim=1)
    return first, second
