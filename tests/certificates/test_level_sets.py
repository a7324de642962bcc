"""Certified segments, triangles and closest approaches: closed forms, dense samples, attacks, and faults they find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lipsim
from lipsim import PerceptualMetric
from lipsim import certificates as C
from lipsim.certificates import triangles
from lipsim.certificates.geometry import project
from lipsim.certificates.level_sets import SignedRadius
from lipsim.certificates.triangles import barycentric_grid
from lipsim.layers import evaluation_mode


def half_space(normal: Tensor, offset: float, slope: float = 1.0) -> SignedRadius:
    """The signed radius for ``⟨normal, x⟩ > offset`` when the level function may change by ``slope``."""

    def signed_radius(points: Tensor, _rows: Tensor) -> Tensor:
        return ((points.double() * normal).flatten(1).sum(1) - offset) / (slope * normal.norm())

    return signed_radius


def plane(*coordinates: tuple[float, float]) -> Tensor:
    """Points of a plane as images ``(N, 1, 1, 2)``."""
    return torch.tensor(coordinates, dtype=torch.float64).view(-1, 1, 1, 2)


RIGHT = torch.tensor([1.0, 0.0], dtype=torch.float64)  # towards growing first coordinates


def test_segments_of_a_half_space() -> None:
    level = half_space(RIGHT, 0.0)
    source = plane((1, 0), (1, 0), (0.1, 0), (1, 0), (1e-3, 0))
    end = plane((3, 0), (1, 1.9), (0.1, 2), (-0.1, 5), (1e-3, 1))
    found = C.certify_segments(level, source, end)
    assert found.proved.tolist() == [True, True, True, False, True]
    assert found.leaves.tolist() == [False, False, False, True, False]
    # Along the gradient, (g1 + g2 − Ks)/2 is the least value itself; across it, half the length is lost.
    assert found.radius[0].item() == pytest.approx(1, abs=1e-9)
    assert found.radius[1].item() == pytest.approx(0.05, abs=1e-9)
    assert bool((found.radius[:3] <= torch.tensor([1, 1, 0.1])).all())
    # With balls of 0.1 a segment of length 2 takes 11 points at least, and gaps are halved.
    assert found.evaluations[:2].tolist() == [2, 2]
    assert 11 <= int(found.evaluations[2]) <= 33
    # A limit leaves it undecided, and says which share of the length is proved.
    limited = C.certify_segments(level, source, end, most=5)
    assert (limited.proved | limited.leaves).tolist() == [True, True, False, True, False]
    assert limited.share[2].item() == pytest.approx(0.4, abs=1e-6)  # the ends and three points in between
    assert limited.radius[2] == 0
    nothing = C.certify_segments(lambda points, _: torch.zeros(len(points)), source, end, most=50)
    assert not (nothing.proved | nothing.leaves).any()
    assert bool((nothing.evaluations <= 50).all())


def test_points_between_are_certified_as_they_are_in_float32() -> None:
    """The images that are evaluated are rounded, those that are certified are not."""
    source, end = torch.rand(1, 3, 4, 4) * 1e4, torch.rand(1, 3, 4, 4) * 1e4
    seen: list[Tensor] = []

    def signed_radius(points: Tensor, _rows: Tensor) -> Tensor:
        seen.append(points)
        return torch.full((len(points),), 1e-3)  # a float32 number near 1e4 is off by as much

    found = C.certify_segments(signed_radius, source, end, points=9, most=9)
    places = torch.linspace(0, 1, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    off = (seen[0].double() - (source.double() * (1 - places) + end.double() * places)).flatten(1).norm(dim=1)
    assert seen[0].dtype == torch.float32
    length = float((source.double() - end.double()).norm())
    free = (1e-3 - off).clamp(min=0)
    expected = (2 * free.sum() - free[0] - free[-1]) / length
    assert float(off.max()) > 1e-4
    assert found.share.item() == pytest.approx(float(expected), rel=1e-4)


def test_stars_hold_all_their_segments() -> None:
    level = half_space(RIGHT, 0.0)
    outcomes = torch.stack([plane((1, 1), (2, 2), (1, 0)), plane((1, 1), (-1, 2), (1, 0))])

    def shifted(points: Tensor, samples: Tensor) -> Tensor:
        assert samples.max() <= 1
        return level(points, samples)

    star = C.certify_stars(shifted, plane((1, 0), (1, 0)), outcomes)
    assert star.proved.tolist() == [True, False]
    assert star.segments.leaves.tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize(("offset", "area"), [(-1.0, 1.0), (0.5, 0.25), (0.2, 0.64), (2.0, 0.0)])
def test_area_of_a_triangle_in_a_half_space(offset: float, area: float) -> None:
    """The triangle (0, 0), (1, 0), (0, 1) right of a vertical line."""
    corners = plane((0, 0), (1, 0), (0, 1)).unsqueeze(0)
    bounds = [C.certify_triangles(half_space(RIGHT, offset), corners, depth=depth) for depth in (0, 2, 4)]
    lower, upper = (torch.cat([found.area[i] for found in bounds]) for i in (0, 1))
    assert bool((lower <= area + 1e-12).all())
    assert bool((upper >= area - 1e-12).all())
    assert bool((lower.diff() >= 0).all())
    assert bool((upper.diff() <= 0).all())
    assert float(upper[-1] - lower[-1]) < 0.04
    assert bool(bounds[-1].proved) == (offset < 0)
    found = bounds[0]
    assert found.radii.shape == (1, 66)
    assert found.cells.shape == (100, 3)
    assert int(found.evaluations) == 66
    torch.testing.assert_close(found.radii[0], found.weights[:, 1] - offset, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divisions", [1, 2, 5])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_shares_of_cells_hold_what_a_line_cuts_off(divisions: int, depth: int) -> None:
    """Triangles of any shape under lines of any direction, cell by cell.

    Where the corners of a cell lie on both sides, the one that is alone on its side has h₀²/((h₀ − h₁)(h₀ − h₂)) of it.
    """
    draw = torch.Generator().manual_seed(3)
    corners = torch.randn(300, 3, 1, 1, 2, generator=draw, dtype=torch.float64)
    normal = torch.nn.functional.normalize(torch.randn(300, 2, generator=draw, dtype=torch.float64), dim=1)

    def height(points: Tensor, rows: Tensor) -> Tensor:
        return (points.double().flatten(1) * normal[rows]).sum(1)

    found = C.certify_triangles(height, corners, divisions=divisions, depth=depth)
    at_corners = (corners.flatten(2) * normal.unsqueeze(1)).sum(2)
    heights = (at_corners @ found.weights.T)[:, found.cells]  # (N, C, 3)
    positive = (heights > 0).sum(2)
    alone = torch.where(positive == 1, heights.argmax(2), heights.argmin(2)).unsqueeze(2)
    own = heights.gather(2, alone)
    cut = torch.where(torch.arange(3) == alone, 1.0, own / (own - heights)).prod(2)
    share = torch.stack([torch.zeros_like(cut), cut, 1 - cut, torch.ones_like(cut)], 2).gather(2, positive[..., None])
    share = share.squeeze(2)
    assert (found.inside <= share + 1e-9).all() and (share <= 1 - found.outside + 1e-9).all()
    undecided = (1 - found.inside - found.outside).mean()
    assert undecided < 1.7 / (divisions * 2**depth)


def test_cells_are_the_triangle() -> None:
    nodes, cells = barycentric_grid(7)
    points = nodes.double() / 7
    a, b, c = (points[cells[:, i], 1:] for i in range(3))
    areas = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).abs() / 2
    torch.testing.assert_close(areas, torch.full((49,), 0.5 / 49, dtype=torch.float64))
    assert sorted({tuple(cell.tolist()) for cell in cells}) == sorted(tuple(cell.tolist()) for cell in cells)


def test_three_discs_cover_what_dense_points_say() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(4_000, 3, 2, generator=generator, dtype=torch.float64)
    lengths = torch.stack([(corners[:, i] - corners[:, j]).norm(dim=1) for i, j in ((1, 2), (0, 2), (0, 1))], 1)
    radii = torch.rand(4_000, 3, generator=generator, dtype=torch.float64) * lengths.mean(1, keepdim=True) * 1.2
    covered = triangles._covered(radii, lengths)
    weights = barycentric_grid(60)[0].double() / 60
    points = weights @ corners
    inside = (torch.cdist(points, corners) < radii.unsqueeze(1)).any(2).all(1)
    assert not (covered & ~inside).any()
    # Sides that only the third disc covers, and flat triangles, are not counted.
    assert int((covered & inside).sum()) > 0.5 * int(inside.sum())
    by_one = (radii > lengths.amax(1, keepdim=True)).any(1)
    assert int((covered & ~by_one).sum()) > 300


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.3])
def test_signed_radius_of_the_same_is_the_distance_to_a_cone(anchor: float, threshold: float) -> None:
    """Against the nearest of dense points of the cone's surface, in three dimensions with the anchor."""
    generator = torch.Generator().manual_seed(1)
    z, y = torch.randn(200, 2, generator=generator, dtype=torch.float64), torch.tensor([[0.6, -0.8]]).double()
    e, axis = (torch.nn.functional.pad(t, (0, 1), value=anchor) for t in (z, y))
    axis = axis[0] / axis.norm()
    across = torch.linalg.svd(axis.view(1, 3)).Vh[1:]
    turn = torch.linspace(0, 2 * torch.pi, 2_001, dtype=torch.float64).unsqueeze(1)
    cosine = 1 - threshold
    rays = cosine * axis + (1 - cosine**2) ** 0.5 * (turn.cos() * across[0] + turn.sin() * across[1])
    away = e.unsqueeze(1) - (e @ rays.T).clamp(min=0).unsqueeze(2) * rays
    nearest = away.norm(dim=2).amin(1)
    inside = C.distance_interval(z, y.expand_as(z), 0.0, anchor=anchor)[0] <= threshold
    signed = C.same_radius(z, y.expand_as(z), threshold, anchor=anchor)
    assert 3 < int(inside.sum()) < 197
    assert bool((signed.abs() <= nearest).all())
    torch.testing.assert_close(signed, torch.where(inside, nearest, -nearest), rtol=0, atol=3e-3)  # of the rays
    # A signed distance: no two points differ by more than they are apart.
    slope = (signed.unsqueeze(0) - signed.unsqueeze(1)).abs() / torch.cdist(z, z).fill_diagonal_(1)
    assert float(slope.max()) <= 1 + 1e-9


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_answers_of_features_that_fill_the_range_of_float64(anchor: float) -> None:
    """Margin and norm overflow, and the sign of the radius does not go with them."""
    z = torch.tensor([[1.7e308, 1e308], [1e308, 1.7e308]], dtype=torch.float64)
    z0, z1 = torch.eye(2, dtype=torch.float64).split(1)
    for left in (True, False):
        signed = C.answer_radius(z, z0, z1, torch.tensor([left, left]), anchor=anchor)
        assert (signed > 0).tolist() == [left, not left]
        assert bool(signed.all())


def test_same_up_to_a_threshold_next_to_the_largest_distance() -> None:
    """Opposite features are at distance 2, which rounding says is less than that, and so within the threshold."""
    y = torch.randn(300, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    signed = C.same_radius(-3 * y, y, 2 - 2**-51, anchor=0.0)
    assert bool((signed < 0).all())
    assert bool((C.same_radius(-3 * y, y, 2.0, anchor=0.0) >= 0).all())  # where everything is


def test_closest_approach_is_tight_for_a_linear_encoder() -> None:
    """Coordinates of an orthonormal basis: the nearest point of the level set is the foot on its hyperplane."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
    z0, z1 = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    (p0, s0), (p1, s1) = project(z0), project(z1)
    normal, offset = (p0 - p1)[0] @ basis.T, float(s0 - s1)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    prefers_left = x @ normal + offset > 0
    # Targets have the other answer; the point of the level set is their foot, just across.
    foot = x - ((x @ normal + offset) / normal.norm()).unsqueeze(1) * (1 + 1e-6) * normal / normal.norm()

    def approach(lipschitz: float) -> C.ClosestApproach:
        signed = [C.answer_radius(t @ basis, z0, z1, ~prefers_left, lipschitz=lipschitz) for t in (foot, x)]
        return C.closest_approach(foot, x, *signed)

    tight = approach(1.0)
    assert bool((tight.ratio >= 1).all())
    assert float(tight.ratio.max()) < 1 + 2e-6
    assert bool((tight.achieved >= tight.bound).all())
    torch.testing.assert_close(tight.bound, tight.achieved, rtol=1e-9, atol=0)
    assert bool((approach(0.98).ratio < 1).all())  # a bound that is 2 % too small claims too much
    nothing = C.closest_approach(foot, x, torch.zeros(50), torch.zeros(50))
    assert bool((nothing.bound == 0).all())
    assert bool(nothing.ratio.isinf().all())
    arrived = C.closest_approach(x, x, torch.ones(50), torch.ones(50))
    assert bool(arrived.ratio.isinf().all())  # and not 0/0


def test_nothing_to_prove() -> None:
    level, corners = half_space(RIGHT, 0.0), plane((0, 0), (1, 0), (0, 1))
    triangles = C.certify_triangles(level, corners.expand(0, *corners.shape))
    assert triangles.proved.shape == (0,) and triangles.area[0].shape == (0,)
    star = C.certify_stars(level, corners, corners[:, None][:, :0])
    assert star.proved.tolist() == [True] * 3 and not len(star.segments.proved)


def test_bad_input_gets_one_line() -> None:
    level, points = half_space(RIGHT, 0.0), plane((0, 0), (1, 0))
    with pytest.raises(ValueError, match=r"expected ends like the sources \(2, 1, 1, 2\), got \(1, 1, 1, 2\)"):
        C.certify_segments(level, points, points[:1])
    with pytest.raises(ValueError, match="points ≥ 2, got 1"):
        C.certify_segments(level, points, points, points=1)
    with pytest.raises(ValueError, match=r"three images a triangle, \(N, 3, …\), got \(2, 1, 1, 2\)"):
        C.certify_triangles(level, points)
    with pytest.raises(ValueError, match="depth ≥ 0, got -1"):
        C.certify_triangles(level, points.repeat(2, 1, 1, 1, 1)[:, :3], depth=-1)
    with pytest.raises(ValueError, match=r"threshold in \[0, 2\]"):
        C.same_radius(torch.ones(1, 2), torch.ones(1, 2), 3.0)


def quickstart(lipschitz: float | None = None) -> PerceptualMetric:
    metric = lipsim.load("quickstart").frozen_copy(torch.float64)
    if lipschitz is not None:
        metric.lipschitz = lipschitz
    return metric


def images(count: int, seed: int) -> Tensor:
    """Smooth random images, ``(count, 3, 64, 64)`` float64."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=64, mode="bicubic", align_corners=True).clamp(0, 1)


def levels(metric: PerceptualMetric, kind: str, corners: Tensor) -> SignedRadius:
    """The level set of the first corner of each triangle ``(N, 3, …)``: its answer, or what is the same as it."""
    options = metric.certificate_options
    source = metric.embed(corners[:, 0], check_range=False)
    z0, z1 = metric.embed(images(2, 99)).split(1)
    left = metric.margin(source, z0, z1) > 0

    def answer(points: Tensor, rows: Tensor) -> Tensor:
        return C.answer_radius(metric.embed(points, check_range=False), z0, z1, left[rows], **options)

    def same(points: Tensor, rows: Tensor) -> Tensor:
        return C.same_radius(metric.embed(points, check_range=False), source[rows], 0.05, **options)

    return answer if kind == "triplet" else same


def attacked(level: SignedRadius, corners: Tensor, found: C.TriangleCertificate) -> float:
    """The least signed radius on proved cells: dense samples, and descent from the worst of them within their cells."""
    worst = torch.inf
    for row in range(len(corners)):
        cells = found.cells[found.inside[row] == 1]
        if not len(cells):
            continue
        share = torch.rand(3, len(cells), 3, dtype=torch.float64).log().neg()
        share = (share / share.sum(2, keepdim=True)).flatten(0, 1)
        vertices = found.weights[cells].repeat(3, 1, 1)

        def value(share: Tensor, vertices: Tensor, row: int = row) -> Tensor:
            weights = torch.einsum("ms,msc->mc", share, vertices)
            points = torch.einsum("mc,c...->m...", weights, corners[row])
            return level(points, torch.full((len(points),), row))

        with torch.no_grad():
            values = value(share, vertices)
        worst = min(worst, values.min().item())
        chosen = values.argsort()[:6]
        logits = share[chosen].log().requires_grad_()
        for _ in range(4):
            values = value(logits.softmax(1), vertices[chosen])
            worst = min(worst, values.min().item())
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            logits = (logits - 2 * gradient / gradient.abs().amax(1, keepdim=True)).detach().requires_grad_()
    return worst


@pytest.mark.parametrize("kind", ["triplet", "distance"])
def test_proved_cells_withstand_samples_and_attacks(kind: str) -> None:
    corners = torch.stack([images(2, 1), images(2, 2), images(2, 3)], 1)
    corners[:, 1:] = corners[:, :1] + 0.3 * (corners[:, 1:] - corners[:, :1])
    metric = quickstart()
    exact = levels(metric, kind, corners)
    with evaluation_mode(metric):
        proof = C.certify_triangles(exact, corners, depth=0)
        assert 0.05 < float(proof.inside.mean()) < 1
        assert attacked(exact, corners, proof) > 0
        # Planted: a bound that is much too small "proves" cells that are not in the level set, which is found out.
        wrong = levels(quickstart(metric.lipschitz / 20), kind, corners)
        claim = C.certify_triangles(wrong, corners, depth=0)
        assert attacked(exact, corners, claim) < 0
