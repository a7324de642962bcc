"""Geometry against closed forms, and its invariants by property tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates.geometry import anchored_norm, angle, cosine_distance, project, rotation

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
