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
