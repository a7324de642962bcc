"""The smallest change that breaks: FMN (Pintor et al. 2021), then steps of damped sequential quadratic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective, value_and_gradient
from lipsim.attacks.projections import Ball, Box, expand, part_norms, sample_norm
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_normal

_NEWTON_STEPS = 4
_LEAST_DAMPING = 1e-3


def minimal_norm(
    objective: Objective,
    x: Tensor,
    *,
    steps: int = 200,
    box: Box = (0.0, 1.0),
    polish: int = 100,
    starts: Tensor | None = None,
    parts: int = 1,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Find the smallest ℓ2 change with ``objective > 0``, per sample.

    FMN ascends within a ball whose radius follows the boundary: it shrinks while the sample is broken and grows while
    it is not. The best point of all starts is then polished: ``δ`` moves towards the smallest change that breaks the
    linearised objective (within the box), as far as that helps, and Newton steps bring it back to the broken side. On a
    linear objective the result is exact to rounding.

    Costs a sample ``steps + 2`` forward and as many backward passes from each start, and up to ``5·(polish + 1)`` of
    the polish, which ends when every sample of the batch has settled. What is random depends on ``(seed, index of the
    sample)`` alone.

    Source: Pintor et al. 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints"; the polish is
    sequential quadratic programming with a line search.

    Args:
        objective: per-sample scalar; positive is broken.
        x: images ``(N, C, H, W)`` inside the box; float64 gives ten digits more than float32.
        steps: gradient steps from each start.
        box: the range of valid images; None for all of ℝⁿ.
        polish: steps of the polish, each of up to five gradients.
        starts: ``(S, N, C, H, W)`` points to start from, brought into the box; None: ``x`` alone.
        parts: the channels are that many images, and the largest of their norms counts (a common budget).
        seed: of the direction taken where the gradient vanishes.
        index: ``(N,)`` sample indices that this direction depends on.

    Returns:
        ``x_adv`` like ``x``; ``x`` itself where no change was found that breaks, or where ``x`` is broken already.

    Raises:
        ValueError: ``starts`` of another shape than ``x``, images outside the box, or channels that ``parts`` do not
            divide.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=0.3)
        >>> x_adv = minimal_norm(brighter, x)
        >>> print(f"{(x_adv - x).norm():.4f}")  # 0.3 over the slope √12
        0.0866
    """
    if starts is not None and starts.shape[1:] != x.shape:
        raise LipsimError(f"expected starts of shape (S, {', '.join(map(str, x.shape))}), got {tuple(starts.shape)}")
    Ball(2, 0, box, parts).check(x)
    clean = x.detach()
    if not len(clean):
        return clean.clone()
    count = 1 if starts is None else len(starts)
    rows = torch.arange(len(x), device=x.device).repeat(count)
    noise = sample_normal(x, seed=seed, index=index)
    search = _Search(objective.select(rows), clean[rows], box, parts)
    begin = torch.zeros_like(clean[rows]) if starts is None else starts.detach().flatten(0, 1) - clean[rows]
    search.follow(begin, noise[rows], steps)
    best = search.norm.view(count, -1).argmin(0) * len(x) + rows[: len(x)]
    search = search.select(best)
    search.polish(polish)
    return search.result()


class _Search:
    """The smallest changes found so far, one a row, and the two ways to find smaller ones.

    Attributes:
        best: ``(N, …)`` change; the last one tried where none has broken.
        norm: ``(N,)``, infinite where none has broken.
    """

    def __init__(self, objective: Objective, clean: Tensor, box: Box, parts: int) -> None:
        self.objective, self.clean, self.box, self.parts = objective, clean, box, parts
        self.best = torch.zeros_like(clean)
        self.norm = torch.full((len(clean),), math.inf, dtype=clean.dtype, device=clean.device)
        # Aimed at beyond the boundary, relative to the length of the change: above the rounding of the objective.
        self.overshoot = torch.finfo(clean.dtype).eps ** 0.7

    def select(self, rows: Tensor) -> _Search:
        part = _Search(self.objective.select(rows), self.clean[rows], self.box, self.parts)
        part.best, part.norm = self.best[rows], self.norm[rows]
        return part

    def result(self) -> Tensor:
        found = expand(torch.isfinite(self.norm), self.clean)
        return torch.where(found, self.clean + self.best, self.clean)

    def length(self, delta: Tensor) -> Tensor:
        return sample_norm(delta, parts=self.parts)

    def follow(self, delta: Tensor, noise: Tensor, steps: int) -> None:
        """FMN from one point a row; step sizes are relative to the radius, not to [0, 1]."""
        self._try(torch.zeros_like(delta))
        delta = self._inside(delta)
        radius = torch.full_like(self.norm, math.inf)
        for step in range(steps):
            fade = (1 + math.cos(math.pi * step / steps)) / 2
            delta, value, gradient = self._try(delta)
            slopes = part_norms(gradient, parts=self.parts)
            flat = slopes.sum(1) == 0
            reach = self.length(delta) + value.abs() / slopes.sum(1).clamp(min=torch.finfo(value.dtype).tiny)
            rate = 0.001 + 0.049 * fade
            known = torch.isfinite(self.norm)
            radius = torch.where(
                value > 0,
                torch.minimum(radius * (1 - rate), self.norm),
                torch.where(known & torch.isfinite(radius), radius * (1 + rate), reach),
            )
            radius = torch.where(flat, self.length(delta).clamp(min=1e-3), radius)
            gradient = torch.where(expand(flat, gradient), noise, gradient)
            ascent = gradient / self._spread(
                part_norms(gradient, parts=self.parts).clamp(min=torch.finfo(value.dtype).tiny)
            )
            delta = delta + expand((0.01 + 0.99 * fade) * radius, delta) * ascent
            shrink = self._spread(radius[:, None] / part_norms(delta, parts=self.parts).clamp(min=1e-30))
            delta = self._inside(delta * shrink.clamp(max=1))
        self._try(delta)
        self.best = torch.where(expand(torch.isfinite(self.norm), delta), self.best, delta)

    def polish(self, steps: int) -> None:
        """Damped SQP steps from the best change, each followed by Newton steps to the broken side."""
        delta, value, gradient = self._restore(self.best)
        damping = torch.ones_like(self.norm)
        settled = torch.zeros_like(self.norm, dtype=torch.bool)
        for _ in range(steps):
            before, best = self.norm, self.best
            offset = (gradient * delta).flatten(1).sum(1) - value
            trial = delta + expand(damping, delta) * (self._nearest(gradient, offset) - delta)
            trial, trial_value, trial_gradient = self._restore(trial)
            self.norm = torch.where(settled, before, self.norm)
            self.best = torch.where(expand(settled, best), best, self.best)
            better = (self.norm < before) | ~torch.isfinite(before)
            kept = expand(better, delta)
            delta, gradient = torch.where(kept, trial, delta), torch.where(kept, trial_gradient, gradient)
            value = torch.where(better, trial_value, value)
            damping = torch.where(better, (2 * damping).clamp(max=1), damping / 2)
            # A step that gained no more than rounding takes away is as good as none that helps.
            settled = settled | (damping < _LEAST_DAMPING) | (better & (self.norm >= before * (1 - self.overshoot)))
            if settled.all():
                break

    def _restore(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Newton steps to just beyond the boundary; the shortest broken point of them, else the last."""
        best = self._try(delta)
        shortest = torch.where(best[1] > 0, self.length(best[0]), math.inf)
        last = best
        for step in range(_NEWTON_STEPS):
            delta, value, gradient = last
            # Further from step to step: where rounding hides the boundary, the first aim may fall short of it.
            aim = 8**step * self.overshoot * sample_norm(gradient) * self.length(delta)
            done = (value > 0) & (value <= 2 * aim)
            if done.all():
                break
            gradient = gradient * self._movable(delta, expand(torch.sign(aim - value), gradient) * gradient)
            scale = (aim - value) / gradient.flatten(1).square().sum(1).clamp(min=torch.finfo(value.dtype).tiny)
            # Rows that are done stay, so that nothing depends on the other rows of the batch.
            scale = torch.where(done, 0.0, scale)
            last = self._try(self._inside(delta + expand(scale, delta) * gradient))
            length = torch.where(last[1] > 0, self.length(last[0]), math.inf)
            use = (length < shortest) | torch.isinf(shortest)
            shortest = torch.where(use, length, shortest)
            best = tuple(  # type: ignore[assignment]
                torch.where(expand(use, new), new, old) for new, old in zip(last, best, strict=True)
            )
        return best

    def _try(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The change as the sum with the image rounds it, its objective and gradient; the best is kept."""
        x_adv = self.clean + delta
        delta = x_adv - self.clean
        value, gradient = value_and_gradient(self.objective, x_adv)
        length = self.length(delta)
        better = (value > 0) & (length < self.norm)
        self.best = torch.where(expand(better, delta), delta, self.best)
        self.norm = torch.where(better, length, self.norm)
        return delta, value, gradient

    def _nearest(self, gradient: Tensor, offset: Tensor) -> Tensor:
        """The smallest change in the box with ``⟨gradient, δ⟩ = offset``; the furthest where there is none.

        ``δ = clip(λd)`` with ``d`` the gradient, each part of it scaled so that all parts get the same length. ``λ`` by
        Newton steps, which come from below because ``⟨g, clip(λd)⟩`` is concave in ``λ > 0``, and end where no pixel
        reaches the box any more.
        """
        tiny = torch.finfo(gradient.dtype).tiny
        gradient = gradient * expand(torch.where(offset < 0, -1.0, 1.0).to(gradient), gradient)
        offset = offset.abs()
        weight = 1 / part_norms(gradient, parts=self.parts).clamp(min=tiny)
        if self.parts == 1:
            weight = torch.ones_like(weight)
        for _ in range(1 if self.parts == 1 or self.box is None else 5):
            direction = gradient * self._spread(weight)
            gain = gradient * direction
            factor = offset / gain.flatten(1).sum(1).clamp(min=tiny)
            delta = direction * expand(factor, direction)
            if self.box is None:
                break
            for _ in range(30):
                aimed = direction * expand(factor, direction)
                delta = self._inside(aimed)
                missing = offset - (gradient * delta).flatten(1).sum(1)
                free = (self.clean + aimed >= self.box[0]) & (self.clean + aimed <= self.box[1])
                slope = torch.where(free, gain, 0.0).flatten(1).sum(1)
                open_ = (slope > 0) & (missing > 1e-15 * offset)
                if not open_.any():
                    break
                factor = factor + torch.where(open_, missing / slope.clamp(min=tiny), 0.0)
            norms = part_norms(delta, parts=self.parts)
            weight = weight * norms.amax(1, keepdim=True) / norms.clamp(min=tiny)
        return delta

    def _inside(self, delta: Tensor) -> Tensor:
        return delta if self.box is None else (self.clean + delta).clamp(*self.box) - self.clean

    def _movable(self, delta: Tensor, direction: Tensor) -> Tensor:
        """Where the box leaves room in this direction."""
        if self.box is None:
            return torch.ones_like(delta)
        x_adv = self.clean + delta
        return (torch.where(direction > 0, x_adv < self.box[1], x_adv > self.box[0])).to(delta)

    def _spread(self, scalars: Tensor) -> Tensor:
        """``(N, parts)`` as something that broadcasts over the images."""
        channels = self.clean.shape[1] // self.parts
        return scalars.repeat_interleave(channels, dim=1).view(len(scalars), -1, *[1] * (self.clean.ndim - 2))
