"""Factors of appearance: what a built-in image is described by, and how far apart two descriptions are.

A description (a frozen dataclass of floats such as ``SceneParameters``) is a point in a space with one axis per factor.
Along every axis one *step* is meant to be about equally visible, a few just noticeable differences, so the plain
Euclidean distance in steps is the size of a move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Description = TypeVar("Description", bound="DataclassInstance")


@dataclass(frozen=True)
class Factor:
    """One axis of appearance.

    Attributes:
        name: the field of the description that it moves.
        low: least value, in the unit of that field.
        high: greatest value.
        step: change that is about as visible as one step of any other factor; a difference of natural logarithms if
            ``log``.
        start: least and greatest value of a reference, if they differ from ``low`` and ``high``.
        weight: how often a move changes it, relative to the others.
        log: whether equal ratios, not equal differences, look equal (sizes, frequencies); needs ``low > 0``.
    """

    name: str
    low: float
    high: float
    step: float
    log: bool = False
    start: tuple[float, float] | None = None
    weight: float = 1.0

    def to_steps(self, value: float) -> float:
        """Position of a value on the axis, in steps."""
        return (math.log(value) if self.log else value) / self.step

    def from_steps(self, position: float) -> float:
        """Value at a position; the inverse of :meth:`to_steps`."""
        return math.exp(position * self.step) if self.log else position * self.step

    def sample(self, rng: np.random.Generator) -> float:
        """A reference's value, drawn evenly over the axis."""
        low, high = self.start or (self.low, self.high)
        return self.from_steps(rng.uniform(self.to_steps(low), self.to_steps(high)))

    def shift(self, value: float, steps: float) -> float:
        """The value ``steps`` further; turned round where that leaves the range, and clipped if both ways do."""
        low, high, start = self.to_steps(self.low), self.to_steps(self.high), self.to_steps(value)
        end = start + steps
        if not low <= end <= high:
            end = start - steps
        return self.from_steps(min(max(end, low), high))


def sample_values(factors: Sequence[Factor], rng: np.random.Generator) -> dict[str, float]:
    """One value per factor, by field name."""
    return {factor.name: factor.sample(rng) for factor in factors}


def move(
    description: Description,
    factors: Sequence[Factor],
    size: float,
    rng: np.random.Generator,
    *,
    num_moved: int,
) -> Description:
    """The description moved by about ``size`` steps in a random direction.

    Args:
        description: where to start.
        factors: the axes.
        size: length of the move in steps; the result can be nearer where a range ends (see :func:`move_size`).
        rng: source of the direction.
        num_moved: how many factors change; people notice changes of few things at a time.

    Returns:
        A copy of the description with ``num_moved`` fields changed.
    """
    weights = np.array([factor.weight for factor in factors])
    chosen = rng.choice(len(factors), size=num_moved, replace=False, p=weights / weights.sum())
    direction = rng.standard_normal(num_moved)
    direction *= size / np.linalg.norm(direction)
    changes: dict[str, Any] = {
        factors[i].name: factors[i].shift(getattr(description, factors[i].name), float(steps))
        for i, steps in zip(chosen, direction, strict=True)
    }
    return replace(description, **changes)


def move_size(first: Description, second: Description, factors: Sequence[Factor]) -> float:
    """Euclidean distance of two descriptions in steps."""
    return math.hypot(
        *(f.to_steps(getattr(first, f.name)) - f.to_steps(getattr(second, f.name)) for f in factors),
    )
