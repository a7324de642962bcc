"""Level set traversal: a walk to another image on which an answer never changes.

Balasubramanian et al. 2023, "Exploring Geometry of Blind Spots in Vision Models". What is accepted is where the
objective is at most 0, so every objective has a level set: where a classifier is still as sure (ConfidenceObjective),
where two images are still the same (DistanceObjective with a threshold), where the answer to a triplet stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective, value_and_gradient
from lipsim.attacks.projections import Ball, Box, expand, sample_norm
from lipsim.utils.errors import LipsimError

_BOX_STEPS = 3  # towards the step that the box leaves; where no pixel is clipped the first is exact
_GROWTH = 1.25  # of a Newton-corrected step after one that was accepted
_ENOUGH = 1e-6  # of a Newton-corrected step may be left of it beyond the boundary of the linear model
_SAFETY = 1.5  # times the error of the last step is kept from the boundary
_INSIDE = 1e-4  # of a Newton-corrected step is kept from the boundary at least
_SQUARES = 1e4  # times the root of the least normal number: longer gradients have squares that do not underflow
_FIRST = 64  # values of an image
_SHORTEST = 1e-6  # of the first step; a sample that cannot take even that stands still

Quotient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Traversal:
    """Where a walk of N samples stands, and all that it needs to go on: ``tensors`` can be saved and read again.

    A run that is interrupted, saved and resumed gives the same bits as one that is not.

    Attributes:
        x: ``(N, …)``, points of the level set.
        value: ``(N,)``, the objective there.
        gradient: like ``x``, of the objective.
        push: like ``x``, ``a`` of the published rule: by how much each step goes down the gradients so far.
        length: ``(N,)``, the next Newton-corrected step as a share of the way to the target; 0: not yet known.
        slack: ``(N,)``, how far inside the level that step aims, since the objective is not linear.
        moving: ``(N,)`` bool, False where no further step would change anything.
        accepted: ``(N,)`` int64, how many steps were.
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    push: Tensor
    length: Tensor
    slack: Tensor
    moving: Tensor
    accepted: Tensor

    @classmethod
    def start(
        cls,
        objective: Objective,
        x: Tensor,
        *,
        noise: float = 2 / 255,
        box: Box = (0.0, 1.0),
        seed: int = 0,
        index: Tensor | Sequence[int] | None = None,
    ) -> Self:
        """A random point within ``noise`` of each image, or the image itself where that point is not of the level set.

        An image that is broken as it is (``objective > 0``) stays as it is. Arguments as in :func:`level_set`.
        """
        ball = Ball("inf", noise, box)
        ball.check(x)
        x = x.detach()
        with torch.no_grad():
            clean_value = objective(x).detach()
        value, gradient, begin = clean_value, torch.zeros_like(x), x
        if len(x):
            begin = ball.random_point(x, seed=seed, index=index) if noise else x.clone()
            value, gradient = value_and_gradient(objective, begin)
        outside = ~(value <= 0)  # NaN as well
        back = (outside & (clean_value <= 0)).nonzero().flatten()
        if len(back) and noise:
            value[back], gradient[back] = value_and_gradient(objective.select(back), x[back])
        begin = torch.where(expand(outside, x), x, begin)
        value = torch.where(outside & ~(clean_value <= 0), clean_value, value)
        zeros, none = torch.zeros_like(value), torch.zeros_like(value, dtype=torch.int64)
        return cls(begin, value, gradient, torch.zeros_like(x), zeros, zeros.clone(), value <= 0, none)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All fields by name, for ``safetensors.torch.save_file``."""
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The state that :attr:`tensors` holds.

        Raises:
            ValueError: fields are missing.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in tensors]:
            raise LipsimError(f"expected the tensors of a traversal, {', '.join(names)}; missing: {', '.join(missing)}")
        return cls(**{name: tensors[name] for name in names})

    def advance(
        self,
        objective: Objective,
        target: Tensor,
        *,
        steps: int = 400,
        step_size: float = 0.01,
        correction: float = 0.002,
        newton: bool = False,
        box: Box = (0.0, 1.0),
        say: Callable[[str], object] | None = None,
    ) -> Traversal:
        """The state after ``steps`` more steps, fewer where all samples stand still. Arguments: :func:`level_set`."""
        if not 0 < step_size <= 1:
            raise LipsimError(f"expected a step_size in (0, 1], a share of the way to the target, got {step_size}")
        if steps < 0 or not correction >= 0:
            raise LipsimError(f"expected steps and a correction of at least 0, got {steps} and {correction}")
        if target.shape[1:] != self.x.shape[1:] or len(target) not in (1, len(self.x)):
            raise LipsimError(
                f"expected a target like the images {tuple(self.x.shape)}, or one for all, got {tuple(target.shape)}"
            )
        target = target.detach().to(self.x).expand_as(self.x)
        state = Traversal(**{name: tensor.clone() for name, tensor in self.tensors.items()})
        rows, part = state.moving.nonzero().flatten(), objective
        if len(rows) < len(state.x):
            part = objective.select(rows)
        for step in range(steps):
            if not len(rows):
                break
            if say is not None:
                say(f"step {step + 1} of {steps}, {len(rows)} of {len(state.x)} on their way")
            if newton:
                still = state._newton_step(part, rows, state._at(rows, target), step_size, box)
            else:
                still = state._published_step(part, rows, state._at(rows, target), step_size, correction, box)
            if still.any():
                state.moving[rows[still]] = False
                rows = rows[~still]
                part = objective.select(rows)
        return state

    def _published_step(
        self, objective: Objective, rows: Tensor, target: Tensor, step_size: float, correction: float, box: Box
    ) -> Tensor:
        """One step of the samples at ``rows`` ``(M,)``, in place; ``(M,)`` bool, who stands still from now on."""
        x, gradient, push = (self._at(rows, tensor) for tensor in (self.x, self.gradient, self.push))
        way = target - x
        scaled, size, _, over = _scaled(gradient)
        along = over(over(_dot(scaled, way), size), size)
        pushed = torch.add(push, gradient, alpha=correction / 2).clamp_(-correction, correction)
        moved = torch.add(x, way, alpha=step_size).addcmul_(expand(-step_size * along, x), scaled).sub_(pushed)
        if box is not None:
            moved.clamp_(*box)
        nowhere, saturated = _equal(moved, x), _equal(pushed, push)
        accepted, _ = self._try(objective, rows, moved)
        self._put(self.push, rows, pushed)
        # Where it was refused, the next step would be the same one; where it led nowhere, too.
        return (nowhere | ~accepted) & saturated

    def _newton_step(self, objective: Objective, rows: Tensor, target: Tensor, step_size: float, box: Box) -> Tensor:
        """One step of the samples at ``rows`` ``(M,)``, in place; ``(M,)`` bool, who stands still from now on."""
        x, gradient = self._at(rows, self.x), self._at(rows, self.gradient)
        value, slack, length = (self._at(rows, tensor) for tensor in (self.value, self.slack, self.length))
        length = torch.where(length > 0, length.clamp(max=step_size), step_size)
        scaled, size, norm, over = _scaled(gradient)
        way = target - x
        reach, ahead = length * sample_norm(way), over(length * _dot(scaled, way), size)
        # Rounding refuses points on the boundary itself. Where the gradient nearly vanishes its linear model says
        # little: no way down that is longer than the step.
        excess = torch.minimum(over(value + slack, norm) + _INSIDE * reach, reach)
        # Into the memory of the way: a batch of images costs more to allocate than to compute.
        straight = torch.lerp(x, target, expand(length, x), out=way)
        moved, along = _into_half_space(straight, ahead, scaled, size, over, excess, _ENOUGH * reach, box)
        expected = value + norm * along
        nowhere = _equal(moved, x)
        accepted, reached = self._try(objective, rows, moved)
        # The objective bends away from its tangent with the square of the step; what the box left over counts too.
        scale = torch.where(accepted, (step_size / length).clamp(max=_GROWTH), 0.5)
        error = (reached - expected.clamp(max=0)).nan_to_num(nan=0.0, posinf=0.0).clamp(min=0)
        length = length * scale
        self._put(self.length, rows, length)
        self._put(self.slack, rows, _SAFETY * error * scale.square())
        return torch.where(accepted, nowhere, length < _SHORTEST * step_size)

    def _at(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """The rows of one of the fields, to be read before :meth:`_try`; no copy where they are all."""
        return tensor if len(rows) == len(self.x) else tensor.index_select(0, rows)

    def _put(self, tensor: Tensor, rows: Tensor, new: Tensor) -> None:
        """Write the rows of one of the fields."""
        if len(rows) == len(self.x):
            tensor.copy_(new)
        else:
            tensor.index_copy_(0, rows, new)

    def _try(self, objective: Objective, rows: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Go to the points ``(M, …)`` that are of the level set; ``(M,)`` who went, and the objective at all points.

        The forward pass that decides is the one that the next step's gradient is computed from.
        """
        with torch.enable_grad():
            moved = moved.detach().requires_grad_(True)
            value = objective(moved)
            accepted = value.detach() <= 0
            if count := int(accepted.sum()):
                (gradient,) = torch.autograd.grad(value.sum(), moved)
                gone, there, reached = rows, moved.detach(), value.detach()
                if count < len(rows):  # a third of the time of a mask
                    took = accepted.nonzero().flatten()
                    gone, there, reached, gradient = (t.index_select(0, took) for t in (rows, there, reached, gradient))
                self._put(self.x, gone, there)
                self._put(self.value, gone, reached)
                self._put(self.gradient, gone, gradient)
                self.gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                self.accepted[gone] += 1
        return accepted, value.detach()


def level_set(
    objective: Objective,
    x: Tensor,
    target: Tensor,
    *,
    steps: int = 400,
    step_size: float = 0.01,
    correction: float = 0.002,
    newton: bool = False,
    noise: float = 2 / 255,
    box: Box = (0.0, 1.0),
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    say: Callable[[str], object] | None = None,
) -> Tensor:
    """Walk from images towards targets while the objective stays at most 0.

    Published rule: ``x ← clip(x + η v⊥ − a)``, where ``v⊥`` is the part of ``target − x`` along which the objective
    does not change to first order, and ``a ← clip(a + (ε/2) g, ±ε)`` follows its gradient ``g`` down. Like the
    authors' program, ``a`` grows in refused steps too, and confidence is compared with that of the clean image. Unlike
    it, gradients are not divided by the size of the batch, and each sample goes on until it stands still itself, so
    that the rest of the batch has no say; the program differentiates the cross-entropy ``−log p`` and not ``p``, which
    gives the same ``v⊥`` and an ``a`` that is ``1/p`` times as large before it is clipped.

    Newton-corrected rule: the nearest point to ``x + η (target − x)``, within the box, that the linear model of the
    objective has in the level: ``x + η v⊥ − ((h − c)/‖g‖²) g`` on its boundary, straight on where nothing is in the
    way. Steps that are refused are halved and tried again; the error of the model at the last step says how far inside
    (``c < 0``) the next one aims.

    Costs a sample one forward and backward pass a step, fewer where steps are refused or nothing moves any more, and
    two forward and one backward pass to start (one of each more where the random start is outside the level).
    To stop and go on, or to see the path: :class:`Traversal`.

    Source: Balasubramanian et al. 2023, Algorithm 1.

    Args:
        objective: per-sample scalar; at most 0 is the level set.
        x: source images ``(N, C, H, W)``, float32 or float64, inside the box.
        target: images like ``x`` to walk to, or one for all.
        steps: at most.
        step_size: ``η``, the share of the way to the target that a step takes; at most that in the Newton-corrected
            rule. 400 steps of 0.01 that lose nothing leave 1.8 % of the way.
        correction: ``ε``, the largest change of a value by ``a`` in a step of the published rule.
        newton: take the Newton-corrected rule.
        noise: the walk starts at a random point within that of ``x``, in ℓ∞.
        box: the range of valid images; None for all of ℝⁿ.
        seed: of the random start.
        index: ``(N,)`` sample indices that the random start depends on.
        say: told where the walk is.

    Returns:
        Points like ``x`` with ``objective ≤ 0``; ``x`` itself where that is broken already.

    Raises:
        ValueError: images outside the box, a target of another shape, numbers out of range, or an objective without a
            gradient.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.zeros(1, 1, 1, 2)
        >>> level = DistanceObjective(lambda x, y: (x - y)[:, 0, 0, 0], x, threshold=0.25)  # the first pixel alone
        >>> print(level_set(level, x, torch.ones_like(x), steps=2_000, newton=True, noise=0).view(-1))
        tensor([0.2500, 1.0000])
    """
    state = Traversal.start(objective, x, noise=noise, box=box, seed=seed, index=index)
    return state.advance(
        objective, target, steps=steps, step_size=step_size, correction=correction, newton=newton, box=box, say=say
    ).x


def _scaled(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Quotient]:
    """Gradients over a number each, the lengths ``(N,)`` of these and of the gradients, and what divides by lengths.

    The number is 1 where squares of the gradient's entries can be added up, and its largest entry where they would
    underflow, as those of a sure classifier do. A plain division, a sixth of the time, where no length is 0.
    """
    norm = sample_norm(gradient)
    plain = (norm > _SQUARES * torch.finfo(norm.dtype).tiny ** 0.5) & (norm < torch.inf)
    if plain.all():
        return gradient, norm, norm, torch.div
    largest = sample_norm(gradient, "inf")
    scale = torch.where(plain | ~(largest > 0), 1.0, largest)
    scaled = gradient / expand(scale, gradient)
    size = sample_norm(scaled)
    return scaled, size, size * scale, _over


def _into_half_space(
    start: Tensor,
    ahead: Tensor,
    normal: Tensor,
    size: Tensor,
    over_size: Quotient,
    excess: Tensor,
    enough: Tensor,
    box: Box,
) -> tuple[Tensor, Tensor]:
    """The point of the box nearest to ``start = x + step`` with ``excess + ⟨u, point − x⟩ ≤ 0``, if there is one.

    By Newton's method on the multiplier ``λ`` of ``clip(start − λ u)``, of which the left side is a convex function,
    so that no step goes too far.

    Args:
        start: ``(N, …)``.
        ahead: ``(N,)``, ``⟨u, start − x⟩``, which is all that is asked of ``x``.
        normal: like ``start``, ``u`` times its length before it was one.
        size: ``(N,)``, that length; 0: ``u`` is 0.
        over_size: divides by it; 0 where it is 0.
        excess: ``(N,)``.
        enough: ``(N,)``, what the left side may be instead of 0 at the end.
        box: the range of the point.

    Returns:
        The point, and ``⟨u, point − x⟩`` ``(N,)``.
    """
    multiplier = (excess + ahead).clamp(min=0)
    steps = 1 if box is None else _BOX_STEPS
    for step in range(steps):
        free = torch.addcmul(start, normal, expand(-over_size(multiplier, size), start))
        point, along = _clip(free, box), ahead - multiplier
        if box is None:
            break
        cut = torch.sub(point, free, out=free)
        taken = over_size(_dot(normal, cut), size)
        along = along + taken
        # Where the box takes nothing away, the first multiplier is exact.
        over = excess + along
        again = (taken != 0) & (over > enough)
        if step == steps - 1 or not again.any():
            break
        # Signs and a product: comparisons and masks of floats take five times as long.
        clipped = cut.sign_().abs_()
        left = over_size(sample_norm(torch.addcmul(normal, normal, clipped, value=-1)), size).square()
        multiplier = multiplier + torch.where(again, _over(over, left), 0.0)
    return point, along


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient that is 0 where the denominator is."""
    return (numerator / denominator).where(denominator > 0, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of each sample, ``(N,)``."""
    return (a * b).flatten(1).sum(1)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """``(N,)`` bool, where samples are equal: where their first values are, the others are looked at."""
    a, b = a.flatten(1), b.flatten(1)
    same = (a[:, :_FIRST] == b[:, :_FIRST]).all(1)
    return (a == b).all(1) if same.any() else same


def _clip(x: Tensor, box: Box) -> Tensor:
    return x if box is None else x.clamp(*box)
