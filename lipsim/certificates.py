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
are. Features of any size that float64 can hold are scaled before they are squared, and radii beyond the largest finite
number of a dtype are that number.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim import geometry
from lipsim.checks import check_count, check_number
from lipsim.geometry import anchored_norm, angle, binary_scale, project, rotation

_TURNS = (2, 1, 1)  # the reference turns against both candidates
_CHUNK = 2**24  # elements of a batch of differences
_EPS = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny  # the smallest number with all digits
# More than rounding to float32 changes a number in [0, 1], after a resize in float64 as well.
_FLOAT32_STEP = 2.0**-25 * (1 + 1e-6)


def linear_margin(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear margin ``g = ⟨z, w⟩ + κv`` and its slope ``‖w‖`` in feature space, ``(N,)`` each.

    ``g > 0`` where the metric prefers left: normalising the reference does not change the sign of
    ``d(x, x1) − d(x, x0)``, so the decision is a half-space of ``z``.
    """
    _check(anchor)
    (p0, s0), (p1, s1) = project(z0, anchor), project(z1, anchor)
    w, v = p0 - p1, s0 - s1
    return (z * w).sum(-1) + anchor * v, anchored_norm(w, 0.0)


def signed_reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0
) -> Tensor:
    """Signed distance of the reference to the decision boundary over ``L``, ``(N,)``: positive prefers left.

    Its absolute value is :func:`reference_radius`; fine-tuning maximises it on the side of the votes.
    """
    _check(anchor, lipschitz)
    g, slope = linear_margin(z, z0, z1, anchor=anchor)
    return _ratio(g, lipschitz * slope)


def reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Exact radius ``|g|/(L‖w‖)`` within which a perturbed *reference* keeps its answer, ``(N,)``, at least 0.

    It is the distance of ``z`` to the decision hyperplane, so no larger radius follows from ``z`` and ``L``. It is
    never below :func:`published_radius` for ``anchor ≥ 1``.
    """
    _check(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    (p0, s0), (p1, s1) = project(z0, anchor), project(z1, anchor)
    w, v = p0 - p1, s0 - s1
    slope = anchored_norm(w, 0.0)
    # In units of the reference's own size, of which the radius is a multiple, so that no product leaves the range.
    scale = binary_scale(z, anchor)
    z, constant = geometry.scaled(z, anchor, scale)
    error = torch.full_like(scale, feature_error) / scale
    norm = anchored_norm(torch.cat([z, constant.unsqueeze(-1)], -1), 0.0)
    norm0, norm1 = (anchored_norm(t, anchor) - feature_error for t in (z0, z1))
    # A unit vector turns by at most η/‖e‖ when e moves by η; ‖e‖ itself is known to η only, hence the subtraction.
    beta = feature_error / norm0 + feature_error / norm1 + _rounding(z)
    slack = error * slope + (norm + error) * beta
    known = (norm > error) & (norm0 > 0) & (norm1 > 0)
    g = torch.where(known, ((z * w).sum(-1) + constant * v).abs() - slack, 0.0).clamp(min=0)
    return _down(_over(_ratio(g, slope + beta) * scale, lipschitz), dtype)


def candidate_radii(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Radii within which a perturbed *left* or a perturbed *right* image keeps the answer, ``(N,)`` each.

    ``‖e_i‖·sin(min(|θ_1 − θ_0|, π/2))/L``: exact for ``anchor = 0``, a lower bound above.
    """
    _check(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    rounding = _rounding(z)
    norm, norm0, norm1 = (_norm(t, anchor) for t in (z, z0, z1))
    gap = _gap(z, z0, z1, anchor) - rounding
    turn, turn0, turn1 = (rotation(n, feature_error * (1 + rounding)) for n in (norm, norm0, norm1))
    radii = []
    for moving, still in ((norm0, turn1), (norm1, turn0)):
        free = (gap - 2 * turn - still).clamp(min=0, max=math.pi / 2)
        reach = moving * torch.sin(free) * (1 - rounding) - feature_error
        radii.append(_down(_over(reach.clamp(min=0), lipschitz), dtype))
    return radii[0], radii[1]


def joint_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius of a common budget: all three images may move by less than it, each, and the answer stays, ``(N,)``.

    The largest ε with ``2α(e, Lε) + α(e0, Lε) + α(e1, Lε) < |θ_1 − θ_0|``, by bisection, rounded down. Its gradient is
    that of the equation (implicit differentiation).
    """
    _check(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, _doubles(z, z0, z1)
    radius = _joint((z, z0, z1), anchor, _rounding(z))
    return _down(_over((radius - feature_error).clamp(min=0), lipschitz), dtype)


def signed_joint_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """:func:`joint_radius` with the sign of the margin, ``(N,)``: positive prefers left. What a loss can push."""
    _check(anchor, lipschitz)
    g, _ = linear_margin(z, z0, z1, anchor=anchor)
    return torch.sign(g.detach()) * _over(_joint((z, z0, z1), anchor), lipschitz)


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
    _check(anchor, lipschitz, feature_error)
    dtype, (z, y) = z.dtype, _doubles(z, y)
    rounding = _rounding(z)
    theta = angle(z, y, anchor)
    turn = torch.full_like(theta, rounding)
    for features, budget in ((z, eps), (y, eps_other)):
        budget = torch.as_tensor(budget, dtype=theta.dtype, device=theta.device)
        if (budget < 0).any():
            raise ValueError(f"expected budgets eps ≥ 0, got {float(budget.min())}")
        moved = lipschitz * budget if math.isfinite(lipschitz) else torch.where(budget > 0, math.inf, 0.0)
        turn = turn + rotation(_norm(features, anchor), (moved + feature_error) * (1 + rounding))
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
    threshold = check_number("threshold in [0, 2], the range of the distance,", threshold, 0, 2)
    _check(anchor, lipschitz, feature_error)
    dtype, (z, y) = z.dtype, _doubles(z, y)
    rounding = _rounding(z)
    # Keeps the digits of thresholds near 0 and near 2.
    boundary = 2 * math.atan2(math.sqrt(threshold), math.sqrt(2 - threshold))
    turn = rotation(_norm(y, anchor), feature_error * (1 + rounding)) + rounding
    free = ((angle(z, y, anchor) - boundary).abs() - turn).clamp(min=0, max=math.pi / 2)
    reach = _norm(z, anchor) * torch.sin(free) * (1 - rounding) - feature_error
    return _down(_over(reach.clamp(min=0), lipschitz), dtype)


def retrieval_radius(
    z: Tensor, gallery: Tensor, *, k: int = 1, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which a query ``(N, D)`` keeps the *set* of its ``k`` nearest gallery items ``(M, D)``, ``(N,)``.

    The minimum of :func:`reference_radius` over swaps of one item inside with one outside, which is exact. In float64.

    Raises:
        ValueError: not ``1 ≤ k < M``.
    """
    _check(anchor, lipschitz, feature_error)
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
    _check(anchor, lipschitz)
    (p, s), (p0, s0), (p1, s1) = project(z, anchor), project(z0, anchor), project(z1, anchor)
    h = (p * (p0 - p1)).sum(-1) + s * (s0 - s1)
    slope = torch.hypot(anchored_norm(p0 - p1, 0.0), s0 - s1)
    return _ratio(h.abs(), lipschitz * slope)


def linf_radius(radius: Tensor, num_elements: int) -> Tensor:
    """ℓ∞ radius ``R/√n`` that an ℓ2 radius implies on inputs of ``num_elements = 3·H·W`` values."""
    return radius / math.sqrt(check_count("num_elements", num_elements))


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
        radius: ``(N,)`` ℓ2 radii; none where it is negative or NaN.

    Raises:
        ValueError: the images are no floating-point numbers.
    """
    if not x.dtype.is_floating_point:
        raise ValueError(f"expected floating-point images in [0, 1], got {x.dtype}; divide 8-bit images by 255")
    # Rounded up; no pixel costs less than a quarter a channel, so few are ever certified and only those are sorted.
    # ½ + |x − ½| = max(x, 1 − x), where torch.maximum is an order of magnitude slower.
    cost = (x - 0.5).abs_().add_(0.5).square_().sum(1).flatten(1) * (1 + 8 * torch.finfo(x.dtype).eps)
    square = radius.double().nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0).square()
    most = float(square.max()) / (x.shape[1] / 4) if len(square) else 0.0
    count = int(min(cost.shape[1], most + 2))
    total = cost.topk(count, dim=-1).values.double().cumsum(-1) * (1 + count * _EPS)
    return (total < square.unsqueeze(-1)).sum(-1)


def resize_norm(original: tuple[int, int], image_size: int) -> float:
    """ℓ2 operator norm of the antialiased bicubic resize from ``(H, W)`` to a square of ``image_size``, rounded up.

    The resize is linear and separable, so its norm is the product of those of two one-dimensional maps, each from an
    SVD in float64. :class:`lipsim.data.Preprocess` resizes in float64, too; that of float32 has a norm of its own, up
    to 4e-6 larger. See :func:`original_radius` for what the norm is worth in the pixels of a file.
    """
    return math.prod(_axis_norm(size, image_size) for size in original)


@lru_cache
def _axis_norm(size: int, image_size: int) -> float:
    rows = []
    for start in range(0, size, 256):  # of the identity, which for a large photograph is too large as a whole
        basis = torch.eye(min(256, size - start), size - start, dtype=torch.float64)
        basis = F.pad(basis, (start, 0)).unsqueeze(1).unsqueeze(1)
        rows.append(F.interpolate(basis, size=(1, image_size), mode="bicubic", antialias=True).flatten(1))
    # An SVD is off by a modest multiple of n roundings.
    return float(torch.linalg.matrix_norm(torch.cat(rows), ord=2)) * (1 + 8 * (size + image_size) * _EPS)


def original_radius(radius: float, original: tuple[int, int], image_size: int) -> float:
    """Radius in the pixels of an RGB file of ``(H, W)`` that one in the metric's input implies.

    The file's values over 255 (or 65535) are exact in the file, and rounded to float32 twice on their way: when read,
    and when resized (in float64; images of the right size are not). Both roundings count twice, for the file and for
    the changed one.

    Args:
        radius: in the space of the encoder's input, ``(3, image_size, image_size)``.
        original: height and width of the file, of which any order has the same norm.
        image_size: side of the input, reached by :class:`lipsim.data.Preprocess` with the resize "float".

    Returns:
        The radius, at least 0.
    """
    read = 2 * _FLOAT32_STEP * math.sqrt(3 * original[0] * original[1])
    if tuple(original) == (image_size, image_size):
        return max(0.0, radius - read) * (1 - 4 * _EPS)
    resized = 2 * _FLOAT32_STEP * math.sqrt(3) * image_size
    return max(0.0, max(0.0, radius - resized) / resize_norm(original, image_size) - read) * (1 - 4 * _EPS)


def _gap(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """How much nearer, as an angle, one candidate is than the other, ``(N,)``."""
    return (angle(z, z1, anchor) - angle(z, z0, anchor)).abs()


def _joint(features: tuple[Tensor, Tensor, Tensor], anchor: float, rounding: float = 0.0) -> Tensor:
    """Joint radius in feature space, in the dtype of the features, rounded down as far as ``rounding`` says."""
    norms = tuple(_norm(t, anchor) for t in features)
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
    slopes = [c / ((n - radius).sqrt() * (n + radius).sqrt()) for c, n in zip(_TURNS, norms, strict=True)]
    slope = (slopes[0] + slopes[1] + slopes[2]).detach()
    excess = torch.where(known, _turned(norms, radius) - gap, 0.0)
    return (excess.detach() - excess) / slope


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0, with zero gradient, where it is not finite."""
    valid = (denominator > 0) & torch.isfinite(denominator) & torch.isfinite(numerator)
    return torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0)


def _over(radius: Tensor, lipschitz: float) -> Tensor:
    """A radius in feature space over ``L``, at most the largest finite number; 0 without a bound and where unknown."""
    if lipschitz == 0 or lipschitz == math.inf:
        return torch.zeros_like(radius)
    radius = torch.where(torch.isnan(radius), 0.0, radius)
    return (radius / lipschitz).clamp(max=torch.finfo(radius.dtype).max)


def _norm(z: Tensor, anchor: float) -> Tensor:
    """Anchored norm, rounded down to the largest finite number, and to 0 where it has not all its digits."""
    norm = anchored_norm(z, anchor).clamp(max=torch.finfo(z.dtype).max)
    return torch.where(norm < _TINY, norm * 0, norm) if z.dtype == torch.float64 else norm


def _check(anchor: float, lipschitz: float = 1.0, feature_error: float = 0.0) -> None:
    """Refuse numbers with which a certificate would be none.

    Raises:
        ValueError: one is negative, NaN, no number, or (but for ``lipschitz``) infinite.
    """
    check_number("anchor", anchor)
    check_number("Lipschitz bound", lipschitz, finite=False)
    check_number("feature_error", feature_error)


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
    """Rounded down to a dtype, at most its largest finite number, 0 for NaN; covers the roundings of a few operations.

    What is below the smallest normal number is 0.
    """
    info = torch.finfo(dtype)
    value = torch.where(value > info.tiny, value, 0.0).clamp(max=info.max)
    return (value * (1 - 4 * info.eps)).to(dtype)


def _up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded up to a dtype; what is above 0 is at least its smallest normal number."""
    info = torch.finfo(dtype)
    value = torch.where(value > 0, value.clamp(min=info.tiny), value)
    return (value * (1 + 4 * info.eps)).to(dtype)


def _one_minus_cos(theta: Tensor) -> Tensor:
    return 2 * torch.sin(theta / 2).square()
