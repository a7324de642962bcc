"""Certificates in eighty decimal digits, to hold their rounding against: by ratios and square roots, without angles.

An angle is its cosine and sine, a pair of decimals; sums of angles are products of such pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

from lipsim import certificates

Vector = Sequence[Decimal]
Angle = tuple[Decimal, Decimal]

_FEATURES = 5
_DTYPES = ((torch.float64, 12), (torch.float32, 5))  # candidates that differ by 1e-1 to 1e-12, or 1e-5
_REPEATS = 3


def rounding_excess(draw: torch.Generator, *, anchor: float, lipschitz: float) -> dict[str, float]:
    """How much more than the truth each kind of certificate claims of near-duplicates, at most; negative where sound.

    Args:
        draw: of the features.
        anchor: ``κ``.
        lipschitz: ``L``.

    Returns:
        For each kind and dtype the largest relative excess.
    """
    excesses: dict[str, float] = {}
    with localcontext(Context(prec=80)):
        for dtype, digits in _DTYPES:
            for kind, excess in _excesses(draw, dtype, digits, anchor, lipschitz):
                name = f"{kind}, {str(dtype).removeprefix('torch.')}"
                # Not max(), which can lose NaN.
                excesses[name] = excess if not excess <= excesses.get(name, -math.inf) else excesses[name]
    return excesses


def _excesses(
    draw: torch.Generator, dtype: torch.dtype, digits: int, anchor: float, lipschitz: float
) -> list[tuple[str, float]]:
    options = {"anchor": anchor, "lipschitz": lipschitz}
    scales = 10.0 ** -torch.arange(1, digits + 1, dtype=torch.float64).repeat(_REPEATS)
    z, z0, noise = (torch.randn(len(scales), _FEATURES, dtype=torch.float64, generator=draw) for _ in range(3))
    z, z0, z1 = (t.to(dtype) for t in (z, z0, z0 + scales[:, None] * noise))
    radius = certificates.reference_radius(z, z0, z1, **options)
    left, right = certificates.candidate_radii(z, z0, z1, **options)
    joint = certificates.joint_radius(z, z0, z1, **options)
    # Budgets of a third of the way from one near-duplicate to the other.
    eps = (z0 - z1).double().norm(dim=1) / (3 * lipschitz)
    lower, upper = certificates.distance_interval(z0, z1, eps, **options)
    constant = Decimal(lipschitz)
    rows = []
    for i in range(len(scales)):
        e, e0, e1 = (_anchored(t[i], anchor) for t in (z, z0, z1))
        n, n0, n1 = (_norm(t) for t in (e, e0, e1))
        angle0, angle1 = _angle(e, e0), _angle(e, e1)
        gap = _turn(angle1, _back(angle0))
        gap = gap if gap[1] >= 0 else _back(gap)
        exact = _reference(e, e0, e1) / constant
        rows += [
            ("reference", _over(radius[i], exact)),
            ("ℓ∞", _over(certificates.linf_radius(radius[i], 3 * 64 * 64), exact / Decimal(3 * 64 * 64).sqrt())),
            ("left", _over(left[i], n0 * gap[1] / constant)),
            ("right", _over(right[i], n1 * gap[1] / constant)),
        ]
        rows.append(("joint", _joint(e, e0, e1, Decimal(float(joint[i])) * constant)))
        between, budget = _angle(e0, e1), _arcsine(constant * Decimal(float(eps[i])) / n0)
        least, most = 1 - _turn(between, _back(budget))[0], 1 - _turn(between, budget)[0]
        rows += [("distance ≥", _over(lower[i], least)), ("distance ≤", -_over(upper[i], most))]
        # A threshold as near to the distance as the candidates are to each other.
        threshold = float(1 - angle0[0]) * (1 - float(scales[i]) / 2)
        boundary = 1 - Decimal(threshold), (Decimal(threshold) * (2 - Decimal(threshold))).sqrt()
        free = _turn(angle0, _back(boundary))[1]
        claimed = certificates.threshold_radius(z[i : i + 1], z0[i : i + 1], threshold, **options)
        rows.append(("threshold", _over(claimed[0], n * abs(free) / constant)))
    return rows


def _anchored(z: Tensor, anchor: float) -> Vector:
    return [*(Decimal(value) for value in z.tolist()), Decimal(anchor)]


def _dot(a: Vector, b: Vector) -> Decimal:
    return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))


def _norm(a: Vector) -> Decimal:
    return _dot(a, a).sqrt()


def _reference(e: Vector, e0: Vector, e1: Vector) -> Decimal:
    """Distance of the features in ``e`` to where both candidates are equally near."""
    n0, n1 = _norm(e0), _norm(e1)
    difference = [a / n0 - b / n1 for a, b in zip(e0, e1, strict=True)]
    return abs(_dot(e, difference)) / _norm(difference[:-1])


def _joint(e: Vector, e0: Vector, e1: Vector, reach: Decimal) -> float:
    """How much nearer than ``reach`` another answer is where the candidates move by that, too: of squares, relative.

    The least ``‖y − e‖²`` on the cone ``y_m²/s = y_u²/(1 − s) + y_n²/(t − s)`` by Lagrange's multiplier, along the axes
    of the cone: :mod:`lipsim.certificates.joint`.
    """
    if not reach:
        return -1.0
    n0, n1 = _norm(e0), _norm(e1)
    first, second = ([a / n for a in v] for v, n in ((e0, n0), (e1, n1)))
    ahead, across = ([a + sign * b for a, b in zip(first, second, strict=True)] for sign in (-1, 1))
    m2, u2 = (_dot(e, axis) ** 2 / _dot(axis, axis) for axis in (ahead, across))
    t = _dot(ahead, ahead) / 4
    s = (1 - _turn(_arcsine(reach / n0), _arcsine(reach / n1))[0]) / 2
    w2 = _dot(e, e) - m2 - u2

    def parts(v: Decimal) -> tuple[Decimal, Decimal, Decimal]:
        return m2 / v, u2 / (1 - v), w2 / (t - v)

    low, high = s, t
    for _ in range(200):
        v = (low + high) / 2
        a, b, c = parts(v)
        grows = a - b - c > (v - s) * (a / v + b / (1 - v) + c / (t - v))
        low, high = (v, high) if grows else (low, v)
    a, b, c = parts(low)
    nearest = (low - s) * (a - b - c)
    return float(1 - nearest / (reach * reach))


def _angle(a: Vector, b: Vector) -> Angle:
    cosine = _dot(a, b) / (_norm(a) * _norm(b))
    return cosine, (1 - cosine * cosine).sqrt()


def _arcsine(sine: Decimal) -> Angle:
    return (1 - sine * sine).sqrt(), sine


def _turn(a: Angle, b: Angle) -> Angle:
    return a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]


def _back(a: Angle) -> Angle:
    return a[0], -a[1]


def _over(claimed: Tensor, exact: Decimal) -> float:
    """Relative excess of a claim; its sign is that of eighty digits."""
    return float((Decimal(float(claimed)) - exact) / exact)
