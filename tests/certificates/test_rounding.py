"""Radii and bounds against the same formulas in fifty digits: rounding never certifies more, and costs little."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from lipsim import certificates as C

mpmath.mp.dps = 50
Vector = list[mpmath.mpf]
# From answers that are clear to answers that float64 only just tells apart.
DIFFERENCES = [1e-1, 1e-4, 1e-7, 1e-10, 1e-13]
ANCHORS = [0.0, 1.0]


def _near_ties(difference: float, dtype: torch.dtype, size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    z, z0 = torch.randn(2, 12, size, dtype=torch.float64)
    z1 = z0 + difference * torch.randn(12, size, dtype=torch.float64)
    return 3 * z.to(dtype), z0.to(dtype), z1.to(dtype)


def _vector(z: Tensor, anchor: float) -> Vector:
    """``(z, κ)``, exactly."""
    return [mpmath.mpf(value) for value in z.tolist()] + [mpmath.mpf(anchor)]


def _norm(e: Vector) -> mpmath.mpf:
    return mpmath.sqrt(mpmath.fsum(value**2 for value in e))


def _unit(e: Vector) -> Vector:
    norm = _norm(e)
    return [value / norm for value in e]


def _angle(e: Vector, other: Vector) -> mpmath.mpf:
    p, q = _unit(e), _unit(other)
    difference = _norm([a - b for a, b in zip(p, q, strict=True)])
    return 2 * mpmath.atan2(difference, _norm([a + b for a, b in zip(p, q, strict=True)]))


def _gap(e: Vector, e0: Vector, e1: Vector) -> mpmath.mpf:
    return abs(_angle(e, e1) - _angle(e, e0))


def _reference(e: Vector, e0: Vector, e1: Vector) -> mpmath.mpf:
    u = [a - b for a, b in zip(_unit(e0), _unit(e1), strict=True)]
    return abs(mpmath.fsum(a * b for a, b in zip(e, u, strict=True))) / _norm(u[:-1])


def _candidate(which: int) -> Callable[..., mpmath.mpf]:
    return lambda *e: _norm(e[1 + which]) * mpmath.sin(min(_gap(*e), mpmath.pi / 2))


def _joint(*e: Vector) -> mpmath.mpf:
    """From the largest distance, over all v, of the cone's boundary; what a plane says of it is in test_joint.py."""
    (p, p0, p1), norms = [_unit(v) for v in e], [_norm(v) for v in e]
    axes = [[a + sign * b for a, b in zip(p0, p1, strict=True)] for sign in (-1, 1)]
    parts = [mpmath.fsum(a * b for a, b in zip(p, axis, strict=True)) ** 2 / (_norm(axis) ** 2 or 1) for axis in axes]
    opening, rest = _norm(axes[0]) ** 2 / 4, max(1 - parts[0] - parts[1], mpmath.mpf(0))

    def bound(v: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        terms = [(parts[0], v), (parts[1], v - 1), (rest, v - opening)]
        return sum(a / b for a, b in terms), sum(a / b**2 for a, b in terms)

    def turned(radius: mpmath.mpf) -> mpmath.mpf:
        if radius >= min(norms[1:]):
            return mpmath.mpf(1)
        return mpmath.sin((mpmath.asin(radius / norms[1]) + mpmath.asin(radius / norms[2])) / 2) ** 2

    low, high = mpmath.mpf(0), opening
    for _ in range(150):
        v = (low + high) / 2
        value, slope = bound(v)
        enough = value <= 0 or v - value / slope > turned(norms[0] * value / mpmath.sqrt(slope))
        low, high = (low, v) if enough else (v, high)
    value, (least, most) = bound(low)[0], (mpmath.mpf(0), min(norms[1:]))
    for _ in range(150):
        radius = (least + most) / 2
        holds = turned(radius) + (radius / norms[0]) ** 2 / value < low
        least, most = (radius, most) if holds else (least, radius)
    return most


EXACT = {
    "reference": (C.reference_radius, _reference),
    "left": (lambda *z, **options: C.candidate_radii(*z, **options)[0], _candidate(0)),
    "right": (lambda *z, **options: C.candidate_radii(*z, **options)[1], _candidate(1)),
    "joint": (C.joint_radius, _joint),
}


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("kind", EXACT)
def test_radii_are_rounded_down(kind: str, difference: float, anchor: float) -> None:
    radius, exact = EXACT[kind]
    features = _near_ties(difference, torch.float64)
    for *row, found in zip(*features, radius(*features, anchor=anchor, lipschitz=1.25), strict=True):
        vectors = [_vector(z, anchor) for z in row]
        limit = exact(*vectors) / 1.25
        assert mpmath.mpf(found.item()) <= limit
        # What rounding takes off: a thousand roundings of ‖e‖ over the distance of the candidates.
        assert limit - mpmath.mpf(found.item()) <= 4e-13 * _norm(vectors[0]) * max(1, 1 / difference)


@pytest.mark.parametrize(
    "sizes", [(1e154, 1e154, 1e154), (1e-160, 1e-160, 1e-160), (1e200, 1e-150, 1.0), (1.0, 1e160, 1e-170)]
)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", EXACT)
def test_radii_of_features_of_any_size_are_rounded_down(
    kind: str, anchor: float, sizes: tuple[float, float, float]
) -> None:
    radius, exact = EXACT[kind]
    features = tuple(size * z[:3] for size, z in zip(sizes, _near_ties(0.1, torch.float64, size=8), strict=True))
    positive = 0
    for *row, found in zip(*features, radius(*features, anchor=anchor, lipschitz=1.25), strict=True):
        limit = exact(*(_vector(z, anchor) for z in row)) / 1.25
        assert 0 <= mpmath.mpf(found.item()) <= limit
        positive += found.item() >= (1 - 1e-9) * limit
    # Without an anchor nothing is lost; with one, answers between features far smaller than it are none.
    assert positive == 3 or anchor


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("size", [1, 2, 12])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_no_radius_is_above_the_truth_where_features_are_near_each_other_or_opposite(
    difference: float, size: int, anchor: float
) -> None:
    z, z0, other, noise = torch.randn(4, 4, size, dtype=torch.float64)
    near = z0 + difference * noise
    cases = [
        (other, z0, -near),
        (near, z0, -z0 + difference * other),
        (near, z0, other),
        (near, z0, near + z * difference),
    ]
    cases += [(0.3 * z0 + 0.5 * other, z0, other), (0.3 * z0 + 0.5 * other + difference * noise, z0, other)]
    for features in cases:
        for kind, (radius, exact) in EXACT.items():
            for *row, found in zip(*features, radius(*features, anchor=anchor, lipschitz=1.25), strict=True):
                limit = exact(*(_vector(t, anchor) for t in row)) / 1.25 if found else 0
                assert mpmath.mpf(found.item()) <= limit, kind


@pytest.mark.parametrize("kind", EXACT)
def test_float32_features_are_taken_exactly_and_rounded_down(kind: str) -> None:
    radius, exact = EXACT[kind]
    features = _near_ties(1e-3, torch.float32)
    found = radius(*features)
    assert found.dtype == torch.float32
    for *row, value in zip(*features, found, strict=True):
        limit = exact(*(_vector(z, 1.0) for z in row))
        assert limit * (1 - mpmath.mpf(2) ** -20) <= mpmath.mpf(value.item()) <= limit


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_distance_intervals_and_thresholds_are_rounded_outward(difference: float, anchor: float) -> None:
    _, z, y = _near_ties(difference, torch.float64)
    eps = 0.01 * difference
    lower, upper = C.distance_interval(z, y, eps, anchor=anchor)
    for row_z, row_y, low, high in zip(z, y, lower, upper, strict=True):
        e, other = _vector(row_z, anchor), _vector(row_y, anchor)
        theta, alpha = _angle(e, other), mpmath.asin(eps / _norm(e))
        exact_low = 2 * mpmath.sin(max(mpmath.mpf(0), theta - alpha) / 2) ** 2
        assert mpmath.mpf(low.item()) <= exact_low
        assert mpmath.mpf(high.item()) >= 2 * mpmath.sin((theta + alpha) / 2) ** 2
        threshold = float(2 * mpmath.sin(theta / 2) ** 2 * (1 + mpmath.mpf("1e-9")))
        boundary = 2 * mpmath.asin(mpmath.sqrt(mpmath.mpf(threshold) / 2))
        radius = C.threshold_radius(row_z[None], row_y[None], threshold, anchor=anchor)
        assert mpmath.mpf(radius.item()) <= _norm(e) * mpmath.sin(abs(boundary - theta))


def test_certified_pixels_count_no_pixel_too_many_in_float32() -> None:
    x = torch.rand(40, 3, 6, 6)
    cost = torch.maximum(x.double(), 1 - x.double()).square().sum(1).flatten(1)
    sums = cost.sort(dim=1, descending=True).values.cumsum(1)
    for k in (1, 2, 7, 36):
        exact = sums[:, k - 1].sqrt()
        assert (C.certified_pixels(x, exact) < k).all()  # not strictly less than R²
        assert (C.certified_pixels(x, exact * (1 + 1e-5)) >= k).all()
    assert C.certified_pixels(x, torch.full((40,), torch.inf)).tolist() == [36] * 40
    assert C.certified_pixels(x, torch.full((40,), torch.nan)).tolist() == [0] * 40
