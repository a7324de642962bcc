"""Learning-rate schedules as factors of the optimizer's own rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise

from lipsim.certificates.numbers import check_count, check_number
from lipsim.utils.errors import LipsimError


class Schedule(ABC):
    """The factor of the learning rate at a step.

    Attributes:
        needs_end: whether it depends on the length of the training.
    """

    needs_end: bool = True

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Factor at optimizer step ``step`` of ``total``."""


class WarmupCosine(Schedule):
    """Linear warm-up, then a cosine to 0 (LipSim's distillation: 2,000 warm-up steps).

    Args:
        warmup_steps: steps of the linear part; at most half of a shorter run.
    """

    def __init__(self, warmup_steps: int = 2000) -> None:
        self.warmup_steps = check_count("warmup_steps", warmup_steps, least=0)

    def __call__(self, step: int, total: int) -> float:
        warmup = min(self.warmup_steps, total // 2)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


class Triangular(Schedule):
    """Piecewise linear: 0 to 1 at ``peak``, down to ``knee_factor`` at ``knee``, 0 at the end (LipSim's fine-tuning).

    Args:
        peak: fraction of the run at which the rate is full.
        knee: fraction at which the fall slows down.
        knee_factor: factor there.

    Raises:
        ValueError: not ``0 < peak < knee < 1``.
    """

    def __init__(self, peak: float = 0.4, knee: float = 0.8, knee_factor: float = 0.05) -> None:
        if not 0 < peak < knee < 1:
            raise LipsimError(f"expected 0 < peak < knee < 1, got peak {peak} and knee {knee}")
        self.peak, self.knee, self.knee_factor = peak, knee, check_number("knee_factor", knee_factor)

    def __call__(self, step: int, total: int) -> float:
        at = (step + 1) / (total + 1)
        points = [(0.0, 0.0), (self.peak, 1.0), (self.knee, self.knee_factor), (1.0, 0.0)]
        for (left, low), (right, high) in pairwise(points):
            if at <= right:
                return low + (high - low) * (at - left) / (right - left)
        return 0.0


class Constant(Schedule):
    """The optimizer's own rate throughout."""

    needs_end = False

    def __call__(self, step: int, total: int) -> float:
        return 1.0
