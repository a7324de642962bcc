"""Certificates of means over tiles: against every split of a budget, and attacks on features that may go anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipsim import certificates as C
from lipsim.attacks import minimal_norm
from lipsim.certificates.geometry import cosine_distance
from lipsim.certificates.tiles import Losses


def _lost(losses: Losses, moved: Tensor) -> Tensor:
    """What tiles lose that move by ``moved``, by the definition."""
    turned = moved >= losses.norm
    alpha = torch.where(turned, math.pi, torch.asin((moved / losses.norm).clamp(max=1)))
    return losses.scale * (torch.cos(losses.angle) - torch.cos((losses.angle + alpha).clamp(max=math.pi)))


def _losses(count: int, tiles: int) -> Losses:
    draw = torch.rand(3, count, tiles, dtype=torch.float64)
    angle = math.pi * draw[1]
    angle[::2] = 1.2 + 0.7 * draw[1, ::2]  # where those of references are
    return Losses(1.5 * draw[0], angle, 0.3 + 2.7 * draw[2])


def test_the_worst_split_of_two_tiles() -> None:
    losses = _losses(60, 2)
    budget = losses.norm.amin(1) * torch.linspace(0.05, 1.6, 60, dtype=torch.float64)[torch.randperm(60)]
    turn = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    splits = torch.stack([torch.cos(turn), torch.sin(turn)], -1)  # of every direction
    spread = Losses(*(value[:, None] for value in (losses.scale, losses.angle, losses.norm)))
    truth = _lost(spread, budget[:, None, None] * splits).sum(-1).amax(1)
    bound = losses.worst(budget)
    assert (bound >= truth * (1 - 1e-12)).all()
    assert ((bound / truth) < 1 + 1e-6).double().mean() > 0.7 and (bound / truth).max() < 1.2


def test_one_tile_is_exact() -> None:
    losses = _losses(12, 1)
    budget = losses.norm[:, 0] * 0.9 * torch.rand(12, dtype=torch.float64)
    expected = _lost(losses, budget[:, None])[:, 0]
    torch.testing.assert_close(losses.worst(budget), expected, rtol=1e-9, atol=1e-12)
    rising = losses.angle[:, 0] + torch.asin(budget / losses.norm[:, 0]) < math.pi  # otherwise all is lost earlier
    torch.testing.assert_close(losses.radius(expected)[rising], budget[rising], rtol=1e-7, atol=0)


@pytest.mark.parametrize("tiles", [2, 5])
def test_a_radius_is_where_the_worst_split_takes_the_margin(tiles: int) -> None:
    losses = _losses(20, tiles)
    most = (losses.scale * (1 + torch.cos(losses.angle))).sum(-1)  # with every tile turned around
    margin = 0.9 * most * torch.rand(20, dtype=torch.float64)
    radius = losses.radius(margin)
    assert (losses.worst(radius * (1 - 1e-9)) <= margin * (1 + 1e-7)).all()  # which searches for its multiplier, too
    assert (losses.worst(radius * (1 + 1e-4)) >= margin * (1 - 1e-4)).all()
    tiny = losses.radius(1e-7 * margin)
    assert (tiny > 0).all() and (losses.worst(tiny) <= 1e-7 * margin * (1 + 1e-6)).all()


def _features(tiles: int, spread: float = 0.4, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    base = torch.randn(count, tiles, 6, dtype=torch.float64)
    lengths = 0.5 + 1.5 * torch.rand(count, tiles, 1, dtype=torch.float64)
    z, z0, z1 = (lengths * (base + spread * torch.randn_like(base)) for _ in range(3))
    return z, z0, z1


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_one_tile_is_a_metric_without_tiles(anchor: float) -> None:
    z, z0, z1 = _features(1)
    options = {"anchor": anchor, "lipschitz": 1.3, "feature_error": 1e-4}
    images = torch.rand(5, 3, 4, 4)
    tiled = C.certify_tiles(images, z, z0, z1, **options)
    plain = C.certify_triplets(images, z[:, 0], z0[:, 0], z1[:, 0], **options)
    assert torch.equal(tiled.prefers_left, plain.prefers_left)
    torch.testing.assert_close(tiled.margin, plain.margin, rtol=1e-10, atol=1e-13)
    if not anchor:
        torch.testing.assert_close(tiled.radius, plain.radius, rtol=5e-3, atol=1e-4)  # errors are counted otherwise
    for name in ("left_radius", "right_radius", "joint_radius"):
        torch.testing.assert_close(getattr(tiled, name), getattr(plain, name), rtol=5e-3, atol=2e-3)
    options["feature_error"] = 0.0
    tiled = C.certify_tiles(images, z, z0, z1, **options)
    plain = C.certify_triplets(images, z[:, 0], z0[:, 0], z1[:, 0], **options)
    assert (tiled.radius <= plain.radius * (1 + 1e-9)).all()
    for name in ("left_radius", "right_radius", "joint_radius", *(() if anchor else ("radius",))):
        torch.testing.assert_close(getattr(tiled, name), getattr(plain, name), rtol=1e-7, atol=1e-12)
    bounds = C.tiled_distance_interval(z, z0, 0.1, **options), C.distance_interval(z[:, 0], z0[:, 0], 0.1, **options)
    for ours, other in zip(*bounds, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)
    found = C.tiled_threshold_radius(z, z0, 0.2, **options)
    torch.testing.assert_close(found, C.threshold_radius(z[:, 0], z0[:, 0], 0.2, **options), rtol=1e-7, atol=1e-12)


def _mean_distance(z: Tensor, y: Tensor, anchor: float) -> Tensor:
    return cosine_distance(z, y, anchor).mean(-1)


class Broken:
    """An objective of features ``(N, T, D)`` that may go anywhere; ``loss`` gets them with their rows."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> None:
        self.loss, self.rows = loss, rows

    def __call__(self, x: Tensor) -> Tensor:
        return self.loss(x, self.rows)

    def select(self, rows: Tensor) -> Broken:
        return Broken(self.loss, self.rows[rows])


def _smallest(loss: Callable[[Tensor, Tensor], Tensor], start: Tensor, parts: int = 1) -> Tensor:
    """Length of the smallest change of features that an attack finds; of the longest part where there are several."""
    broken = Broken(loss, torch.arange(len(start)))
    found = minimal_norm(broken, start, steps=40, polish=40, box=None, parts=parts)
    change = (found - start).unflatten(1, (parts, -1)).flatten(2).norm(dim=-1).amax(1)
    return torch.where(broken(found) > 0, change, math.inf)


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_no_attack_on_the_features_breaks_a_certificate(anchor: float) -> None:
    """Features that may move freely, as those of a linear encoder do, are the worst that a Lipschitz bound allows."""
    features = _features(3, 0.7)
    certificate = C.certify_tiles(torch.rand(5, 3, 4, 4), *features, anchor=anchor)
    sign = torch.where(certificate.prefers_left, -1.0, 1.0)

    def flips(z: Tensor, z0: Tensor, z1: Tensor, rows: Tensor) -> Tensor:
        return sign[rows] * (_mean_distance(z, z1, anchor) - _mean_distance(z, z0, anchor))

    for moving, radius in enumerate((certificate.radius, certificate.left_radius, certificate.right_radius)):

        def one(x: Tensor, rows: Tensor, moving: int = moving) -> Tensor:
            now = [x if place == moving else still[rows] for place, still in enumerate(features)]
            return flips(*now, rows)  # type: ignore[call-arg]

        found = _smallest(one, features[moving])
        assert (radius > 0).all() and (found >= radius * (1 - 1e-9)).all(), moving
        assert float((found / radius).median()) < (1.01 if not anchor else 2)
    joint = _smallest(lambda x, rows: flips(*x.chunk(3, 1), rows), torch.cat(features, 1), parts=3)
    assert (certificate.joint_radius > 0).all() and (joint >= certificate.joint_radius * (1 - 1e-9)).all()


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_no_attack_leaves_the_interval_of_a_distance(anchor: float) -> None:
    z, y, _ = _features(3, 0.7)
    for eps in (0.05, 0.4, 1.5):
        lower, upper = C.tiled_distance_interval(z, y, eps, anchor=anchor)
        reached = []
        for sign in (1, -1):
            x = z + 1e-3 * torch.randn_like(z)
            for step in range(50):
                x.requires_grad_(True)
                (gradient,) = torch.autograd.grad(sign * _mean_distance(x, y, anchor).sum(), x)
                x = x.detach() + 0.3 * eps / (1 + step / 8) * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
                change = x - z
                x = z + change * (eps / change.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
            reached.append(_mean_distance(x, y, anchor))
        assert (reached[0] <= upper * (1 + 1e-12)).all() and (reached[1] >= lower - 1e-12).all()
        if not anchor and eps < 1:
            clean = _mean_distance(z, y, anchor)
            assert ((reached[0] - clean) / (upper - clean)).median() > 0.98
            assert ((clean - reached[1]) / (clean - lower)).median() > 0.98
    clean = _mean_distance(z, y, anchor)
    threshold = float(clean.median()) + 1e-3
    radius = C.tiled_threshold_radius(z, y, threshold, anchor=anchor)
    sign = torch.where(clean <= threshold, 1.0, -1.0)
    found = _smallest(lambda x, rows: sign[rows] * (_mean_distance(x, y[rows], anchor) - threshold), z)
    assert (found >= radius * (1 - 1e-9)).all() and (anchor or (found / radius).median() < 1.01)


def test_one_image_is_compared_with_many() -> None:
    one, many = torch.randn(1, 4, 3), torch.randn(30, 4, 3)
    for z, y in ((one, many), (many, one)):
        as_many = z.expand(30, 4, 3), y.expand(30, 4, 3)
        for threshold in (0.5, 1.0):
            radius = C.tiled_threshold_radius(z, y, threshold)
            torch.testing.assert_close(radius, C.tiled_threshold_radius(*as_many, threshold), rtol=1e-6, atol=0)
        for end, expected in zip(
            C.tiled_distance_interval(z, y, 0.3), C.tiled_distance_interval(*as_many, 0.3), strict=True
        ):
            torch.testing.assert_close(end, expected, rtol=1e-9, atol=0)
    for other in (many[:4], one[0], torch.randn(30, 2, 3)):
        with pytest.raises(ValueError, match="of as many images on both sides"):
            C.tiled_threshold_radius(many, other, 0.5)
        with pytest.raises(ValueError, match="of as many images on both sides"):
            C.tiled_distance_interval(many, other, 0.5)


def test_a_tile_within_its_error_may_have_no_direction() -> None:
    """Then the image is at distance 1 from everything: one tile takes the distance of all with it."""
    error, image = 1e-6, torch.rand(1, 3, 4, 4)
    z = torch.tensor([[[1.0, 0.0]] * 4])
    near, other = z.clone(), torch.tensor([[[0.2, math.sqrt(0.96)]] * 4])
    near[:, 3] *= 1e-7
    exact = near.clone()
    exact[:, 3] = 0  # what the features may be
    options = {"anchor": 0.0, "feature_error": error}
    for pair in ((z, near), (near, z)):
        lower, upper = C.tiled_distance_interval(*pair, 0.01, **options)
        assert lower <= 1 <= upper
        assert C.tiled_threshold_radius(*pair, 0.8, **options) == 0
    assert C.tiled_margin(z, near, other, anchor=0.0) > 0 > C.tiled_margin(z, exact, other, anchor=0.0)
    for triplet in ((z, near, other), (z, other, near), (near, z, other)):
        certificate = C.certify_tiles(image, *triplet, **options)
        for name in ("radius", "left_radius", "right_radius", "joint_radius"):
            assert not getattr(certificate, name).any(), name
    near[:, 3] *= 1e3  # beyond its error there is one
    assert C.certify_tiles(image, z, near, other, **options).radius > 0.1


def test_what_is_unknown_certifies_nothing() -> None:
    z, z0, z1 = _features(2)
    tie = C.certify_tiles(torch.rand(5, 3, 4, 4), z, z0, z0)
    assert not tie.prefers_left.any() and not tie.radius.any() and not tie.joint_radius.any() and not tie.pixels.any()
    unknown = z.clone()
    unknown[:, 1] = math.nan
    for certificate in (
        C.certify_tiles(torch.rand(5, 3, 4, 4), unknown, z0, z1),
        C.certify_tiles(torch.rand(5, 3, 4, 4), z, z0, z1, lipschitz=math.inf),
    ):
        for name in ("radius", "left_radius", "right_radius", "joint_radius"):
            assert not getattr(certificate, name).any(), name
    for first, second, options in ((unknown, z0, {}), (z, unknown, {}), (z, z0, {"lipschitz": math.inf})):
        lower, upper = C.tiled_distance_interval(first, second, 0.1, **options)
        assert not lower.any() and (upper == 2).all()
    lower, upper = C.tiled_distance_interval(z, z0, 0.0)
    torch.testing.assert_close(lower, _mean_distance(z, z0, 1.0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(upper, lower, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="eps ≥ 0"):
        C.tiled_distance_interval(z, z0, -0.1)
