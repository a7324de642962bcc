"""Layers made of other layers, side by side on the same input."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipsim.layers.base import LipschitzLayer
from lipsim.utils.errors import LipsimError


class Branches(LipschitzLayer):
    """Modules that read the same input; the audit bounds each and this layer combines their bounds.

    Modules that change their input in place are not for branches: the others would read what they leave.
    """

    @abstractmethod
    def branches(self) -> dict[str, nn.Module]:
        """The modules, by attribute."""

    @abstractmethod
    def combine(self, bounds: Sequence[float]) -> float:
        """Bound of the whole layer from those of its branches, in the order of :meth:`branches`."""

    def lipschitz_bound(self) -> float:
        """Bound from the branches' own; :mod:`lipsim.audit` knows more modules than those that declare one.

        Raises:
            ValueError: a module in a branch declares no bound.
        """
        return self.combine([_declared_bound(branch) for branch in self.branches().values()])


class ResidualMixing(Branches):
    """Convex mixture ``(1 − a)·x + a·g(x)`` with a learned ``a`` in (0, 1), for ``g`` that keeps the shape.

    Bounded by ``(1 − a) + a·L_g``: 1-Lipschitz for every ``a`` where ``g`` is. It starts near the identity.

    Args:
        block: ``g``.
        share: ``a`` at the start.
    """

    def __init__(self, block: nn.Module, share: float = 0.1) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise LipsimError(f"expected a share in (0, 1), got {share}")
        self.block = block
        self.logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self, x: Tensor) -> Tensor:
        share, change = torch.sigmoid(self.logit), self.block(x)
        if change.shape != x.shape:
            raise LipsimError(f"expected a block that keeps the shape {tuple(x.shape)}, got {tuple(change.shape)}")
        # Not lerp: autocast leaves the block's output in another dtype than its input.
        mixed: Tensor = (1 - share) * x + share * change
        return mixed

    def branches(self) -> dict[str, nn.Module]:
        return {"block": self.block}

    def combine(self, bounds: Sequence[float]) -> float:
        # In the parameter's dtype, as forward computes it, and exactly, as a copy in float64 does.
        shares = (torch.sigmoid(logit) for logit in (self.logit.detach(), self.logit.detach().double()))
        factors = [(float((1 - share).double()), float(share.double())) for share in shares]
        return max(stay + share * bounds[0] for stay, share in factors) * _rounding(self.logit)


class ParallelMixing(Branches):
    """Features of two encoders side by side, ``(cos φ · f(x), sin φ · g(x))`` with a learned angle ``φ``.

    Bounded by ``√(cos² φ · L_f² + sin² φ · L_g²)``, so 1-Lipschitz where both are: what one branch does not need, the
    other one gets, and the mixture contains each of them.

    Args:
        first: ``f``, ``(N, …) → (N, D)``.
        second: ``g``, ``(N, …) → (N, D')``.
        angle: ``φ`` at the start, in radians.
    """

    def __init__(self, first: nn.Module, second: nn.Module, angle: float = math.pi / 4) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.angle = nn.Parameter(torch.tensor(angle))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cos(self.angle) * self.first(x), torch.sin(self.angle) * self.second(x)], dim=1)

    def branches(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second}

    def combine(self, bounds: Sequence[float]) -> float:
        angle = float(self.angle.detach().double())
        return math.hypot(math.cos(angle) * bounds[0], math.sin(angle) * bounds[1]) * _rounding(self.angle)


def _rounding(parameter: Tensor) -> float:
    """The factors are rounded in the dtype of the parameter they come from."""
    return 1 + 4 * torch.finfo(parameter.dtype).eps


def _declared_bound(module: nn.Module) -> float:
    if isinstance(module, LipschitzLayer):
        return module.lipschitz_bound()
    if type(module) in (nn.Sequential, nn.Identity, nn.ReLU):
        return math.prod(_declared_bound(child) for child in module._modules.values() if child is not None)
    raise LipsimError(f"{type(module).__name__} declares no Lipschitz bound; lipsim.audit knows more modules")
