"""The certificate of pixel ℓ2 in closed form against attacks, and against its own boundary."""

from __future__ import annotations

import math

import pytest
import torch

from lipsim.attacks import TwoAFCObjective, minimal_norm
from lipsim.attacks.projections import sample_norm
from lipsim.metric.distances import pixel_l2, pixel_l2_certificate


def test_the_radius_is_reached_and_never_passed() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, left, right = torch.rand(3, 12, 3, 8, 8, generator=generator).double()
    certificate = pixel_l2_certificate(reference, left, right)
    assert torch.equal(certificate.prefers_left, pixel_l2(reference, left) < pixel_l2(reference, right))
    objective = TwoAFCObjective(pixel_l2, reference, left, right)
    x_adv = minimal_norm(objective, reference, steps=60, box=None)
    length = sample_norm(x_adv - reference, 2)
    assert bool((objective(x_adv) > 0).all())
    assert bool((length >= certificate.radius).all()) and bool((length <= certificate.radius * 1.01 + 1e-3).all())


def test_candidates_and_all_three_move_within_their_radii() -> None:
    generator = torch.Generator().manual_seed(1)
    reference, left, right = torch.rand(3, 50, 3, 4, 4, generator=generator).double()
    certificate = pixel_l2_certificate(reference, left, right)
    near = torch.where(certificate.prefers_left.view(-1, 1, 1, 1), left, right)
    far = torch.where(certificate.prefers_left.view(-1, 1, 1, 1), right, left)

    def away(image: torch.Tensor, other: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        step = image - other
        return image + by.view(-1, 1, 1, 1) * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    # The worst that one candidate can do is to go straight away, or straight here.
    for factor, holds in ((1 - 1e-9, True), (1 + 1e-3, False)):
        moved = away(near, reference, factor * certificate.left_radius)
        assert bool((pixel_l2(reference, moved) < pixel_l2(reference, far)).all()) is holds
        moved = away(far, reference, -factor * certificate.right_radius)
        assert bool((pixel_l2(reference, near) < pixel_l2(reference, moved)).all()) is holds
    eps = certificate.joint_radius * (1 - 1e-9)
    for _ in range(20):
        steps = torch.randn(3, 50, 3, 4, 4, generator=generator).double()
        steps[0] += near - far  # towards where the answer is the other one
        steps = steps / steps.flatten(2).norm(dim=2).view(3, 50, 1, 1, 1) * eps.view(1, -1, 1, 1, 1)
        x = reference - steps[0]
        assert bool((pixel_l2(x, away(near, x, eps)) < pixel_l2(x, away(far, x, -eps))).all())


def test_the_joint_radius_is_how_far_all_three_came_from_a_tie() -> None:
    generator = torch.Generator().manual_seed(2)
    shape, (end, first, second) = (100, 3, 4, 4), torch.randn(3, 100, 48, generator=generator).double()
    first, second = first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)
    # The boundary's normal where both candidates are 0.2 away from the reference.
    normal = (first - second) / (first - second).norm(dim=1, keepdim=True)
    end = 0.5 + 0.1 * end / end.norm(dim=1, keepdim=True)
    eps = torch.linspace(0.01, 0.06, 100, dtype=torch.float64)[:, None]
    images = [end + eps * normal, end + (0.2 - eps) * first, end + (0.2 + eps) * second]
    for order, left in (((0, 1, 2), True), ((0, 2, 1), False)):
        certificate = pixel_l2_certificate(*(images[k].view(shape) for k in order))
        assert bool((certificate.prefers_left == left).all())
        assert bool((certificate.joint_radius <= eps[:, 0]).all())
        assert bool((certificate.joint_radius >= eps[:, 0] - 2e-5).all())  # what float32 distances may be off by


def test_the_joint_radius_of_images_on_a_line_and_of_near_ties() -> None:
    # Gray images of 192 values: the reference is 0.625 from the middle of candidates that are 0.25 apart, outside of
    # them, and their distances are least apart where it leaves the line. All directions in a plane are tried.
    turn, size = torch.linspace(0, math.pi, 100_001, dtype=torch.float64), math.sqrt(192)
    low, high = 0.0, 0.125 * size
    for _ in range(30):
        eps = (low + high) / 2
        along, aside = 0.625 * size + eps * torch.cos(turn), eps * torch.sin(turn)
        far, near = (torch.hypot(along + side * 0.125 * size, aside) for side in (1, -1))
        low, high = (eps, high) if float((far - near).min()) > 2 * eps else (low, eps)
    for dtype in (torch.float32, torch.float64):
        flat = [torch.full((1, 3, 8, 8), level, dtype=dtype) for level in (1.0, 0.5, 0.25)]
        assert pixel_l2_certificate(*flat).joint_radius.item() == pytest.approx(low, rel=1e-4)
        generator = torch.Generator().manual_seed(3)
        x, left = torch.rand(2, 50, 3, 4, 4, generator=generator, dtype=dtype)
        certificate = pixel_l2_certificate(x, left, 2 * x - left + 1e-3 * torch.rand(x.shape, generator=generator))
        assert bool((certificate.joint_radius >= certificate.left_radius / 4).all())


def test_a_tie_has_no_radius() -> None:
    x, same = torch.rand(2, 1, 3, 4, 4)
    certificate = pixel_l2_certificate(x, same, same)
    assert certificate.radius.item() == certificate.joint_radius.item() == 0 and not certificate.prefers_left.item()


def test_the_answer_in_float32_is_the_certified_one_on_large_flat_images() -> None:
    """Equal squares, whose sums in float32 drift by more than the gap between the candidates here."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 224, 224, generator=generator)
    reference = torch.zeros_like(noise)
    length = torch.linalg.vector_norm(noise.double())
    for level in torch.linspace(0.05, 0.45, 12).tolist():
        flat = torch.full_like(noise, level)
        for gap in (5e-5, -5e-5):
            other = (noise * (torch.linalg.vector_norm(flat.double()) * (1 + gap) / length)).float()
            certificate = pixel_l2_certificate(reference, flat, other)
            assert certificate.radius.item() > 0 and certificate.prefers_left.item() is (gap > 0)
            assert (pixel_l2(reference, flat) < pixel_l2(reference, other)).item() is (gap > 0)


def test_images_that_are_not_finite_have_no_radius() -> None:
    x, left, right = torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0], left[1, 0, 0, 0] = math.nan, math.inf
    certificate = pixel_l2_certificate(x, left, right)
    for radius in (certificate.radius, certificate.left_radius, certificate.right_radius, certificate.joint_radius):
        assert radius.tolist() == [0, 0]
    assert certificate.pixels.tolist() == [0, 0]
