"""What an attack cost, and whether its gradients were of any use, sample by sample."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective


@dataclass(frozen=True)
class Passes:
    """How often the objective of each of N samples was computed and differentiated.

    A pass takes the moving images of one sample through the metric: one image, or three where all move. What stays is
    embedded when an objective is made, and costs none.

    Attributes:
        forward: ``(N,)`` int64.
        backward: ``(N,)`` int64; each comes with a forward pass that ``forward`` counts too.
    """

    forward: Tensor
    backward: Tensor

    @classmethod
    def none(cls, count: int, device: torch.device) -> Passes:
        """No pass on any of ``count`` samples."""
        return cls(*(torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2)))

    def put(self, rows: Tensor, passes: Passes) -> Passes:
        """These, with those of the samples at ``rows`` ``(M,)`` replaced."""
        forward, backward = self.forward.clone(), self.backward.clone()
        forward[rows], backward[rows] = passes.forward, passes.backward
        return Passes(forward, backward)

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __sub__(self, other: Passes) -> Passes:
        return Passes(self.forward - other.forward, self.backward - other.backward)


class WatchedObjective:
    """An objective that counts its passes and notes whose gradients are of any use.

    Any attack can be watched::

        watched = WatchedObjective(objective, x)
        x_adv = apgd(watched, x, eps=1.0)
        watched.passes.forward, watched.passes.backward  # (N,) each

    A metric that is flat around an image (clipped, saturated, quantised) gives attacks with gradients nothing to go by.
    That they fail there says nothing about its robustness, and must not be read as if it did.

    Args:
        objective: of N samples.
        x: ``(N, …)``, for their number and device alone.

    Attributes:
        found: ``(N,)`` bool, a gradient was finite and not zero.
    """

    def __init__(self, objective: Objective, x: Tensor) -> None:
        self.objective = objective
        self.found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._passes = Passes.none(len(x), x.device)
        self._rows = torch.arange(len(x), device=x.device)

    def __call__(self, x: Tensor) -> Tensor:
        # A sample may stand in several rows: a population, or several starts.
        self._passes.forward.index_add_(0, self._rows, torch.ones_like(self._rows))
        if x.requires_grad:
            x.register_hook(self._note)
        return self.objective(x)

    def select(self, rows: Tensor) -> WatchedObjective:
        """The objective of some of the samples, which notes on the same list."""
        part = copy.copy(self)
        part.objective, part._rows = self.objective.select(rows), self._rows[rows]
        return part

    @property
    def passes(self) -> Passes:
        """What was computed so far of each sample, ``(N,)``."""
        return Passes(self._passes.forward.clone(), self._passes.backward.clone())

    @property
    def no_gradient(self) -> Tensor:
        """``(N,)`` bool: gradients were computed, and each was zero or not finite."""
        return (self._passes.backward > 0) & ~self.found

    def _note(self, gradient: Tensor) -> None:
        flat = gradient.flatten(1)
        self._passes.backward.index_add_(0, self._rows, torch.ones_like(self._rows))
        self.found[self._rows[flat.isfinite().all(1) & flat.any(1)]] = True
