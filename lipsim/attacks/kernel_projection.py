"""Projections onto the kernel of a linear operator: of all of ℝⁿ, and within bounds on every pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lipsim.attacks.projections import expand, sample_norm

_TINY = 1e-300
_ROUNDING = 1e-9  # of the largest entry of a step: smaller ones do not meet a bound
_PATIENCE = 1000  # iterations in which conjugate gradients have to halve the smallest residual
_MOST_BOUNDS = 64  # that a walk in a kernel runs into before it ends


class LinearMap(Protocol):
    """A linear map of rows ``(N, …)``, each on its own."""

    def __call__(self, u: Tensor) -> Tensor:
        """``A u``."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``."""
        ...

    def select(self, rows: Tensor) -> LinearMap:
        """The same map for some of the rows."""
        ...


class Traced:
    """A linear function whose adjoint is its vector-Jacobian product."""

    def __init__(self, function: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.function = function
        with torch.enable_grad():
            self.primal = torch.zeros_like(like).requires_grad_(True)
            self.output = function(self.primal)

    def __call__(self, u: Tensor) -> Tensor:
        return self.function(u)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.autograd.grad(self.output, self.primal, y, retain_graph=True)[0]

    def select(self, rows: Tensor) -> Traced:
        return Traced(self.function, self.primal[rows])


class Weighted:
    """``A D`` with a diagonal ``D``, weights ``(N, …)`` of each row's coordinates."""

    def __init__(self, linear: LinearMap, weight: Tensor) -> None:
        self.linear, self.weight = linear, weight

    def __call__(self, u: Tensor) -> Tensor:
        return self.linear(self.weight * u)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.weight * self.linear.adjoint(y)

    def select(self, rows: Tensor) -> Weighted:
        return Weighted(self.linear.select(rows), self.weight[rows])


class Rows:
    """Multiplication of rows ``(N, d)`` by the transpose of a matrix ``(r, d)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, u: Tensor) -> Tensor:
        return u @ self.matrix.T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix

    def select(self, rows: Tensor) -> Rows:
        return self


def project_to_kernel(
    operator: Callable[[Tensor], Tensor],
    v: Tensor,
    *,
    weight: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-10,
) -> Tensor:
    """Project ``v`` onto ``ker A``: ``P = v − Aᵀy`` with ``(A Aᵀ) y = A v``, by conjugate gradients, per sample.

    Matrix-free: ``A`` is a callable, ``Aᵀ`` its vector-Jacobian product. A trivial kernel shows as ``‖P‖/‖v‖ ≈ 0``.

    Args:
        operator: linear map of images ``(N, 3, H, W)``, each on its own.
        v: directions ``(N, 3, H, W)``; float64 gives exactness to rounding.
        weight: diagonal ``D`` like ``v``, for the kernel of ``A D``; None: 1.
        iterations: at most this many steps.
        tolerance: stop at this relative residual.
    """
    linear: LinearMap = Traced(operator, v)
    if weight is not None:
        linear = Weighted(linear, weight)
    with torch.no_grad():
        zeros = torch.zeros(len(v)).to(v)
        y = solve_normal_equations(linear, torch.ones_like(v), linear(v), zeros, zeros + tolerance, iterations)
        return v - linear.adjoint(y)


@torch.no_grad()
def nearest_in_kernel(
    linear: LinearMap,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    steps: int = 15,
    iterations: int = 60,
    tolerance: float = 1e-9,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The point of ``ker A`` within bounds that is nearest to ``v``, per row.

    The dual problem has no constraints: ``δ(y) = clip(v − Aᵀy, low, high)`` with ``A δ(y) = 0``, solved by semismooth
    Newton steps with conjugate gradients and a line search (Qi & Sun 1993). What comes out is within the bounds
    whatever happens; how far it is from the kernel is returned.

    Args:
        linear: ``A``.
        v: ``(N, …)``, rows to come near to.
        low: of ``δ``, at most 0, like ``v``.
        high: of ``δ``, at least 0, like ``v``.
        steps: Newton steps, at most.
        iterations: of conjugate gradients for each.
        tolerance: of ``‖A δ‖/‖A v‖``.
        start: ``y`` to begin with, such as that of another ``v`` nearby; None: 0.

    Returns:
        ``δ``, ``‖A δ‖/‖A v‖`` ``(N,)``, and ``y``.
    """
    found, missing = torch.zeros_like(v), torch.zeros(len(v), dtype=v.dtype, device=v.device)
    rows = torch.arange(len(v), device=v.device)
    image = linear(v)
    scale = sample_norm(image).clamp(min=_least(v))
    gain = (scale / sample_norm(v).clamp(min=_least(v))).square()  # about the square of a singular value
    y = torch.zeros_like(image) if start is None else start
    dual = y.clone()
    for step in range(steps + 1):
        aimed = v - linear.adjoint(y)
        delta = aimed.clamp(low, high)
        image = linear(delta)
        residual = sample_norm(image) / scale
        found[rows], missing[rows], dual[rows] = delta, residual, y
        keep = (residual > tolerance).nonzero().flatten()
        if step == steps or not len(keep):
            break
        if len(keep) < len(rows):
            rows, linear, residual = rows[keep], linear.select(keep), residual[keep]
            v, low, high, y, aimed = v[keep], low[keep], high[keep], y[keep], aimed[keep]
            delta, image, scale, gain = delta[keep], image[keep], scale[keep], gain[keep]
        free = ((aimed > low) & (aimed < high)).to(v)
        # Without anything clipped the equations are linear, and one step is enough.
        linearised = (delta == aimed).flatten(1).all(1)
        aim = torch.where(linearised, tolerance, residual.clamp(max=0.1)).clamp(min=tolerance)
        newton = solve_normal_equations(linear, free, image, 1e-4 * residual.clamp(max=1) * gain, aim / 2, iterations)
        y = _search(linear, v, low, high, y, newton, delta, image)
    return found, missing, dual


@torch.no_grad()
def walk_in_kernel(basis: Tensor, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A point of a kernel within bounds, towards ``v`` and never away from it, for kernels of few dimensions.

    Straight towards the projection of ``v`` up to a bound, and on along it, as often as there are dimensions left (the
    active-set method without its way back): every point of the way is in the kernel to rounding.

    Args:
        basis: ``(k, d)`` orthonormal rows of the kernel.
        v: ``(N, d)``.
        low: of the result, at most 0, like ``v``.
        high: of the result, at least 0, like ``v``.
    """
    aim, at = v @ basis.T, v.new_zeros(len(v), len(basis))
    met = v.new_zeros(len(v), min(_MOST_BOUNDS, len(basis)), len(basis))  # normals of the bounds, orthonormalised
    for step in range(met.shape[1]):
        left = _without(aim - at, met[:, :step])
        direction, delta = left @ basis, at @ basis
        moves = direction.abs() > _ROUNDING * direction.abs().amax(1, keepdim=True).clamp(min=_ROUNDING)
        room = torch.where(direction > 0, high - delta, low - delta) / direction
        reach, first = torch.where(moves, room.clamp(min=0), torch.inf).min(1)
        at = at + reach.clamp(max=1)[:, None] * left
        if (reach >= 1).all():
            break
        normal = _without(basis.T[first], met[:, :step])
        size = torch.linalg.vector_norm(normal, dim=1, keepdim=True)
        met[:, step] = torch.where((reach[:, None] < 1) & (size > _ROUNDING), normal / size.clamp(min=_ROUNDING), 0.0)
    return at @ basis


def _without(u: Tensor, directions: Tensor) -> Tensor:
    """``u`` ``(N, k)`` without its part along orthonormal directions ``(N, m, k)``."""
    along = torch.einsum("nmk,nk->nm", directions, u)
    return u - torch.einsum("nmk,nm->nk", directions, along)


def solve_normal_equations(
    linear: LinearMap, free: Tensor, b: Tensor, damping: Tensor, tolerance: Tensor, iterations: int
) -> Tensor:
    """``(A D Aᵀ + damping) y = b`` with a diagonal ``D`` of zeros and ones, by conjugate gradients, per row.

    Each row stops once it has converged to its own ``tolerance`` ``(N,)``, whatever the others do, so that results do
    not depend on the batch; rows leave when there are enough of them.
    """
    found = torch.zeros_like(b)
    rows = torch.arange(len(b), device=b.device)
    y, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    energy = _dot(residual, residual)
    goal = energy * tolerance**2
    best = mark = energy
    for iteration in range(iterations):
        best = torch.minimum(best, energy)
        open_ = energy > goal
        if iteration % _PATIENCE == _PATIENCE - 1:
            open_, mark = open_ & (best <= mark / 4), best
        if not open_.all() and (2 * int(open_.sum()) <= len(rows) or iteration % _PATIENCE == _PATIENCE - 1):
            found[rows] = y
            keep = open_.nonzero().flatten()
            if not len(keep):
                return found
            rows, linear, free, damping = rows[keep], linear.select(keep), free[keep], damping[keep]
            y, residual, direction = y[keep], residual[keep], direction[keep]
            energy, goal, best, mark, open_ = energy[keep], goal[keep], best[keep], mark[keep], open_[keep]
        image = linear(free * linear.adjoint(direction)) + expand(damping, direction) * direction
        curvature = _dot(direction, image)
        goes_on = (curvature > 0) & open_
        rate = torch.where(goes_on, energy / curvature.clamp(min=_least(b)), torch.zeros_like(curvature))
        y = y + expand(rate, y) * direction
        residual = residual - expand(rate, y) * image
        energy, previous = _dot(residual, residual), energy
        direction = residual + expand(energy / previous.clamp(min=_least(b)), y) * direction
    found[rows] = y
    return found


def _search(
    linear: LinearMap,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    y: Tensor,
    newton: Tensor,
    delta: Tensor,
    image: Tensor,
) -> Tensor:
    """The first of steps 1, 1/2, 1/4, … along ``newton`` that the (concave) dual rises by or the residual falls by."""
    dual = _dot(delta - v, delta - v) / 2 + _dot(y, image)
    slope, square = _dot(image, newton), _dot(image, image)
    rate, done = torch.ones_like(slope), torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(10):
        tried = y + expand(rate, y) * newton
        moved = (v - linear.adjoint(tried)).clamp(low, high)
        seen = linear(moved)
        risen = _dot(moved - v, moved - v) / 2 + _dot(tried, seen) >= dual + 1e-4 * rate * slope
        done = done | risen | (_dot(seen, seen) < 0.8 * square)
        if done.all():
            break
        rate = torch.where(done, rate, rate / 2)
    return y + expand(rate, y) * newton


def _least(like: Tensor) -> float:
    return max(_TINY, torch.finfo(like.dtype).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
