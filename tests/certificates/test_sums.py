"""Certificates of a sum of which one part saturates: grids of every change, the cosine metric, and the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipsim import certificates as C
from lipsim.certificates.geometry import cosine_distance
from lipsim.certificates.sums import saturate

_PARTS = ("reference", "left", "right")


def _draw(count: int, features: int, seed: int, size: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(count, features, generator=generator, dtype=torch.float64) for _ in range(3)]


def _sum(x: Tensor, y: Tensor, weight: float, scale: float, anchor: float = 1.0) -> Tensor:
    """By the definition, of two encoders that are the halves of the features."""
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    return cosine_distance(x1, y1, anchor) + weight * saturate(cosine_distance(x2, y2, anchor), scale)


def _terms(images: list[Tensor], **options: float) -> tuple[C.Term, C.Term]:
    halves = [image.chunk(2, -1) for image in images]
    first, second = (C.Term(*(half[k] for half in halves), **options) for k in range(2))
    return first, second


def _images(images: list[Tensor]) -> Tensor:
    return torch.full((len(images[0]), 3, 2, 2), 0.5)  # what pixels are counted in


def _certify(images: list[Tensor], weight: float, scale: float, **options: float) -> C.TwoAFCCertificate:
    return C.certify_sum(_images(images), *_terms(images, **options), weight=weight, scale=scale)


def _circle(points: int) -> Tensor:
    turn = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    return torch.stack([torch.cos(turn), torch.sin(turn)], -1)


@pytest.mark.parametrize("moving", range(3))
@pytest.mark.parametrize(("weight", "scale"), [(0.3, 0.1), (1.0, 0.5), (4.0, 0.03)])
def test_no_change_within_a_radius_turns_an_answer(moving: int, weight: float, scale: float) -> None:
    images = _draw(200, 4, seed=moving)
    for image in images[1:]:
        image[:, 2:] = images[0][:, 2:] + 0.5 * image[:, 2:]  # near in the second part, where it counts
    found = _certify(images, weight, scale)
    radius = (found.radius, found.left_radius, found.right_radius)[moving]
    sign = torch.where(found.prefers_left, 1.0, -1.0).double()
    # Each encoder's features move by as much as the image does at most, in directions of their own.
    steps = 0.999 * torch.cat([torch.zeros(1, 2, dtype=torch.float64), _circle(48)])
    tried = torch.cat([steps.repeat_interleave(49, 0), steps.repeat(49, 1)], -1)
    worst = torch.full((200,), math.inf, dtype=torch.float64)
    beyond = worst.clone()
    for step in tried:
        for reach, least in ((radius, worst), (3 * radius, beyond)):
            changed = list(images)
            changed[moving] = images[moving] + reach.unsqueeze(-1) * step
            x, x0, x1 = changed
            margin = sign * (_sum(x, x1, weight, scale) - _sum(x, x0, weight, scale))
            torch.minimum(least, margin, out=least)
    assert (worst > 0)[radius > 0].all()
    assert (beyond < 0).double().mean() > 0.4  # three times as far many do turn


@pytest.mark.parametrize("which", ["radius", "left_radius", "right_radius", "joint_radius"])
@pytest.mark.parametrize(
    ("weight", "anchor", "error"),
    [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (8.0, 1.0, 0.0), (0.0, 1.0, 0.02), (1.0, 1.0, 0.02)],
)
def test_no_search_turns_an_answer_within_a_radius(which: str, weight: float, anchor: float, error: float) -> None:
    """Of features in three dimensions for each encoder, which may move by the radius in directions of their own.

    All features are off by the error besides, also of images that do not move, and move twice as far as the images.
    """
    count, starts, scale = 40, 12, 0.1
    images = _draw(count, 6, seed=5, size=2.0)
    for image in images[1:]:
        image[:, 3:] = images[0][:, 3:] + 0.6 * image[:, 3:]
    found = _certify(images, weight, scale, anchor=anchor, lipschitz=2.0, feature_error=error)
    radius = 2 * getattr(found, which)
    held = radius > 0
    assert held.double().mean() > (0.6 if error else 0.99)
    moving = [name == which or which == "joint_radius" for name in ("radius", "left_radius", "right_radius")]
    sign = torch.where(found.prefers_left, 1.0, -1.0).double()
    least = {}
    for factor in (0.9999, 1.3, 2.5):
        steps = torch.randn(3, starts, count, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        steps.requires_grad_()
        optimizer = torch.optim.Adam([steps], lr=0.1)
        worst = torch.full((count,), math.inf, dtype=torch.float64)
        for _ in range(80):
            unit = (steps / steps.norm(dim=-1, keepdim=True)).flatten(-2).unbind(0)
            lengths = [factor * (radius * moves + error)[:, None] for moves in moving]
            x, x0, x1 = (i + length * step for i, length, step in zip(images, lengths, unit, strict=True))
            margins = sign * (_sum(x, x1, weight, scale, anchor) - _sum(x, x0, weight, scale, anchor))
            worst = torch.minimum(worst, margins.detach().amin(0))
            optimizer.zero_grad()
            margins.sum().backward()
            optimizer.step()
        least[factor] = worst
    assert (least[0.9999] > 0)[held].all()
    assert (least[2.5] < 0).double().mean() > 0.7
    # One distance alone is certified nearly up to where it turns; what a sum loses is that its parts need not be at
    # their worst together, and that the candidates turn at the worst angle that the reference could have.
    assert (least[1.3] < 0).double().mean() > (0.8 if weight == 0 else 0.2)


def test_the_margin_is_the_difference_of_the_distances() -> None:
    x, x0, x1 = _draw(50, 8, seed=1)
    found = _certify([x, x0, x1], 0.7, 0.2)
    torch.testing.assert_close(found.margin, _sum(x, x1, 0.7, 0.2) - _sum(x, x0, 0.7, 0.2), rtol=1e-9, atol=1e-12)
    assert (found.prefers_left == (found.margin > 0)).all()


@pytest.mark.parametrize("spread", [3.0, 0.3, 0.03])
def test_the_least_margin_is_that_of_all_turns(spread: float) -> None:
    """Three features without an anchor: the reference turns to a grid of its cap, and each candidate on from there."""
    z, z0, z1 = _draw(60, 3, seed=7)
    z0, z1 = z + spread / 3 * z0, z + spread / 3 * z1
    term = C.Term(z, z0, z1, anchor=0.0)
    found = term.least_margin(torch.zeros(3, 60, dtype=torch.float64))
    torch.testing.assert_close(found, term.margin, rtol=1e-6, atol=1e-9)
    eps = 0.1 * spread * torch.rand(3, 60, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    turns = torch.asin(eps / torch.stack([t.norm(dim=1) for t in (z, z0, z1)]))
    p, p0, p1 = (torch.nn.functional.normalize(t, dim=1) for t in (z, z0, z1))
    across = torch.nn.functional.normalize(torch.linalg.cross(p, z0), dim=1)
    around = _circle(361)[:, None] @ torch.stack([across, torch.linalg.cross(p, across)], 1)[:, None]
    least = torch.full((60,), math.inf, dtype=torch.float64)
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        turn = (share * turns[0])[:, None, None]
        moved = torch.cos(turn) * p[:, None] + torch.sin(turn) * around.squeeze(-2)
        near, far = (torch.acos((moved * t[:, None]).sum(-1).clamp(-1, 1)) for t in (p0, p1))
        near, far = (near + turns[1, :, None]).clamp(max=math.pi), (far - turns[2, :, None]).clamp(min=0)
        least = torch.minimum(least, (torch.cos(near) - torch.cos(far)).amin(1))
    found = term.least_margin(eps)
    assert (found <= least + 1e-12).all()
    assert ((least - found) / turns.amax(0)).median() < 1e-4


def test_without_weight_it_is_the_cosine_metric() -> None:
    images = _draw(100, 6, seed=2)
    found = _certify(images, 0.0, 0.1)
    alone = C.certify_triplets(_images(images), *(image[:, :3] for image in images))
    for name in ("radius", "left_radius", "right_radius", "joint_radius"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert (found.radius <= alone.radius * (1 + 1e-9)).all()  # which is exact
    # Whatever the second one's features are, the first one's joint radius stays.
    for z in images:
        z[:, 3:] *= 1e-2
    found = _certify(images, 0.0, 0.1)
    assert (found.joint_radius >= alone.joint_radius * (1 - 1e-9)).all()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_without_a_bound_of_one_part_every_radius_is_0(weight: float) -> None:
    images = _draw(20, 6, seed=2)
    first, _ = _terms(images)
    _, second = _terms(images, lipschitz=math.inf)
    for terms in ((first, second), (second, first)):
        found = C.certify_sum(_images(images), *terms, weight=weight, scale=0.5)
        for name in ("radius", "left_radius", "right_radius", "joint_radius"):
            assert not getattr(found, name).any(), name


def test_where_both_parts_agree_all_images_may_move_as_far_as_in_each_of_them() -> None:
    images = _draw(100, 6, seed=2)
    found = _certify(images, 1.0, 0.1)
    halves = [C.certify_triplets(_images(images), *(z.chunk(2, -1)[k] for z in images)) for k in range(2)]
    agreed = halves[0].prefers_left == halves[1].prefers_left
    least = torch.minimum(halves[0].joint_radius, halves[1].joint_radius)
    assert 20 < agreed.sum() < 80
    assert (found.joint_radius >= least * (1 - 1e-9))[agreed].all()


def test_a_part_that_is_alone_counts_as_it_does_in_the_cosine_metric() -> None:
    x, x0, x1 = _draw(100, 6, seed=3)
    x0[:, :3], x1[:, :3] = x[:, :3], x[:, :3]  # all the same to the first
    found = _certify([x, x0, x1], 1.0, 0.3)
    alone = C.certify_triplets(_images([x]), x[:, 3:], x0[:, 3:], x1[:, 3:])
    assert (found.prefers_left == alone.prefers_left).all()
    # A function of the distance that grows changes no answer, but the first part may be turned as well.
    assert (found.radius < alone.radius).all() and (found.radius > 0.02 * alone.radius).all()


def test_what_is_far_in_the_second_part_costs_no_radius() -> None:
    x, x0, x1 = _draw(100, 6, seed=4)
    x[:, 3:], x0[:, 3:], x1[:, 3:] = (20 * torch.eye(3, dtype=torch.float64)[k] for k in range(3))
    found = _certify([x, x0, x1], 1.0, 0.02)  # distances of 1, fifty times the scale
    alone = C.certify_triplets(_images([x]), x[:, :3], x0[:, :3], x1[:, :3])
    torch.testing.assert_close(found.radius, alone.radius, rtol=1e-4, atol=1e-5)


def test_errors_of_features_and_bounds_shrink_radii() -> None:
    images = _draw(60, 6, seed=7)
    plain, stretched = _certify(images, 1.0, 0.2), _certify(images, 1.0, 0.2, lipschitz=2.0)
    torch.testing.assert_close(2 * stretched.radius, plain.radius, rtol=1e-6, atol=1e-9)
    rough = _certify(images, 1.0, 0.2, feature_error=0.01)
    assert (rough.radius <= (plain.radius - 0.01).clamp(min=0) + 1e-9).all() and (rough.radius > 0).any()
    assert not _certify(images, 1.0, 0.2, lipschitz=math.inf).radius.any()
    assert not _certify(images, 1.0, 0.2, lipschitz=0.0).radius.any()  # as of every certificate


def test_ties_and_what_is_no_number_certify_nothing() -> None:
    x, x0, x1 = _draw(4, 6, seed=8)
    x1[0] = x0[0]
    x[1, 0] = math.nan
    x0[2, 4] = math.inf
    found = _certify([x, x0, x1], 1.0, 0.2)
    assert not found.radius[:3].any() and not found.joint_radius[:3].any() and found.radius[3] > 0
    assert found.margin[0] == 0 and not found.prefers_left[0]
    zero = [torch.zeros(1, 4, dtype=torch.float64), *(image[3:, :4] for image in (x0, x1))]
    assert not _certify(zero, 1.0, 0.2, anchor=0.0).radius.any()  # no direction


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_scales_of_any_size(scale: float) -> None:
    images = _draw(100, 6, seed=9)
    found = _certify(images, 1.0, scale)
    assert torch.isfinite(found.radius).all() and torch.isfinite(found.margin).all()
    alone = C.certify_triplets(_images(images), *(image[:, :3] for image in images))
    # The second part is constant, but where the reference may come as near as that to a candidate, or worth nothing.
    same = (found.radius - alone.radius).abs() <= 2e-2 * (1 + alone.radius)
    assert (found.radius <= alone.radius + 2e-2).all() and same.double().mean() > 0.7


def test_radii_are_rounded_to_the_dtype_of_the_features() -> None:
    images = [image.float() for image in _draw(40, 6, seed=10)]
    single, double = _certify(images, 1.0, 0.2), _certify([image.double() for image in images], 1.0, 0.2)
    assert single.radius.dtype == torch.float32 and double.radius.dtype == torch.float64
    assert (single.radius.double() <= double.radius).all()


def test_an_interval_holds_the_distances() -> None:
    x, y, _ = _draw(100, 4, seed=11)
    eps = 0.2
    intervals = [C.distance_interval(a, b, eps) for a, b in zip(x.chunk(2, -1), y.chunk(2, -1), strict=True)]
    lower, upper = C.sum_interval(intervals[0], intervals[1], weight=2.0, scale=0.3)
    nearest, farthest = torch.full_like(lower, math.inf), torch.zeros_like(upper)
    for step in _circle(60):
        for other in _circle(60):
            distance = _sum(x + eps * torch.cat([step, other]), y, 2.0, 0.3)
            assert ((lower <= distance) & (distance <= upper)).all()
            nearest, farthest = torch.minimum(nearest, distance), torch.maximum(farthest, distance)
    assert (
        (upper - lower) < 1.5 * (farthest - nearest)
    ).double().mean() > 0.9  # the anchor stays, which it does not know


def test_features_of_any_size() -> None:
    images = _draw(60, 6, seed=12)
    plain = _certify(images, 1.0, 0.2, anchor=0.0)
    for size in (2.0**-900, 2.0**-30, 2.0**900):
        found = _certify([size * image for image in images], 1.0, 0.2, anchor=0.0)
        torch.testing.assert_close(found.radius / size, plain.radius, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.joint_radius / size, plain.joint_radius, rtol=1e-9, atol=0)
    huge = [torch.tensor([point], dtype=torch.float64) for point in ([1.2e308, 9.6e307], [1.0, 0.0], [-1.0, 0.0])]
    term = C.Term(*huge, anchor=0.0, lipschitz=10.0)
    found = C.certify_sum(_images(huge), term, term, weight=0.0, scale=1.0)
    assert 0 < found.radius <= C.reference_radius(*huge, anchor=0.0, lipschitz=10.0)


def test_a_reference_too_short_to_have_a_direction_certifies_nothing_by_it() -> None:
    short = [torch.tensor([point], dtype=torch.float64) for point in ([0.0, 1e-308], [1.0, 0.0], [0.0, 1.0])]
    near = [torch.tensor([point], dtype=torch.float64) for point in ([100.0, 0.0], [100.0, 0.0], [0.0, 100.0])]
    terms = C.Term(*short, anchor=1e-310), C.Term(*near, anchor=0.0)
    assert not C.certify_sum(_images(short), *terms, weight=1.2, scale=0.1).left_radius.any()


def test_encoders_of_very_different_reach() -> None:
    images = _draw(20, 3, seed=13)
    alone = C.certify_triplets(_images(images), *images)
    far = C.Term(*(1e20 * image for image in images))
    found = C.certify_sum(_images(images), C.Term(*images), far, weight=0.0, scale=1.0)
    torch.testing.assert_close(found.radius, alone.radius, rtol=1e-3, atol=1e-6)


def test_margins_of_distances_beyond_the_exponential() -> None:
    same = C.Term(*(torch.ones(1, 2, dtype=torch.float64) for _ in range(3)))
    z, z0, z1 = (torch.tensor([point], dtype=torch.float64) for point in ([1.0, 0.0], [-1.0, 1.0], [0.9, 0.1]))
    margin = C.sum_margin(same, C.Term(z, z0, z1, anchor=0.0), weight=1.0, scale=2e-3)
    assert margin < 0  # the left exponential is 0, the right one is not


def test_features_of_other_triplets_are_refused() -> None:
    images = _draw(3, 4, seed=0)
    with pytest.raises(ValueError, match="features of the 5 triplets by both encoders, got those of 3 and 3"):
        C.certify_sum(torch.zeros(5, 3, 2, 2), *_terms(images), weight=1.0, scale=1.0)


@pytest.mark.parametrize(("weight", "scale"), [(-1.0, 0.1), (1.0, 0.0), (math.nan, 0.1), (1.0, math.inf)])
def test_numbers_out_of_range_are_refused(weight: float, scale: float) -> None:
    with pytest.raises(ValueError, match=r"expected a finite (weight|scale)"):
        _certify(_draw(1, 4, seed=0), weight, scale)
