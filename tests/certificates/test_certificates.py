"""Radii against closed forms, and against an attack in feature space that may reach all that the bound allows.

In feature space a perturbation of the image by ε can be any feature perturbation of norm Lε, so an attack there is the
strongest that exists for an unknown L-Lipschitz encoder.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from feature_attack import Features, ascend, flips, margin
from torch.nn import functional as F

from lipsim import certificates as C
from lipsim.certificates.geometry import anchored_norm, cosine_distance, project
from lipsim.certificates.numbers import check_count

ANCHORS = [0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("lipschitz", [1.0, 2.5])
def test_reference_radius_is_exact(features: Features, anchor: float, lipschitz: float) -> None:
    z, z0, z1 = features
    radius = C.reference_radius(z, z0, z1, anchor=anchor, lipschitz=lipschitz)
    assert (radius > 0).all()
    # The nearest point of the boundary lies along the normal w, which has a closed form.
    (p0, _), (p1, _) = project(z0, anchor), project(z1, anchor)
    normal = -torch.sign(margin(z, z0, z1, anchor)).unsqueeze(1) * F.normalize(p0 - p1, dim=1)
    for factor, expected in ((1 - 1e-9, False), (1 + 1e-6, True)):
        moved = z + factor * (lipschitz * radius).unsqueeze(1) * normal
        assert (flips(features, (moved, z0, z1), anchor) == expected).all()
    assert not ascend(features, {0: lipschitz * radius * (1 - 1e-9)}, anchor).any()


@pytest.mark.parametrize("anchor", ANCHORS)
def test_candidate_radii_withstand_attack(features: Features, anchor: float) -> None:
    left, right = C.candidate_radii(*features, anchor=anchor)
    assert not ascend(features, {1: left * (1 - 1e-9)}, anchor).any()
    assert not ascend(features, {2: right * (1 - 1e-9)}, anchor).any()


def test_candidate_radii_are_exact_without_anchor(features: Features) -> None:
    z, z0, z1 = features
    left, right = C.candidate_radii(z, z0, z1, anchor=0.0)
    # Where the radius is the whole norm, only the origin is reached, not the other side.
    for i, radius in ((1, left), (2, right)):
        inside = radius < 0.999 * anchored_norm(features[i], 0.0)
        assert inside.sum() > 20
        flipped = ascend(features, {i: radius * 1.01}, 0.0, steps=2000)
        assert flipped[inside].double().mean() > 0.95


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_distance_interval_holds_every_reachable_distance(features: Features, anchor: float) -> None:
    z, y, _ = features
    eps = 0.3 * anchored_norm(z, anchor)
    lower, upper = C.distance_interval(z, y, eps, anchor=anchor)
    extremes = []
    for sign in (1, -1):
        delta = torch.zeros_like(z, requires_grad=True)
        for step in range(400):
            value = (sign * cosine_distance(z + delta, y, anchor)).sum()
            (gradient,) = torch.autograd.grad(value, delta)
            new = delta.detach() + eps.unsqueeze(1) * F.normalize(gradient, dim=1) / (1 + step / 10)
            delta = (F.normalize(new, dim=1) * torch.minimum(new.norm(dim=1), eps).unsqueeze(1)).requires_grad_()
        extremes.append(cosine_distance(z + delta.detach(), y, anchor))
    highest, lowest = extremes
    assert (highest <= upper + 1e-12).all()
    assert (lowest >= lower - 1e-12).all()
    if anchor == 0:  # exact there, unless the interval ends at 0 or 2
        open_ended = (upper > 2 - 1e-9) | (lower < 1e-9)
        torch.testing.assert_close(highest[~open_ended], upper[~open_ended], atol=1e-4, rtol=1e-3)


def test_self_distance_bound_is_quadratic() -> None:
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for eps in (1e-3, 1e-2):
        upper = C.distance_interval(z, z, eps, anchor=0.0)[1].item()
        assert upper == pytest.approx(1 - math.sqrt(1 - (eps / 5) ** 2), rel=1e-9)
        assert upper == pytest.approx(eps**2 / 50, rel=1e-4)


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.2])
def test_threshold_radius(features: Features, anchor: float, threshold: float) -> None:
    z, y, _ = features
    radius = C.threshold_radius(z, y, threshold, anchor=anchor)
    lower, upper = C.distance_interval(z, y, radius * (1 - 1e-9), anchor=anchor)
    same = cosine_distance(z, y, anchor) <= threshold
    assert torch.where(same, upper <= threshold + 1e-12, lower >= threshold - 1e-12).all()


def test_retrieval_radius_keeps_the_nearest_set() -> None:
    query, gallery = torch.randn(20, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    distance = torch.stack([cosine_distance(query, item.expand_as(query)) for item in gallery], 1)
    for k in (1, 3):
        radius = C.retrieval_radius(query, gallery, k=k)
        nearest = [set(row[:k].tolist()) for row in distance.argsort(1)]
        worst = torch.full((20,), math.inf, dtype=torch.float64)
        for i, inside in enumerate(nearest):
            for a in inside:
                for b in set(range(8)) - inside:
                    worst[i] = min(worst[i], C.reference_radius(query[i : i + 1], gallery[[a]], gallery[[b]]).item())
        torch.testing.assert_close(radius, worst)
    with pytest.raises(ValueError, match="1 ≤ k < 8"):
        C.retrieval_radius(query, gallery, k=8)


def test_published_radius_is_never_larger_with_an_anchor_and_overclaims_without(features: Features) -> None:
    for anchor in (1.0, 2.0):
        assert (
            C.published_radius(*features, anchor=anchor) <= C.reference_radius(*features, anchor=anchor) + 1e-12
        ).all()
    z = features[0]
    ratio = C.published_radius(*features, anchor=0.0) / C.reference_radius(*features, anchor=0.0)
    torch.testing.assert_close(ratio, 1 / z.norm(dim=1))
    assert (ratio[z.norm(dim=1) < 1] > 1).all()


@pytest.mark.parametrize("radius", [C.reference_radius, C.joint_radius, lambda *z: C.candidate_radii(*z)[0]])
def test_ties_and_nan_have_radius_zero(radius) -> None:  # type: ignore[no-untyped-def]
    z, z0, z1 = torch.randn(3, 3, 4, dtype=torch.float64)
    z1[0] = z0[0]
    z[1, 0] = math.nan
    z0[2] = math.inf
    assert radius(z, z0, z1).tolist() == [0, 0, 0]
    zero = torch.zeros(1, 4)
    assert radius(zero, zero, zero).item() == 0


def test_no_lipschitz_bound_means_no_radius(features: Features) -> None:
    assert (C.reference_radius(*features, lipschitz=math.inf) == 0).all()
    assert (C.joint_radius(*features, lipschitz=math.inf) == 0).all()
    lower, upper = C.distance_interval(features[0], features[1], 0.1, lipschitz=math.inf)
    assert (lower == 0).all() and (upper == 2).all()


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_feature_error_covers_perturbed_features(features: Features, anchor: float) -> None:
    """Radii from features that are off by η still hold for the features they should have been."""
    error = 0.02
    true = tuple(z + 0.0 for z in features)
    for trial in range(20):
        generator = torch.Generator().manual_seed(trial)
        off = tuple(
            z + error * F.normalize(torch.randn(z.shape, generator=generator, dtype=z.dtype), dim=1) for z in true
        )
        options = {"anchor": anchor, "feature_error": error}
        assert (C.reference_radius(*off, **options) <= C.reference_radius(*true, anchor=anchor) + 1e-12).all()
        claimed = zip(C.candidate_radii(*off, **options), C.candidate_radii(*true, anchor=anchor), strict=True)
        for got, limit in claimed:
            assert (got <= limit + 1e-12).all()
        assert (C.joint_radius(*off, **options) <= C.joint_radius(*true, anchor=anchor) + 1e-12).all()


def _of_many_norms(count: int) -> list[torch.Tensor]:
    """Features of triplets, of norms up to forty times each other's: no term of a bound makes up for another."""
    draw = torch.Generator().manual_seed(5)
    norms = 0.5 * 40 ** torch.rand(3, count, 1, generator=draw, dtype=torch.float64)
    return [n * F.normalize(torch.randn(count, 3, generator=draw, dtype=torch.float64), dim=1) for n in norms]


def _turned(features: torch.Tensor, toward: torch.Tensor, error: float) -> torch.Tensor:
    """Features no farther than ``error`` that are turned towards others, or away, as far as they can be."""
    norm, toward = features.norm(dim=1, keepdim=True), F.normalize(toward, dim=1)
    unit = features / norm
    across = F.normalize(toward - (toward * unit).sum(1, keepdim=True) * unit, dim=1)
    angle = torch.asin((abs(error) / norm).clamp(max=1))
    # Of all at this angle the nearest one, which is shorter by its cosine.
    turned = norm * torch.cos(angle) * (torch.cos(angle) * unit + math.copysign(1, error) * torch.sin(angle) * across)
    assert ((turned - features).norm(dim=1) <= abs(error) * (1 + 1e-9)).all()
    return turned


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
def test_feature_error_covers_the_worst_features(error: float) -> None:
    """The candidates turned as far as η turns them, against the answer, and the reference moved the shortest way."""
    off = _of_many_norms(20_000)
    left = C.linear_margin(*off, anchor=0.0)[0].unsqueeze(1) > 0
    off[1], off[2] = torch.where(left, off[1], off[2]), torch.where(left, off[2], off[1])
    moved = [_turned(off[1], off[0], -error), _turned(off[2], off[0], error)]
    unit0, unit1 = (F.normalize(e, dim=1) for e in moved)
    true = (off[0] - error * F.normalize(unit0 - unit1, dim=1), *moved)
    keeps = C.linear_margin(*true, anchor=0.0)[0] > 0
    options = {"anchor": 0.0, "feature_error": error}
    pairs = [(C.reference_radius(*off, **options), C.reference_radius(*true, anchor=0.0))]
    pairs += zip(C.candidate_radii(*off, **options), C.candidate_radii(*true, anchor=0.0), strict=True)
    pairs += [(C.joint_radius(*off, **options), C.joint_radius(*true, anchor=0.0))]
    for claimed, there in pairs:
        assert (claimed <= torch.where(keeps, there, 0.0) + 1e-12).all()
        assert (claimed > 0).sum() > 3000


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_feature_error_covers_the_worst_distances(error: float, sign: int) -> None:
    z, y, _ = _of_many_norms(20_000)
    options = {"anchor": 0.0, "feature_error": error}
    true = _turned(z, y, sign * error), _turned(y, z, sign * error)
    before, distance = (1 - F.cosine_similarity(*pair, dim=1) for pair in ((z, y), true))
    lower, upper = C.distance_interval(z, y, 0.0, **options)
    assert (lower <= distance + 1e-12).all() and (distance <= upper + 1e-12).all()
    inside = (lower > 0.01) & (upper < 1.99)
    end = lower if sign > 0 else upper
    torch.testing.assert_close(end[inside], distance[inside], rtol=0, atol=1e-9)  # no wider than it has to be
    claimed, there = C.threshold_radius(z, y, 0.7, **options), C.threshold_radius(*true, 0.7, anchor=0.0)
    keeps = (distance <= 0.7) == (before <= 0.7)
    assert (claimed <= torch.where(keeps, there, 0.0) + 1e-12).all() and (claimed > 0).sum() > 10_000


def test_float32_radii_agree_with_float64(features: Features) -> None:
    single = C.reference_radius(*(z.float() for z in features))
    torch.testing.assert_close(single.double(), C.reference_radius(*features), rtol=1e-4, atol=1e-6)


def test_signed_radius_has_the_gradient_of_a_distance_to_a_plane(features: Features) -> None:
    z, z0, z1 = (t.clone().requires_grad_() for t in features)
    radius = C.signed_reference_radius(z, z0, z1)
    (gradient,) = torch.autograd.grad(radius.sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient.norm(dim=1), torch.ones(64, dtype=torch.float64))
    assert torch.autograd.gradcheck(C.signed_reference_radius, (z[:4], z0[:4], z1[:4]))


def test_gradient_is_finite_at_a_tie() -> None:
    z, z0 = torch.randn(2, 3, 4, dtype=torch.float64)
    z0 = z0.requires_grad_()
    C.signed_reference_radius(z, z0, z0).sum().backward()
    assert z0.grad is not None and torch.isfinite(z0.grad).all()


def test_certified_pixels_against_the_worst_recolouring() -> None:
    x = torch.rand(6, 3, 4, 4, dtype=torch.float64)
    radius = torch.tensor([0.1, 1.0, 1.8, 2.5, 4.0, 100.0], dtype=torch.float64)
    certified = C.certified_pixels(x, radius)
    worst = torch.where(x > 0.5, 0.0, 1.0)
    cost = (worst - x).square().sum(1).flatten(1)
    for i, k in enumerate(certified.tolist()):
        order = cost[i].argsort(descending=True)
        assert cost[i][order[:k]].sum().sqrt() < radius[i]
        if k < 16:
            assert cost[i][order[: k + 1]].sum().sqrt() >= radius[i]
    assert certified[-1] == 16
    assert (C.certified_pixels(torch.rand(50, 3, 4, 4), torch.full((50,), math.sqrt(3) + 1e-9)) >= 1).all()
    # 47 pixels of three quarters are less than 36, and none costs less.
    assert C.certified_pixels(torch.full((2, 3, 8, 8), 0.5), torch.tensor([1.0, 6.0])).tolist() == [1, 47]


@pytest.mark.parametrize(("height", "width", "size"), [(37, 52, 16), (16, 16, 16), (20, 20, 33)])
def test_resize_norm_is_the_operator_norm(height: int, width: int, size: int) -> None:
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    matrix = F.interpolate(basis, size=(size, size), mode="bicubic", antialias=True).flatten(1)
    expected = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert C.resize_norm((height, width), size) == pytest.approx(expected, rel=1e-9)
    assert C.resize_norm((height, width), size) >= expected * (1 - 1e-14)


def test_bad_arguments() -> None:
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match="eps ≥ 0"):
        C.distance_interval(z, z, -0.1)
    with pytest.raises(ValueError, match="as numbers, got '36/255'"):
        C.distance_interval(z, z, "36/255")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        C.threshold_radius(z, z, 2.5)


BAD = [-0.1, -1e4, math.nan, "1", True, None]
RADII = [C.reference_radius, C.candidate_radii, C.joint_radius]


@pytest.mark.parametrize("value", [*BAD, math.inf])
@pytest.mark.parametrize("name", ["anchor", "lipschitz", "feature_error"])
def test_numbers_that_would_widen_a_certificate_are_refused(name: str, value: object) -> None:
    z, z0, z1 = torch.randn(3, 2, 3)
    calls = [lambda f=f, **options: f(z, z0, z1, **options) for f in RADII]
    calls += [lambda **options: C.distance_interval(z, z0, 0.1, **options)]
    calls += [lambda **options: C.threshold_radius(z, z0, 0.1, **options)]
    calls += [lambda **options: C.retrieval_radius(z, torch.cat([z0, z1]), **options)]
    if name != "feature_error":
        functions = [C.signed_reference_radius, C.signed_joint_radius, C.published_radius]
        calls += [lambda f=f, **options: f(z, z0, z1, **options) for f in functions]
    if name == "anchor":
        calls += [lambda **options: C.linear_margin(z, z0, z1, **options)]
    for call in calls:
        if name == "lipschitz" and value == math.inf:  # no bound: nothing is certified
            call(**{name: value})
            continue
        with pytest.raises(ValueError, match="expected a "):
            call(**{name: value})
    assert all((f(z, z0, z1, lipschitz=math.inf) == 0).all() for f in (C.reference_radius, C.joint_radius))


def test_other_numbers_that_are_refused() -> None:
    z = torch.randn(2, 3)
    for threshold in (math.nan, "1", True):
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            C.threshold_radius(z, z, threshold)  # type: ignore[arg-type]
    for count in (0, -3, 2.5):
        with pytest.raises(ValueError, match="num_elements"):
            C.linf_radius(z[:, 0], count)  # type: ignore[arg-type]


def test_whole_numbers_of_other_libraries_are_taken() -> None:
    found = check_count("k", np.int64(3))
    assert found == 3 and type(found) is int
    assert C.retrieval_radius(torch.randn(2, 3), torch.randn(5, 3), k=np.int64(2)).shape == (2,)  # type: ignore[arg-type]
    for value in (np.bool_(True), np.float64(3), True):
        with pytest.raises(ValueError, match="expected a whole number k ≥ 1"):
            check_count("k", value)


def test_no_radius_certifies_no_pixel() -> None:
    x = torch.rand(4, 3, 2, 2)
    radius = torch.tensor([-5.0, -math.inf, math.nan, 0.0])
    assert C.certified_pixels(x, radius).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        C.certified_pixels((x * 255).to(torch.uint8), radius)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_radii_are_clamped_to_the_largest_finite_number(dtype: torch.dtype, size: float) -> None:
    z, z0, z1 = (
        torch.tensor([row], dtype=torch.float64).mul(size).to(dtype) for row in ([1.0, 1.0], [1.0, 0.0], [-1.0, 0.0])
    )
    for anchor in (0.0, 1.0):
        # Norms of 1.41 times the size, some of them beyond the dtype; the exact radius of the reference is its first.
        radius = C.reference_radius(z, z0, z1, anchor=anchor)
        assert radius.dtype == dtype and (0.99 * z[:, 0].double() <= radius.double()).all()
        assert (radius.double() <= z[:, 0].double()).all()
        left, right = C.candidate_radii(z, z, -z, anchor=anchor)
        for found in (left, right, C.threshold_radius(z, -z, 0.0, anchor=anchor)):
            assert torch.isfinite(found).all() and (found.double() > 0.99 * size).all(), (found, anchor)
        assert torch.isfinite(C.reference_radius(z, z0, z1, anchor=anchor, lipschitz=1e-300)).all()


@pytest.mark.parametrize("size", [1e300, 1.4e154, 1.0, 1e-160, 1e-300])
def test_radii_scale_with_the_features(size: float) -> None:
    features = torch.randn(3, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [f(*features, anchor=0.0, lipschitz=1.1) for f in (C.reference_radius, C.joint_radius)]
    expected += C.candidate_radii(*features, anchor=0.0, lipschitz=1.1)
    found = [f(*(size * features), anchor=0.0, lipschitz=1.1) for f in (C.reference_radius, C.joint_radius)]
    found += C.candidate_radii(*(size * features), anchor=0.0, lipschitz=1.1)
    for one, scaled in zip(expected, found, strict=True):
        torch.testing.assert_close(scaled / size, one, rtol=1e-11, atol=0)
    signed = C.signed_reference_radius(*(size * features), anchor=0.0)
    torch.testing.assert_close(signed / size, C.signed_reference_radius(*features, anchor=0.0), rtol=1e-11, atol=0)
    # With an anchor far below or far above them, features of any size leave the answer sound and finite.
    for radius in (C.reference_radius(*(size * features)), C.joint_radius(*(size * features))):
        assert torch.isfinite(radius).all() and (radius >= 0).all()


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_answers_of_features_near_the_end_of_the_range(anchor: float) -> None:
    """The margin itself would be infinity less infinity."""
    z0 = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    z = torch.tensor([[1.7e308, 1.5e308]], dtype=torch.float64)
    certificate = C.certify_triplets(torch.full((1, 3, 2, 2), 0.5), z, z0, -z0, anchor=anchor)
    expected = C.margin(z / 2.0**900, z0, -z0, anchor=anchor)
    assert certificate.prefers_left.all() and (certificate.radius > 0).all() and (expected > 0).all()
    torch.testing.assert_close(certificate.margin, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(C.margin(z, z0, -z0, anchor=anchor), expected, rtol=1e-14, atol=0)


def test_upper_ends_of_tiny_distances_do_not_round_to_zero() -> None:
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for dtype in (torch.float16, torch.float32):
        _, upper = C.distance_interval(z.to(dtype), z.to(dtype), 1e-30)
        assert upper.dtype == dtype and upper.item() > 0


@pytest.mark.parametrize("size", [(50, 70), (24, 24), (16, 16)])
def test_radii_in_the_pixels_of_a_file_cover_the_rounding_on_the_way(size: tuple[int, int]) -> None:
    radius = C.original_radius(0.5, size, 16)
    norm = 1.0 if size == (16, 16) else C.resize_norm(size, 16)
    half = 2.0**-25  # what rounding to float32 can change a value in [½, 1] by
    lost = 2 * half * (math.sqrt(3 * size[0] * size[1]) + (0 if size == (16, 16) else math.sqrt(3) * 16 / norm))
    assert 0.5 / norm - 1.001 * lost <= radius <= 0.5 / norm - lost
    assert C.original_radius(1e-7, size, 16) == 0


def test_lengths_without_all_their_digits_certify_nothing() -> None:
    z = torch.tensor([[3.76e19, -1e20, 2.81e19]], dtype=torch.float64)
    z0 = torch.tensor([[-5.39e-321, -1.54e-321, 1e-320]], dtype=torch.float64)
    z1 = torch.tensor([[4.49e-21, 6.58e-21, 5.54e-21]], dtype=torch.float64)
    left, right = C.candidate_radii(z, z0, z1, anchor=0.0, lipschitz=1e-200)
    assert left == 0 and right == 0  # it is not known how z0 turns, either
    assert C.joint_radius(z, z0, z1, anchor=0.0, lipschitz=1e-200) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_radius_is_never_more_than_its_share(dtype: torch.dtype) -> None:
    radius = torch.rand(500, dtype=dtype)
    for count in (3, 192, 12288):
        found = [Fraction(value) for value in C.linf_radius(radius, count).tolist()]
        exact = [Fraction(value) for value in radius.tolist()]
        assert all(a * a * count <= b * b for a, b in zip(found, exact, strict=True))
        torch.testing.assert_close(C.linf_radius(radius, count), radius / count**0.5)


def test_margins_of_wide_features_in_half_precision() -> None:
    """As of equal features in float64: the sum of 100,000 squares is beyond the range of float16."""
    z, z0, z1 = (torch.rand(3, 4, 100_000) + 0.5).half()
    wide = [features.double() for features in (z, z0, z1)]
    torch.testing.assert_close(C.margin(z, z0, z1).double(), C.margin(*wide), rtol=1e-3, atol=1e-7)
    for found, expected in zip(C.linear_margin(z, z0, z1), C.linear_margin(*wide), strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_budgets_of_a_column_are_refused() -> None:
    z, y = torch.rand(2, 3, 5)
    with pytest.raises(ValueError, match=r"one a pair \(3,\), got \(3, 1\)"):
        C.distance_interval(z, y, torch.full((3, 1), 0.1))
    one, each = C.distance_interval(z, y, 0.1), C.distance_interval(z, y, torch.full((3,), 0.1))
    assert torch.equal(one[0], each[0]) and torch.equal(one[1], each[1])
