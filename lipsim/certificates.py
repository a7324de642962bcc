"""Radii and bounds that hold for every encoder with a known Lipschitz constant: pure functions on feature tensors.

Notation (all features are ``f(x)``, shape ``(N, D)``, before anchor and projection; see :mod:`lipsim.geometry`):

- ``z, z0, z1``: features of reference, left and right; ``e = (z, κ)`` with the anchor ``κ``; ``p = e/‖e‖``;
- ``w, v``: feature part and anchor part of ``p(z0) − p(z1)``; the metric prefers left where ``g = ⟨z, w⟩ + κv > 0``;
- ``lipschitz``: an upper bound ``L`` on the Lipschitz constant of the encoder, ℓ2 to ℓ2 (see :mod:`lipsim.audit`);
- ``feature_error``: ``η``, how far the given features may be from those whose answer is certified, at the clean and at
  the perturbed point together, in feature units. 0 certifies exact arithmetic; twice the largest error of one float32
  embedding certifies the answer of the deployed float32 network.

Radii are ℓ2 distances in the space of the encoder's input, ``(N,)``, and certify every perturbation strictly shorter.
Ties, NaN and zero denominators have radius 0. Everything follows from ``‖f(x) − f(x')‖ ≤ L‖x − x'‖`` alone.

Radii and bounds are computed in float64 and rounded outward: what the rounding of this file's own arithmetic can be
worth is taken off, and the result is rounded down (upper bounds: up) to the dtype of the features. Signed radii and
margins, which losses push, and the published radius, which proves nothing, stay in the dtype of the features as they
are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.geometry import anchored_norm, angle, project, rotation

_TURNS = (2, 1, 1)  # the reference turns against both candidates
_CHUNK = 2**24  # elements of a batch of differences
_EPS = torch.finfo(torch.float64).eps


def linear_margin(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear margin ``g = ⟨z, w⟩ + κv`` and its slope ``‖w‖`` in feature space, ``(N,)`` each.

    ``g > 0`` where the metric prefers left: normalising the reference does not change the sign of
    ``d(x, x1) − d(x, x0)``, so the decision is a half-space of ``z``.
    """
    (p0, s0), (p1, s1) = project(z0, anchor), project(z1, anchor)
    w, v = p0 - p1, s0 - s1
    return (z * w).sum(-1) + anchor * v, torch.linalg.vector_norm(w, dim=-1)


def signed_reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0
) -> Tensor:
    """Signed distance of the reference to the decision boundary over ``L``, ``(N,)``: positive prefers left.

    Its absolute value is :func:`reference_radius`; fine-tuning maximises it on the side of the votes.
    """
    g, slope = linear_margin(z, z0, z1, anchor=anchor)
    return _ratio(g, lipschitz * slope)


def reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Exact radius ``|g|/(L‖w‖)`` within which a perturbed *reference* keeps its answer, ``(N,)``, at least 0.

    It is the distance of ``z`` to the decision hyperplane, so no larger radius follows from ``z`` and ``L``. It is
    never below :func:`published_radius` for ``anchor ≥ 1``.
    """
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    g, slope = linear_margin(z, z0, z1, anchor=anchor)
    norm, norm0, norm1 = (anchored_norm(t, anchor) - feature_error for t in (z, z0, z1))
    # A unit vector turns by at most η/‖e‖ when e moves by η; ‖e‖ itself is known to η only, hence the subtraction.
    beta = feature_error / norm0 + feature_error / norm1 + _rounding(z)
    slack = feature_error * slope + (norm + 2 * feature_error) * beta
    known = (norm > 0) & (norm0 > 0) & (norm1 > 0)
    g = torch.where(known, g.abs() - slack, 0.0).clamp(min=0)
    return _down(_ratio(g, lipschitz * (slope + beta)), dtype)


def candidate_radii(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Radii within which a perturbed *left* or a perturbed *right* image keeps the answer, ``(N,)`` each.

    ``‖e_i‖·sin(min(|θ_1 − θ_0|, π/2))/L``: exact for ``anchor = 0``, a lower bound above.
    """
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    rounding = _rounding(z)
    norm, norm0, norm1 = (anchored_norm(t, anchor) for t in (z, z0, z1))
    gap = _gap(z, z0, z1, anchor) - rounding
    turn, turn0, turn1 = (rotation(n, feature_error * (1 + rounding)) for n in (norm, norm0, norm1))
    radii = []
    for moving, still in ((norm0, turn1), (norm1, turn0)):
        free = (gap - 2 * turn - still).clamp(min=0, max=math.pi / 2)
        reach = moving * torch.sin(free) * (1 - rounding) - feature_error
        radii.append(_down(reach.clamp(min=0) / lipschitz, dtype))
    return radii[0], radii[1]


def joint_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius of a common budget: all three images may move by less than it, each, and the answer stays, ``(N,)``.

    The largest ε with ``2α(e, Lε) + α(e0, Lε) + α(e1, Lε) < |θ_1 − θ_0|``, by bisection, rounded down. Its gradient is
    that of the equation (implicit differentiation).
    """
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    radius = _joint((z, z0, z1), anchor, _rounding(z))
    return _down((radius - feature_error).clamp(min=0) / lipschitz, dtype)


def signed_joint_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """:func:`joint_radius` with the sign of the margin, ``(N,)``: positive prefers left. What a loss can push."""
    g, _ = linear_margin(z, z0, z1, anchor=anchor)
    return torch.sign(g.detach()) * _finite(_joint((z, z0, z1), anchor) / lipschitz)


def distance_interval(
    z: Tensor,
    y: Tensor,
    eps: Tensor | float,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    eps_other: Tensor | float = 0.0,
    feature_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Interval ``(lower, upper)`` of the distance when ``x`` moves by at most ``eps`` (and ``y`` by ``eps_other``).

    ``[1 − cos(max(0, θ − α)), 1 − cos(min(π, θ + α))]``, ``(N,)`` each; the two angles ``α`` add up when both move.

    Raises:
        ValueError: a budget is negative.
    """
    dtype, (z, y) = z.dtype, _doubles(z, y)
    rounding = _rounding(z)
    theta = angle(z, y, anchor)
    turn = torch.full_like(theta, rounding)
    for features, budget in ((z, eps), (y, eps_other)):
        budget = torch.as_tensor(budget, dtype=theta.dtype, device=theta.device)
        if (budget < 0).any():
            raise ValueError(f"expected budgets eps ≥ 0, got {float(budget.min())}")
        moved = lipschitz * budget if math.isfinite(lipschitz) else torch.where(budget > 0, math.inf, 0.0)
        turn = turn + rotation(anchored_norm(features, anchor), (moved + feature_error) * (1 + rounding))
    lower = _one_minus_cos((theta - turn).clamp(min=0))
    upper = _one_minus_cos((theta + turn).clamp(max=math.pi))
    unknown = torch.isnan(theta) | torch.isnan(turn)
    lower, upper = torch.where(unknown, 0.0, lower), torch.where(unknown, 2.0, upper)
    return _down(lower, dtype), _up(upper, dtype).clamp(max=2)


def threshold_radius(
    z: Tensor, y: Tensor, threshold: float, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which the answer to "is ``d(x, y) ≤ threshold``?" stays when ``x`` moves, ``(N,)``.

    ``‖e‖·sin(min(|θ_τ − θ|, π/2))/L`` with ``θ_τ = arccos(1 − τ)``.

    Raises:
        ValueError: the threshold is outside [0, 2].
    """
    if not 0 <= threshold <= 2:
        raise ValueError(f"expected a threshold in [0, 2], the range of the distance, got {threshold}")
    dtype, (z, y) = z.dtype, _doubles(z, y)
    rounding = _rounding(z)
    # Keeps the digits of thresholds near 0 and near 2.
    boundary = 2 * math.atan2(math.sqrt(threshold), math.sqrt(2 - threshold))
    turn = rotation(anchored_norm(y, anchor), feature_error * (1 + rounding)) + rounding
    free = ((angle(z, y, anchor) - boundary).abs() - turn).clamp(min=0, max=math.pi / 2)
    reach = anchored_norm(z, anchor) * torch.sin(free) * (1 - rounding) - feature_error
    return _down(reach.clamp(min=0) / lipschitz, dtype)


def retrieval_radius(
    z: Tensor, gallery: Tensor, *, k: int = 1, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which a query ``(N, D)`` keeps the *set* of its ``k`` nearest gallery items ``(M, D)``, ``(N,)``.

    The minimum of :func:`reference_radius` over swaps of one item inside with one outside, which is exact. In float64.

    Raises:
        ValueError: not ``1 ≤ k < M``.
    """
    if not 1 <= k < len(gallery):
        raise ValueError(f"expected 1 ≤ k < {len(gallery)} (the size of the gallery), got k = {k}")
    # In float64: near-duplicates are ordered and told apart by what float32 rounds away.
    z, gallery = z.double(), gallery.double()
    p, s = project(gallery, anchor)
    order = (z @ p.mT + anchor * s).argsort(dim=-1, descending=True, stable=True)
    inside = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :k], True)
    radius = torch.full_like(z[:, 0], math.inf)
    # Differences of embeddings, not of similarities: near-duplicates in the gallery keep their digits.
    chunk = max(1, _CHUNK // max(1, z.numel()))
    for member in order[:, :k].unbind(-1):
        for start in range(0, len(gallery), chunk):
            others = gallery[start : start + chunk]
            swaps = reference_radius(
                z.unsqueeze(1),
                gallery[member].unsqueeze(1),
                others,
                anchor=anchor,
                lipschitz=lipschitz,
                feature_error=feature_error,
            )
            swaps = torch.where(inside[:, start : start + chunk], math.inf, swaps)
            radius = torch.minimum(radius, swaps.amin(1))
    return radius


def published_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """Radius as published with LipSim, ``|⟨p, p0 − p1⟩|/(L‖p0 − p1‖)``, ``(N,)``: for comparison only.

    Not sound for ``anchor = 0`` where ``‖z‖ < 1``: it overclaims there by ``1/‖z‖`` (Ghazanfari et al. 2024, §3).
    """
    (p, s), (p0, s0), (p1, s1) = project(z, anchor), project(z0, anchor), project(z1, anchor)
    h = (p * (p0 - p1)).sum(-1) + s * (s0 - s1)
    slope = torch.sqrt((p0 - p1).square().sum(-1) + (s0 - s1).square())
    return _ratio(h.abs(), lipschitz * slope)


def linf_radius(radius: Tensor, num_elements: int) -> Tensor:
    """ℓ∞ radius ``R/√n`` that an ℓ2 radius implies on inputs of ``num_elements = 3·H·W`` values."""
    return radius / math.sqrt(num_elements)


def l1_radius(radius: Tensor) -> Tensor:
    """ℓ1 radius that an ℓ2 radius implies: the same number, because ``‖δ‖₂ ≤ ‖δ‖₁``."""
    return radius


def certified_pixels(x: Tensor, radius: Tensor) -> Tensor:
    """Number of pixels of ``x`` that may take any colour in [0, 1] without changing the answer, ``(N,)`` int64.

    Pixel ``u`` can move ``x`` by at most ``c_u = Σ_channels max(x_u, 1 − x_u)²`` in squared ℓ2; the certified number is
    the largest ``k`` whose ``k`` largest ``c_u`` sum to less than ``R²``. A radius above √3 proves that no one-pixel
    attack (Su et al. 2017) can flip the answer.

    Args:
        x: images ``(N, 3, H, W)`` in [0, 1].
        radius: ``(N,)`` ℓ2 radii.
    """
    # Rounded up; no pixel costs less than a quarter a channel, so few are ever certified and only those are sorted.
    # ½ + |x − ½| = max(x, 1 − x), where torch.maximum is an order of magnitude slower.
    cost = (x - 0.5).abs_().add_(0.5).square_().sum(1).flatten(1) * (1 + 8 * torch.finfo(x.dtype).eps)
    square = torch.nan_to_num(radius.double(), nan=0.0).square()
    most = float(square.max()) / (x.shape[1] / 4) if len(square) else 0.0
    count = int(min(cost.shape[1], most + 2))
    total = cost.topk(count, dim=-1).values.double().cumsum(-1) * (1 + count * _EPS)
    return (total < square.unsqueeze(-1)).sum(-1)


def resize_norm(original: tuple[int, int], image_size: int) -> float:
    """Exact ℓ2 operator norm of the antialiased bicubic float resize from ``(H, W)`` to a square of ``image_size``.

    A radius divided by it holds in the user's own pixels. The resize is linear and separable, so its norm is the
    product of those of two one-dimensional maps, each from an SVD in float64 (rounded up).
    """
    norm = 1.0
    for size in original:
        rows = []
        for start in range(0, size, 256):  # of the identity, which for a large photograph is too large as a whole
            basis = torch.eye(min(256, size - start), size - start, dtype=torch.float64)
            basis = F.pad(basis, (start, 0)).unsqueeze(1).unsqueeze(1)
            rows.append(F.interpolate(basis, size=(1, image_size), mode="bicubic", antialias=True).flatten(1))
        matrix = torch.cat(rows)
        norm *= float(torch.linalg.matrix_norm(matrix, ord=2)) * (1 + 1e-12)
    return norm


def _gap(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """How much nearer, as an angle, one candidate is than the other, ``(N,)``."""
    return (angle(z, z1, anchor) - angle(z, z0, anchor)).abs()


def _joint(features: tuple[Tensor, Tensor, Tensor], anchor: float, rounding: float = 0.0) -> Tensor:
    """Joint radius in feature space, in the dtype of the features, rounded down as far as ``rounding`` says."""
    norms = tuple(anchored_norm(t, anchor) for t in features)
    gap = _gap(*features, anchor) - rounding
    with torch.no_grad():
        low, high = torch.zeros_like(gap), torch.minimum(norms[0], torch.minimum(norms[1], norms[2])).expand_as(gap)
        for _ in range(60 if gap.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            holds = _turned(norms, middle * (1 + rounding)) < gap
            low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low + _implicit(norms, gap, low) if gap.requires_grad else low


def _turned(norms: tuple[Tensor, ...], radius: Tensor) -> Tensor:
    """How far the difference of two angles can turn when reference, left and right move by at most ``radius``."""
    reference, left, right = (c * rotation(norm, radius) for c, norm in zip(_TURNS, norms, strict=True))
    return reference + left + right


def _implicit(norms: tuple[Tensor, ...], gap: Tensor, radius: Tensor) -> Tensor:
    """Zeros with the gradient of the ``radius`` that solves ``_turned(norms, radius) = gap``."""
    with torch.no_grad():
        # At the smallest norm the arcsine is vertical; vectors without a length have no gradient.
        radius = torch.minimum(radius, (1 - 1e-6) * torch.stack([n.expand_as(gap) for n in norms]).amin(0))
        known = radius > 0
        radius = torch.where(known, radius, 0.0)
    norms = tuple(torch.where(known, norm, 1.0) for norm in norms)
    slopes = [c / (n.square() - radius.square()).sqrt() for c, n in zip(_TURNS, norms, strict=True)]
    slope = (slopes[0] + slopes[1] + slopes[2]).detach()
    excess = torch.where(known, _turned(norms, radius) - gap, 0.0)
    return (excess.detach() - excess) / slope


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0, with zero gradient, where it is not finite."""
    valid = (denominator > 0) & torch.isfinite(denominator) & torch.isfinite(numerator)
    return torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0)


def _finite(radius: Tensor) -> Tensor:
    return torch.where(torch.isfinite(radius), radius, torch.zeros_like(radius))


def _doubles(*features: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in features)


def _rounding(z: Tensor) -> float:
    """More than float64 loses in unit vectors of ``D`` features, scalar products with them, and angles between them.

    With the unit roundoff ``u`` and sums of ``D`` terms in any order: a unit vector is off by ``(D/2 + 6)u``, the
    difference of two by twice that, ``⟨e, p0 − p1⟩`` by ``(3D + 16)u‖e‖``, and the difference of two angles by
    ``(6D + 60)u`` (Higham 2002, §3.1; ``‖p − q‖² + ‖p + q‖² = 4`` makes the angle a 1-Lipschitz function of both).
    """
    return 8 * (z.shape[-1] + 16) * _EPS


def _down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded down to a dtype, 0 where not finite; covers the roundings of a few operations, too."""
    info = torch.finfo(dtype)
    value = torch.where(value > info.tiny, _finite(value), 0.0)
    return (value * (1 - 4 * info.eps)).to(dtype)


def _up(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value * (1 + 4 * torch.finfo(dtype).eps)).to(dtype)


def _one_minus_cos(theta: Tensor) -> Tensor:
    return 2 * torch.sin(theta / 2).square()
