"""Radii of classifiers: how far an image can move before the class with the largest logit can change."""

from __future__ import annotations

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.rounding import EPS, TINY, over_bound, round_down

_LEAST_SLOPE = 2.0**-450  # squares of what is smaller begin to lose digits in float64


def class_radius(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Answers ``(N,)`` int64 of a linear head on Lipschitz features, and the ℓ2 radius ``(N,)`` in which each stays.

    The logits are ``y_k = ⟨w_k, z⟩ + b_k``. Class ``i`` stays ahead of ``k`` while ``z`` moves by less than
    ``(y_i − y_k)/‖w_i − w_k‖``, its distance to that boundary, and the radius is the smallest of these over the other
    classes, divided by ``L``: nothing larger follows from ``z`` and ``L`` (Tsuzuku et al. 2018, with the exact distance
    for their bound ``√2·max‖w_k‖``). A tie of the largest logits has radius 0. In float64, rounded down.

    Args:
        z: features ``(N, D)``.
        weight: rows of the head, ``(C, D)``, at least two classes; exact as they stand.
        bias: ``(C,)``; None: none.
        lipschitz: bound of the encoder of the features, ℓ2 to ℓ2.
        feature_error: how far the features may be from those whose answer is certified, clean and moved together.

    Raises:
        ValueError: shapes that do not fit, or fewer than two classes.

    Example:
        >>> head = torch.eye(2)
        >>> answer, radius = class_radius(torch.tensor([[3.0, 1.0]]), head)
        >>> print(int(answer), f"{radius.item():.4f}")  # its distance to the diagonal
        0 1.4142
    """
    check_constants(0.0, lipschitz, feature_error)
    if weight.ndim != 2 or len(weight) < 2 or z.ndim != 2 or z.shape[1] != weight.shape[1]:
        raise LipsimError(
            f"expected features (N, D) and a head (C, D) of at least two classes, got {tuple(z.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LipsimError(f"expected a bias of {len(weight)} classes, got {tuple(bias.shape)}")
    features, rows = z.double(), weight.double()
    offset = torch.zeros(len(rows), dtype=torch.float64, device=rows.device) if bias is None else bias.double()
    logits = features @ rows.mT + offset
    answer = logits.argmax(1)
    # Differences of rows before the products: equal rows give exactly 0, and near ones keep their digits.
    apart = rows[answer].unsqueeze(1) - rows  # (N, C, D)
    lead = torch.einsum("ncd,nd->nc", apart, features) + (offset[answer].unsqueeze(1) - offset)
    # What sums of D products lose at most, by the sizes of what is summed (Higham 2002, §3.1), several times over.
    size = apart.abs() @ features.abs().unsqueeze(2)
    size = size.squeeze(2) + offset[answer].abs().unsqueeze(1) + offset.abs()
    # Products below the normal numbers lose digits whatever their size.
    loss = 8 * (z.shape[1] + 16) * (EPS * size + TINY)
    slope = torch.linalg.vector_norm(apart, dim=2) * (1 + (z.shape[1] + 16) * EPS)
    free = (lead - loss).clamp(min=0)
    # Equal rows differ in the bias at most, whatever the features; of rows nearer than squares tell nothing is known.
    equal = (apart == 0).all(2)
    distance = torch.where(slope > _LEAST_SLOPE, free / slope, torch.where(equal & (free > 0), torch.inf, 0.0))
    others = torch.ones_like(distance, dtype=torch.bool).scatter(1, answer.unsqueeze(1), False)
    # NaN logits have no radius; argmax would answer with the class of a NaN.
    known = torch.isfinite(logits).all(1, keepdim=True)
    smallest = torch.where(others, torch.where(known, distance, 0.0), torch.inf).amin(1)
    radius = over_bound((smallest - feature_error).clamp(min=0), lipschitz)
    return answer, round_down(radius, z.dtype)
