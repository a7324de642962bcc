"""An attack on features that may move as far as any L-Lipschitz encoder lets them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates.geometry import cosine_distance

Features = tuple[Tensor, Tensor, Tensor]


def margin(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """``d(x, x1) − d(x, x0)`` by the definition of the distance."""
    return cosine_distance(z, z1, anchor) - cosine_distance(z, z0, anchor)


def flips(features: Features, moved: Features, anchor: float) -> Tensor:
    """Which answers moved features change."""
    return torch.sign(margin(*features, anchor)) * torch.sign(margin(*moved, anchor)) < 0


def ascend(features: Features, budgets: dict[int, Tensor], anchor: float, steps: int = 400) -> Tensor:
    """Projected gradient ascent on the flipped margin over the features named in ``budgets``: which answers flip."""
    sign = -torch.sign(margin(*features, anchor))
    deltas = {i: torch.zeros_like(features[i], requires_grad=True) for i in budgets}
    flipped = torch.zeros(len(sign), dtype=torch.bool)
    for step in range(steps):
        moved = tuple(z + deltas[i] if i in deltas else z for i, z in enumerate(features))
        value = sign * margin(*moved, anchor)  # type: ignore[arg-type]
        flipped |= value.detach() > 0
        if flipped.all():
            break
        gradients = torch.autograd.grad(value.sum(), list(deltas.values()))
        for (i, delta), gradient in zip(deltas.items(), gradients, strict=True):
            budget = budgets[i].unsqueeze(1)
            size = budget * 2 / (1 + step / 10)
            new = delta.detach() + size * F.normalize(gradient, dim=1)
            length = torch.linalg.vector_norm(new, dim=1, keepdim=True)
            deltas[i] = (
                new * torch.minimum(budget / length.clamp(min=1e-300), torch.ones_like(length))
            ).requires_grad_()
    return flipped
