"""The joint radius against attacks, the cap that a reference turns in, and the equation of four turns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from feature_attack import Features, ascend

from lipsim import certificates as C
from lipsim.certificates.geometry import angle

ANCHORS = [0.0, 0.5, 1.0, 2.0]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("anchor", ANCHORS)
def test_joint_radius_withstands_attack_on_all_three(features: Features, anchor: float) -> None:
    radius = C.joint_radius(*features, anchor=anchor)
    assert (radius > 0).all()
    assert not ascend(features, dict.fromkeys(range(3), radius * (1 - 1e-9)), anchor).any()


def test_joint_radius_is_tight_in_the_plane() -> None:
    # In two dimensions without an anchor all three images can turn towards each other at once.
    z, z0, z1 = (torch.tensor([[math.cos(t), math.sin(t)]], dtype=torch.float64) for t in (0.0, 0.3, -0.9))
    radius = C.joint_radius(z, z0, z1, anchor=0.0)
    assert 4 * math.asin(radius.item()) == pytest.approx(0.6, rel=1e-12)
    budgets = {i: radius * 1.001 for i in range(3)}
    assert ascend((z, z0, z1), budgets, 0.0, steps=3000).all()


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("size", [2, 3, 40])
def test_joint_radius_is_never_below_what_four_turns_allow(
    monkeypatch: pytest.MonkeyPatch, size: int, anchor: float
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from joint_radius import four_turns  # type: ignore[import-not-found]

    features = tuple(torch.randn(200, size, dtype=torch.float64) for _ in range(3))
    before = four_turns(*features, anchor=anchor, lipschitz=1.0, feature_error=0.0)
    ratio = C.joint_radius(*features, anchor=anchor) / before
    assert (ratio >= 1 - 1e-9).all()
    assert ratio.mean() > 1.05
    if size == 2 and not anchor:
        # Between both candidates, in the plane, a reference turns from the one as fast as to the other.
        z, z0, z1 = features
        between = angle(z, z0, 0.0) + angle(z, z1, 0.0) < angle(z0, z1, 0.0) + 1e-9
        assert between.sum() > 30
        torch.testing.assert_close(ratio[between], torch.ones_like(ratio[between]), rtol=1e-9, atol=0)


def test_candidates_that_are_nearly_opposite_certify_no_more() -> None:
    # The angles are exact here: a reference at 1.2 to the left, candidates that miss being opposite by 1e-13.
    points = ([math.cos(1.2), math.sin(1.2)], [1.0, 5e-14], [-1.0, 5e-14])
    features = [torch.tensor([point], dtype=torch.float64) for point in points]
    exact = math.sin((math.pi / 2 - 1.2) / 2)
    assert exact * (1 - 1e-9) <= C.joint_radius(*features, anchor=0.0).item() <= exact


@pytest.mark.parametrize("distance", [1e-3, 1e-6])
def test_images_that_are_all_alike_keep_most_of_what_four_turns_allow(
    monkeypatch: pytest.MonkeyPatch, distance: float
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from joint_radius import four_turns

    z = torch.randn(200, 768, dtype=torch.float64)
    z0, z1 = (z + distance * torch.randn_like(z) for _ in range(2))
    ratio = C.joint_radius(z, z0, z1) / four_turns(z, z0, z1, anchor=1.0, lipschitz=1.0, feature_error=0.0)
    assert ratio.median() > 1.1 and (distance < 1e-4 or ratio.min() > 1)


@pytest.mark.parametrize("size", [3, 12])
def test_joint_radius_is_where_the_first_reference_in_reach_ties(size: int) -> None:
    """Without an anchor: of all references in reach, those turned farthest, in the span of the three, are tried."""
    z, z0, z1 = (torch.randn(60, size, dtype=torch.float64) * torch.rand(60, 1).double().add(0.3) for _ in range(3))
    radius = C.joint_radius(z, z0, z1, anchor=0.0)
    p, p0, p1 = (t / t.norm(dim=1, keepdim=True) for t in (z, z0, z1))
    near = (p * p0).sum(1) > (p * p1).sum(1)
    first, other = torch.where(near[:, None], p0, p1), torch.where(near[:, None], p1, p0)
    frame = torch.linalg.qr(torch.stack([p, p0, p1], -1)).Q
    turn = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    aside = torch.cos(turn)[:, None] * frame[:, None, :, 1] + torch.sin(turn)[:, None] * frame[:, None, :, 2]
    for factor, kept in ((1 - 1e-6, True), (1 + 1e-6, False)):
        reach = factor * radius
        alpha, free = torch.asin(reach / z.norm(dim=1)), torch.asin(reach / z0.norm(dim=1))
        free = free + torch.asin(reach / z1.norm(dim=1))
        turned = torch.cos(alpha)[:, None, None] * p[:, None] + torch.sin(alpha)[:, None, None] * aside
        angles = [torch.acos((turned * t[:, None]).sum(-1).clamp(-1, 1)) for t in (first, other)]
        least = (angles[1] - angles[0]).amin(1) - free
        assert ((least > 0) == kept).double().mean() == 1


@pytest.mark.parametrize("points", [([-2.0], [0.5], [0.6]), ([-0.3, 1.0], [1.0, 0.2], [1.0, 0.1])])
def test_joint_radius_in_a_plane_has_the_gradient_of_its_equation(points: tuple[list[float], ...]) -> None:
    leaves = [torch.tensor([point], dtype=torch.float64, requires_grad=True) for point in points]
    anchor = 2.0 - len(points[0])
    assert torch.autograd.gradcheck(lambda *f: C.signed_joint_radius(*f, anchor=anchor), leaves, atol=1e-6)


def test_joint_radius_of_two_features_is_that_of_more() -> None:
    """On the axis of the cone the nearest boundary is beside the plane, which two features cannot leave."""
    for half in (math.pi / 12, math.pi / 6, math.pi / 4):
        points = ([0.0, 1.0], [math.cos(half), math.sin(half)], [math.cos(half), -math.sin(half)])
        for more in ([], [0.0]):
            features = [torch.tensor([point + more], dtype=torch.float64) for point in points]
            # Out of the plane by α the cosines are ±cos α·sin(half), and both candidates turn by α: tan α = sin(half).
            exact = math.sin(half) / math.hypot(1, math.sin(half))
            assert C.joint_radius(*features, anchor=0.0).item() == pytest.approx(exact, rel=1e-9)


def test_joint_radius_has_the_gradient_of_its_equation() -> None:
    features = [torch.randn(3, 4, dtype=torch.float64).mul_(2).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *f: C.joint_radius(*f), features, atol=1e-5)
    assert torch.autograd.gradcheck(lambda *f: C.signed_joint_radius(*f), features, atol=1e-5)
    plain = C.joint_radius(*(f.detach() for f in features))
    torch.testing.assert_close(C.joint_radius(*features).detach(), plain, rtol=0, atol=0)
    same = [features[0], features[1], features[1]]
    C.joint_radius(*same).sum().backward()
    assert all(torch.isfinite(f.grad).all() for f in features[:2] if f.grad is not None)


def test_signed_joint_radius_has_the_sign_of_the_margin(features: Features) -> None:
    signed = C.signed_joint_radius(*features)
    torch.testing.assert_close(signed.abs(), C.joint_radius(*features), rtol=1e-10, atol=0)
    assert (signed.abs() >= C.joint_radius(*features)).all()  # which is rounded down
    margin, _ = C.linear_margin(*features)
    assert ((signed > 0) == ((margin > 0) & (signed != 0))).all()
    torch.testing.assert_close(C.signed_joint_radius(features[0], features[2], features[1]), -signed)


def test_joint_gradients_are_finite_where_vectors_have_no_length_and_at_the_cap() -> None:
    z, z0, z1 = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    z[0], z1[1] = 0, 0
    z[2], z0[2], z1[2] = 0.01 * z[2], 100 * z[2], -100 * z[2]  # the reference's norm caps the radius
    leaves = [t.requires_grad_() for t in (z, z0, z1)]
    C.joint_radius(*leaves, anchor=0.0).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() < 100


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize(
    "points",
    [
        ([0.0, 1.0], [1.0, 0.0], [1.0, 1e-200]),
        ([1.0, 1.0], [1.0, 0.0], [1.0, 1e-155]),
        ([3e-170, 1e-170], [1e-170, 0.0], [0.0, 1e-170]),
        ([1e140, 0.0], [1e140, 2e140], [-1e140, -2e140]),
    ],
)
def test_gradients_are_numbers_for_features_of_any_size(points: tuple[list[float], ...], anchor: float) -> None:
    # With a row that has one, whose gradient the other must not spoil where they share an encoder.
    rows = [torch.tensor([point, [1.0, 2.0 - k]], dtype=torch.float64) for k, point in enumerate(points)]
    for function in (C.joint_radius, C.signed_joint_radius):
        leaves = [row.clone().requires_grad_() for row in rows]
        radius = function(*leaves, anchor=anchor)
        torch.testing.assert_close(radius.detach(), function(*rows, anchor=anchor), rtol=1e-12, atol=0)
        radius.sum().backward()
        assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
        assert all(leaf.grad is not None and leaf.grad[1].any() for leaf in leaves)


def test_signed_radii_beyond_the_dtype_are_its_largest_number() -> None:
    z, z0, z1 = (torch.tensor([point], dtype=torch.float16) for point in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]))
    assert C.signed_joint_radius(z, z0, z1, lipschitz=1e-6).item() == -torch.finfo(torch.float16).max
