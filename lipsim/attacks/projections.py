"""What an attack may reach: a norm ball around each image, within the box of valid images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_normal

Norm = Literal[2, "inf", 0]
Box = tuple[float, float] | None
NORMS: tuple[Norm, ...] = (2, "inf", 0)
_TOLERANCE = 5e-7  # by which a change may be longer than its budget


def check_norm(norm: Norm) -> None:
    """Refuse what is no norm of a budget.

    Raises:
        ValueError: an unknown norm.
    """
    if norm not in NORMS:
        raise LipsimError(f"expected norm 2, 'inf' or 0, got {norm!r}")


def sample_norm(delta: Tensor, norm: Norm = 2, parts: int = 1) -> Tensor:
    """Norm of each sample, ``(N, …)`` to ``(N,)``; ℓ0 counts pixels and not channels.

    Args:
        delta: changes, of ``(N, C, H, W)`` in ℓ0.
        norm: 2, "inf" or 0.
        parts: the channels are that many images, and the largest of their norms counts.

    Raises:
        ValueError: an unknown norm.
    """
    largest: Tensor = part_norms(delta, norm, parts).amax(1)
    return largest


def part_norms(delta: Tensor, norm: Norm = 2, parts: int = 1) -> Tensor:
    """Norm of each image of each sample, ``(N, parts·C, …)`` to ``(N, parts)``, see :func:`sample_norm`.

    Raises:
        ValueError: an unknown norm.
    """
    check_norm(norm)
    split = delta.unflatten(1, (parts, -1)).flatten(0, 1)
    if norm == 0:
        norms: Tensor = (split != 0).any(1).flatten(1).sum(1).to(delta.dtype)
    else:
        order = math.inf if norm == "inf" else 2
        if split.ndim > 2:  # row by row: all at once, float32 sums of equal squares are off by 1e-4 at 224 pixels
            split = torch.linalg.vector_norm(split, ord=order, dim=-1)
        norms = torch.linalg.vector_norm(split.flatten(1), ord=order, dim=1)
    return norms.view(-1, parts)


def expand(scalar: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` viewed as ``(N, 1, 1, 1)`` to broadcast over ``like``."""
    return scalar.view(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class Ball:
    """The points within ``eps`` of an image, in the box.

    Attributes:
        norm: 2, "inf" or 0; in ℓ0, ``eps`` is a number of pixels.
        eps: the budget.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.

    Raises:
        ValueError: an unknown norm, an ``eps`` that is negative, not finite or (ℓ0) no whole number, ℓ0 without a box.
    """

    norm: Norm
    eps: float
    box: Box = (0.0, 1.0)
    parts: int = 1

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if not 0 <= self.eps < math.inf:
            raise LipsimError(f"expected a finite budget eps ≥ 0, got {self.eps}")
        if self.norm == 0 and (self.box is None or self.eps != int(self.eps)):
            raise LipsimError(f"expected a whole number of pixels and a box in ℓ0, got eps {self.eps}, box {self.box}")

    def check(self, x: Tensor) -> None:
        """Refuse images from which no attack can start.

        Raises:
            ValueError: pixels outside the box, or channels that the parts do not divide.
        """
        if x.shape[1] % self.parts:
            raise LipsimError(f"expected a number of channels that {self.parts} parts divide, got {x.shape[1]}")
        if self.box is None or not x.numel():
            return
        low, high = (float(t) for t in torch.aminmax(x))
        if not (low >= self.box[0] and high <= self.box[1]):
            raise LipsimError(
                f"expected images in [{self.box[0]:g}, {self.box[1]:g}], got values from {low:.4g} to {high:.4g}; "
                "clamp them, or pass box=None"
            )

    def step_size(self, steps: int) -> float:
        """Length of a step such that ``steps`` of them can cross the ball; in ℓ0 ten times the width of the box.

        Pixels compete by their gradients then, and not by the colours they have already.
        """
        if self.norm == 0:
            assert self.box is not None
            return 10 * (self.box[1] - self.box[0])
        return 2.5 * self.eps / max(steps, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """Step of length 1 that increases fastest (largest entry 1 in ℓ0); 0 where the gradient vanishes."""
        if self.norm == "inf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        split = self.split(gradient)
        # Scaled by the largest entry first: squares of small float32 gradients underflow.
        split = split / expand(sample_norm(split, "inf").clamp(min=tiny), split)
        if self.norm == 2:
            split = split / expand(sample_norm(split).clamp(min=tiny), split)
        return split.view_as(gradient)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the ball around ``x`` and of the box near ``x_adv``: the nearest in ℓ∞ and ℓ0.

        In ℓ2 the nearest of the ball, then of the box; since ``x`` is in the box, this stays in the ball. Rounding to
        the numbers around ``x`` may lead out of it, most where a small change is the same for every pixel: what was
        rounded up is rounded down then.
        """
        delta = self.split(x_adv - x)
        if self.norm == "inf":
            delta = delta.clamp(-self.eps, self.eps)
        elif self.norm == 2:
            length = sample_norm(delta)
            shrink = torch.where(length > self.eps, self.eps / length.clamp(min=1e-38), torch.ones_like(length))
            delta = delta * expand(shrink, delta)
        else:
            delta = self._keep_pixels(delta, self.split(x))
        moved = x + delta.view_as(x)
        moved = moved if self.box is None else moved.clamp(*self.box)
        return self.round_inward(moved, x, delta.view_as(x))

    def round_inward(self, moved: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        """Where rounding ``x + delta`` to ``moved`` left the ball: with no entry farther off than ``delta``."""
        if self.norm == 0:
            return moved
        change = moved - x
        if self.norm == "inf":
            return torch.where(change.abs() > self.eps * (1 + _TOLERANCE), torch.nextafter(moved, x), moved)
        outside = sample_norm(change, parts=self.parts) > self.eps * (1 + _TOLERANCE)
        if not outside.any():
            return moved
        rounded_up = expand(outside, change) & (change.abs() > delta.abs())
        return torch.where(rounded_up, torch.nextafter(moved, x), moved)

    def random_point(self, x: Tensor, *, seed: int, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """A random point that depends on the seed and the sample.

        On the sphere in ℓ2, uniform in ℓ∞, random colours of some pixels in ℓ0.
        """
        noise = sample_normal(x, seed=seed, index=index)
        if self.norm == 2:
            return self.project(x + self.eps * self.direction(noise), x)
        uniform = torch.erf(noise / 2**0.5)
        if self.norm == "inf":
            return self.project(x + self.eps * uniform, x)
        assert self.box is not None
        return self.project(self.box[0] + (self.box[1] - self.box[0]) * (1 + uniform) / 2, x)

    def split(self, x: Tensor) -> Tensor:
        """``(N, parts·C, …)`` as ``(N·parts, C, …)``."""
        split: Tensor = x.unflatten(1, (self.parts, -1)).flatten(0, 1)
        return split

    def _keep_pixels(self, delta: Tensor, x: Tensor) -> Tensor:
        """The ``eps`` pixels whose change, clipped to the box, saves most of the squared distance to the target."""
        assert self.box is not None
        clipped = (x + delta).clamp(*self.box) - x
        saved = (2 * delta * clipped - clipped.square()).sum(1).flatten(1)
        count = min(int(self.eps), saved.shape[1])
        keep = torch.zeros_like(saved).scatter_(1, saved.topk(count, dim=1).indices, 1.0)
        return clipped * keep.view(len(delta), 1, *delta.shape[2:])
