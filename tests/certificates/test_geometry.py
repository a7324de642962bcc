"""Geometry against closed forms, and its invariants by property tests."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lipsim import certificates as C
from lipsim.certificates.geometry import (
    Anchored,
    along,
    anchored_norm,
    angle,
    cosine_distance,
    project,
    rotation,
    unit_angle,
)

FINITE = st.floats(-100, 100, allow_subnormal=False)
VECTORS = st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=2, max_size=2)


def _pair(vectors: list[tuple[float, float, float]]) -> tuple[Tensor, Tensor]:
    z, y = torch.tensor(vectors, dtype=torch.float64).unsqueeze(1)
    return z, y


def test_distance_is_one_minus_cosine_of_anchored_features() -> None:
    z, y = torch.randn(2, 50, 7, dtype=torch.float64)
    append = torch.full((50, 1), 2.0, dtype=torch.float64)
    expected = 1 - F.cosine_similarity(torch.cat([z, append], 1), torch.cat([y, append], 1))
    torch.testing.assert_close(cosine_distance(z, y, anchor=2.0), expected)


def test_distance_keeps_digits_between_near_duplicates() -> None:
    z = torch.tensor([[3.0, 4.0]])
    y = z + torch.tensor([[-4e-5, 3e-5]])  # a rotation by 1e-5
    assert cosine_distance(z, y, anchor=0.0).item() == pytest.approx(0.5e-10, rel=1e-2)
    assert 1 - F.cosine_similarity(z, y).item() == pytest.approx(0, abs=1e-7)  # what the plain formula sees


@given(VECTORS, st.sampled_from([0.0, 1.0, 3.0]))
def test_distance_is_a_bounded_symmetric_premetric(vectors: list[tuple[float, float, float]], anchor: float) -> None:
    z, y = _pair(vectors)
    distance = cosine_distance(z, y, anchor)
    assert 0 <= distance.item() <= 2 + 1e-12
    assert distance.item() == cosine_distance(y, z, anchor).item()
    if anchored_norm(z, anchor) > 0:  # squares below 1e-308 underflow
        assert cosine_distance(z, z, anchor).item() == 0


@given(VECTORS)
def test_anchored_projection_is_one_lipschitz(vectors: list[tuple[float, float, float]]) -> None:
    z, y = _pair(vectors)
    (p, s), (q, t) = project(z, 1.0), project(y, 1.0)
    moved = ((p - q).square().sum() + (s - t).square().sum()).sqrt()
    assert moved <= torch.linalg.vector_norm(z - y) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("theta", [1e-9, 1e-4, 0.5, math.pi / 2, 3.0, math.pi])
def test_angle_at_all_scales(theta: float) -> None:
    z = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    y = 5 * torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    assert angle(z, y, anchor=0.0).item() == pytest.approx(theta, rel=1e-7)


def test_rotation_is_reached_by_the_tangent_and_pi_beyond_the_norm() -> None:
    norm = torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    radius = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    expected = [math.asin(0.5), math.pi, math.pi, math.pi]
    assert rotation(norm, radius).tolist() == pytest.approx(expected)
    # The tangent from the origin to the ball of radius 1 around (2, 0) touches it at the angle arcsin(1/2).
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    reached = torch.atan2(torch.sin(angles), 2 + torch.cos(angles)).max()
    assert reached.item() == pytest.approx(math.asin(0.5), abs=1e-8)


def test_features_without_direction_are_at_distance_one() -> None:
    zero, y = torch.zeros(1, 3), torch.ones(1, 3)
    assert cosine_distance(zero, y, anchor=0.0).item() == 1
    assert anchored_norm(zero, 1.0).item() == 1
    assert torch.isfinite(cosine_distance(zero, y, anchor=1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_opposite_features_are_no_farther_apart_than_two(dtype: torch.dtype) -> None:
    z = torch.randn(2000, 9, dtype=torch.float64).to(dtype)
    assert (cosine_distance(z, -z, anchor=0.0) <= 2).all()
    assert torch.isnan(cosine_distance(z[:1] * torch.nan, z[:1])).all()


@pytest.mark.parametrize("size", [2.0**1000, 2.0**512, 2.0**-540, 2.0**-1000])
def test_features_of_any_size_have_their_norm_and_angles(size: float) -> None:
    z, y = torch.randn(2, 30, 5, dtype=torch.float64)
    assert torch.equal(anchored_norm(size * z, size) / size, anchored_norm(z, 1.0))
    assert torch.equal(project(size * z, 0.0)[0], project(z, 0.0)[0])
    for anchor in (0.0, 1.0):
        assert torch.equal(angle(size * z, size * y, size * anchor), angle(z, y, anchor))
        assert torch.equal(cosine_distance(size * z, size * y, size * anchor), cosine_distance(z, y, anchor))


# What float32 holds, its smallest and largest numbers among it.
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([2.0**-149, 3.4028234e38, 0.0])


@given(
    st.lists(st.lists(FLOAT32, min_size=4, max_size=4), min_size=3, max_size=3),
    st.sampled_from([0.0, 2.0**-300, 1e-3, 1.0, 1e18]),
    st.sampled_from([0.0, 1e-6, 3.0]),
)
def test_float32_features_need_no_scale_to_the_last_bit(
    vectors: list[list[float]], anchor: float, error: float
) -> None:
    """The same features given in float32 and in float64, where they are scaled for the range."""
    single = torch.tensor(vectors).unsqueeze(1)
    plain, scaled = ([Anchored(z, anchor) for z in features] for features in (single, single.double()))
    assert all(e.plain for e in plain) and not any(e.plain for e in scaled)
    for e, other in zip(plain, scaled, strict=True):
        assert torch.equal(e.norm, other.norm)
        assert all(torch.equal(a, b) for a, b in zip(e.unit, other.unit, strict=True))
    options = {"anchor": anchor, "lipschitz": 1.25, "feature_error": error}
    images = torch.zeros(1, 3, 2, 2)
    found, expected = (C.certify_triplets(images, *e, **options) for e in (plain, scaled))
    for field in fields(found):
        torch.testing.assert_close(
            getattr(found, field.name), getattr(expected, field.name), rtol=0, atol=0, equal_nan=True
        )
    assert torch.equal(C.published_radius(*plain, anchor=anchor), C.published_radius(*scaled, anchor=anchor))
    z, y = plain[:2]
    assert torch.equal(unit_angle(z.unit, y.unit), angle(z.z, y.z, anchor))


def test_anchors_at_the_ends_of_the_range_are_scaled() -> None:
    z = torch.zeros(1, 3)
    assert Anchored(z, 1e-200).norm.item() == 1e-200 and Anchored(z, 1e200).norm.item() == 1e200
    with pytest.raises(ValueError, match=r"expected features projected with the anchor 0\.0, got 1\.0"):
        C.reference_radius(*[Anchored(z, 1.0)] * 3, anchor=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_the_margin_is_the_difference_of_distances(dtype: torch.dtype, anchor: float) -> None:
    z, z0, z1 = features = torch.randn(3, 20, 6, dtype=dtype).requires_grad_()
    margin = C.margin(z, z0, z1, anchor=anchor)
    assert margin.dtype == dtype and margin.requires_grad
    projected = C.margin(*(Anchored(t.detach(), anchor) for t in features), anchor=anchor)
    direction = along(*(project(t, anchor) for t in features))
    exact = cosine_distance(z.double(), z1.double(), anchor) - cosine_distance(z.double(), z0.double(), anchor)
    for found in (margin, projected, direction):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert (C.margin(z, z0, z0, anchor=anchor) == 0).all()
    nothing = torch.zeros(1, 6, dtype=dtype)
    assert C.margin(nothing, z0[:1], z1[:1], anchor=0.0).isnan().all()
    assert (C.margin(nothing, z0[:1], z1[:1], anchor=0.0, least_norm=1e-12) == 0).all()
