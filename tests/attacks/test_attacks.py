"""Attacks against closed forms on linear encoders, and against certificates, which no attack may break."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipsim
from lipsim import PerceptualMetric
from lipsim.attacks import (
    DistanceObjective,
    TwoAFCObjective,
    apgd,
    first_operator,
    mi_fgsm,
    null_space,
    one_pixel,
    pgd,
    project_to_kernel,
    square,
)
from lipsim.attacks.projections import sample_norm
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.metric import TiledMetric
from lipsim.metric.distances import pixel_l2
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork
from lipsim.teachers import SmallViT
from lipsim.utils.sampling import sample_normal


class LinearObjective:
    """``⟨w, x⟩ − c``: its smallest ℓ2 and ℓ∞ perturbations have a closed form."""

    def __init__(self, w: Tensor, offset: Tensor) -> None:
        self.w, self.offset = w, offset

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(1) - self.offset

    def select(self, rows: Tensor) -> LinearObjective:
        return LinearObjective(self.w[rows], self.offset[rows])


def _linear_problem(distance: Tensor) -> tuple[LinearObjective, Tensor]:
    x, w = torch.rand(len(distance), 3, 4, 4, dtype=torch.float64), torch.randn(len(distance), 3, 4, 4).double()
    return LinearObjective(w, (x * w).flatten(1).sum(1) + distance), x


@pytest.mark.parametrize("norm", [2, "inf"])
def test_pgd_finds_the_linear_optimum_and_no_more(norm) -> None:  # type: ignore[no-untyped-def]
    objective, x = _linear_problem(torch.ones(30, dtype=torch.float64))
    dual = objective.w.flatten(1).norm(dim=1) if norm == 2 else objective.w.flatten(1).abs().sum(1)
    for factor, expected in ((0.999, False), (1.02, True)):
        # One budget for all samples: scale each so that the smallest breaking perturbation is 1/factor of it.
        scaled = LinearObjective(objective.w / expand(dual), (x * objective.w / expand(dual)).flatten(1).sum(1) + 0.1)
        x_adv = pgd(scaled, x, norm=norm, eps=0.1 * factor, steps=50, box=None)
        assert ((scaled(x_adv) > 0) == expected).all()
        assert (sample_norm(x_adv - x, norm) <= 0.1 * factor + 1e-6).all()


def expand(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("norm", [2, "inf"])
def test_budget_and_box_hold(norm) -> None:  # type: ignore[no-untyped-def]
    objective, x = _linear_problem(torch.full((8,), 1e6, dtype=torch.float64))
    x_adv = pgd(objective, x, norm=norm, eps=0.5, steps=20, restarts=3)
    assert (sample_norm(x_adv - x, norm) <= 0.5 + 1e-6).all() and (sample_norm(x_adv - x, norm) > 0.3).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("eps", [0.14, 1.0])
@pytest.mark.parametrize("attack", [apgd, mi_fgsm, pgd, partial(square, box=None)])
def test_budgets_hold_where_the_rounding_of_every_pixel_is_the_same(attack: Any, eps: float) -> None:
    x = torch.tensor([0.1, 0.3, 0.7]).view(3, 1, 1, 1).expand(3, 3, 224, 224).clone()
    w = torch.full_like(x, x[0].numel() ** -0.5)
    x_adv = attack(LinearObjective(w, (x * w).flatten(1).sum(1) + 100), x, eps=eps, norm=2, steps=4)
    share = (x_adv.double() - x.double()).flatten(1).norm(dim=1) / eps
    assert (share <= 1 + 1e-6).all() and (share > 1 - 1e-3).all()
    hidden = null_space(nn.Conv2d(3, 8, 4, stride=4, bias=False), x, torch.ones_like(x), eps=eps)
    share = (hidden.double() - x.double()).flatten(1).norm(dim=1) / eps
    assert (share <= 1 + 1e-6).all() and (share > 1 - 1e-3).all()
    torch.testing.assert_close(sample_norm(w), torch.ones(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [2, "inf"])
def test_square_takes_images_of_many_channels(norm: Any) -> None:
    x, w = torch.full((2, 9, 8, 8), 0.5, dtype=torch.float64), torch.randn(2, 9, 1, 1).double().expand(2, 9, 8, 8)
    objective = LinearObjective(w, (x * w).flatten(1).sum(1) + 1e6)
    start, found = (square(objective, x, norm=norm, eps=0.2, steps=steps) for steps in (1, 300))
    assert (sample_norm(found - x, norm) <= 0.2 + 1e-9).all()
    assert (objective(found) > objective(start)).all() and ((found - start).abs().amax((2, 3)) > 0).all()


@pytest.mark.parametrize("shape", [(1, 32), (32, 1)])
def test_square_places_squares_on_images_one_pixel_wide(shape: tuple[int, int]) -> None:
    x, w = torch.full((2, 3, *shape), 0.5), torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    objective = LinearObjective(w, (x * w).flatten(1).sum(1) + 1e6)
    best = 0.1 * w.abs().flatten(1).sum(1)
    start, found = (square(objective, x, norm="inf", eps=0.1, steps=steps) for steps in (1, 300))
    gained = [((moved - x) * w).flatten(1).sum(1) / best for moved in (start, found)]
    assert bool((gained[0] < 0.6).all()) and bool((gained[1] > 0.8).all())


@pytest.mark.parametrize("attack", [apgd, pgd, square])
def test_the_budget_holds_where_a_pixel_is_far_larger_than_it(attack: Any) -> None:
    x = 255 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    w = torch.ones_like(x)
    objective = LinearObjective(w, (x * w).flatten(1).sum(1) + 200)
    moved = attack(objective, x, norm="inf", eps=0.1, steps=50, box=(0.0, 255.0))
    length = (moved.double() - x.double()).flatten(1).abs().amax(1)
    assert bool((length <= 0.1 * (1 + 1e-6)).all()) and bool((length > 0.0999).all())


def test_one_pixel_stays_in_any_box() -> None:
    x = 0.1 + 0.6 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for low, high in ((0.1, 0.7), (0.1, 0.9)):
        x = x.clamp(low, high)
        objective = LinearObjective(torch.ones_like(x), x.flatten(1).sum(1) + 1e6)
        moved = one_pixel(objective, x, num_pixels=2, generations=5, population=20, box=(low, high))
        assert float(moved.min()) >= x.new_tensor(low) and float(moved.max()) <= x.new_tensor(high)


def test_zero_budget_is_the_identity() -> None:
    objective, x = _linear_problem(torch.ones(4, dtype=torch.float64))
    assert torch.equal(pgd(objective, x, eps=0.0), x)


@pytest.mark.parametrize("eps", [-0.1, math.inf, math.nan])
def test_bad_budgets_are_refused(eps: float) -> None:
    objective, x = _linear_problem(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="budget eps"):
        pgd(objective, x, eps=eps)
    with pytest.raises(ValueError, match="norm 2, 'inf' or 0"):
        pgd(objective, x, norm=1, eps=0.1)  # type: ignore[arg-type]


def test_samples_do_not_depend_on_their_batch() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16).double()
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    index = torch.arange(100, 106)
    options = {"eps": 0.05, "steps": 5, "restarts": 2, "seed": 3}
    whole = pgd(TwoAFCObjective(metric, *images), images[0], index=index, **options)
    part = pgd(TwoAFCObjective(metric, *images[:, 4:]), images[0, 4:], index=index[4:], **options)
    torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-12)


def test_noise_depends_on_seed_and_index_only() -> None:
    like = torch.empty(3, 2, 2)
    a, b = sample_normal(like, seed=0, index=[5, 6, 7]), sample_normal(like, seed=0, index=[7, 5, 9])
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0])
    assert not torch.equal(a, sample_normal(like, seed=1, index=[5, 6, 7]))
    many = sample_normal(torch.empty(4000, 4), seed=0)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    assert len(torch.unique(many[:, 0])) == 4000
    with pytest.raises(ValueError, match="one index a sample"):
        sample_normal(like, seed=0, index=[1])


def _metrics() -> dict[str, PerceptualMetric]:
    sll = SLLNetwork(16, 8, channels=12, depth=2, linear_depth=1, linear_width=8)
    return {"linear": PerceptualMetric(OrthogonalProjection(16, 24), 16), "sll": PerceptualMetric(sll, 16)}


@pytest.mark.parametrize("name", ["linear", "sll"])
@pytest.mark.parametrize("box", [(0.0, 1.0), None])
@pytest.mark.parametrize("target", ["reference", "left", "right"])
def test_no_attack_breaks_a_certificate(name: str, box: tuple[float, float] | None, target: str) -> None:
    metric = _metrics()[name].double().eval()
    metric.audit()
    metric.requires_grad_(False)
    reference = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    left, right = ((reference + 0.3 * torch.randn_like(reference)).clamp(0, 1) for _ in range(2))
    certificate = metric.certify(reference, left, right)
    images = {"reference": reference, "left": left, "right": right}
    radii = {"reference": certificate.radius, "left": certificate.left_radius, "right": certificate.right_radius}
    objective = TwoAFCObjective(metric, reference, left, right, target=target)  # type: ignore[arg-type]
    broken = 0
    for i in range(3):
        row, x = objective.select(torch.tensor([i])), images[target][i : i + 1]
        radius = radii[target][i].item()
        assert row(pgd(row, x, eps=radius * (1 - 1e-9), steps=60, restarts=2, box=box)).item() <= 0
        broken += row(pgd(row, x, eps=radius * 4, steps=60, box=box)).item() > 0
    if target == "reference":  # the attack is strong enough for the test to mean something
        assert broken == 3


def test_pgd_reaches_the_exact_radius_of_a_linear_encoder() -> None:
    metric = _metrics()["linear"].double().eval()
    metric.lipschitz = 1.0
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    radius = metric.certify(*images).radius
    objective = TwoAFCObjective(metric, *images)
    for i in range(6):
        row = objective.select(torch.tensor([i]))
        x_adv = pgd(row, images[0, i : i + 1], eps=1.05 * radius[i].item(), steps=100, box=None)
        assert row(x_adv).item() > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["reference", "left", "right"])
def test_no_attack_breaks_the_bundled_metric(target: str) -> None:
    """The trained student on its own kind of images, in float64, without a box."""
    metric = lipsim.load("quickstart").double()
    images = BuiltinTriplets("test", 8).images.double().unbind(1)
    reference, left, right = (image / 255 for image in images)
    certificate = metric.certify(reference, left, right)
    radius = {"reference": certificate.radius, "left": certificate.left_radius, "right": certificate.right_radius}
    moving = {"reference": reference, "left": left, "right": right}[target]
    objective = TwoAFCObjective(metric, reference, left, right, target=target)  # type: ignore[arg-type]
    broken = 0
    for i in range(8):
        row, x = objective.select(torch.tensor([i])), moving[i : i + 1]
        eps = radius[target][i].item()
        assert row(pgd(row, x, eps=eps * (1 - 1e-9), steps=20, box=None)).item() <= 0
        broken += row(pgd(row, x, eps=eps * 3, steps=20, box=None)).item() > 0
    if target == "reference":  # whose radius is exact up to the network's own slack
        assert broken >= 6


def test_an_inflated_certificate_is_caught() -> None:
    """Positive control: the attack above breaks a radius that is 2 % too large."""
    metric = _metrics()["linear"].double().eval()
    metric.lipschitz = 1 / 1.02
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    radius = metric.certify(*images).radius
    objective = TwoAFCObjective(metric, *images)
    caught = 0
    for i in range(6):
        row = objective.select(torch.tensor([i]))
        caught += row(pgd(row, images[0, i : i + 1], eps=radius[i].item(), steps=200, box=None)).item() > 0
    assert caught >= 5


def test_objectives_agree_with_distances(triplets: Triplet) -> None:
    metric = _metrics()["sll"].eval()
    images = (triplets.reference, triplets.left, triplets.right)
    by_features, by_distance = TwoAFCObjective(metric, *images), TwoAFCObjective(metric.forward, *images)
    x = torch.rand_like(images[0])
    torch.testing.assert_close(by_features(x), by_distance(x), rtol=1e-3, atol=1e-6)
    assert (by_features(images[0]) <= 0).all()
    rows = torch.tensor([3, 7])
    torch.testing.assert_close(by_features.select(rows)(x[rows]), by_features(x)[rows])
    apart = DistanceObjective(metric, images[1], threshold=0.3)
    torch.testing.assert_close(apart(x), metric(x, images[1]) - 0.3)
    torch.testing.assert_close(
        DistanceObjective(pixel_l2, images[1], 2.0, increase=False)(x), 2 - pixel_l2(x, images[1])
    )
    with pytest.raises(ValueError, match="target to be one of"):
        TwoAFCObjective(metric, *images, target="both")  # type: ignore[arg-type]


def test_what_does_not_move_is_embedded_once() -> None:
    calls: list[int] = []

    class Counting(OrthogonalProjection):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    metric = PerceptualMetric(Counting(16, 4), 16, lipschitz=1.0)
    images = torch.rand(3, 5, 3, 16, 16)
    objective = TwoAFCObjective(metric, *images, chosen_left=torch.ones(5, dtype=torch.bool))
    assert calls == [10]
    objective(images[0])
    assert calls == [10, 5]


@pytest.mark.parametrize(
    ("conv", "kernel_dimension"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), 4 * (48 - 8)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), None),
        (nn.Conv2d(3, 16, 3, padding=1), 0),
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), 0),
    ],
    ids=["patches", "strided", "expanding", "resnet"],
)
def test_kernel_projection_against_svd(conv: nn.Conv2d, kernel_dimension: int | None) -> None:
    conv = conv.double().requires_grad_(False)
    basis = torch.eye(192, dtype=torch.float64).view(-1, 3, 8, 8)
    zero = conv(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    matrix = (conv(basis) - zero).flatten(1).T
    _, values, rows = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((values > 1e-9 * values[0]).sum())
    null = rows[rank:]
    if kernel_dimension is not None:
        assert len(null) == kernel_dimension
    v = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = (v.flatten(1) @ null.T @ null).view_as(v)
    got = project_to_kernel(lambda x: conv(x) - zero, v, iterations=3000, tolerance=1e-14)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [None, 0.5])
def test_null_space_of_a_vit_collides_exactly(eps: float | None) -> None:
    vit = SmallViT(32, patch_size=8, width=24, depth=1, heads=2).double().eval().requires_grad_(False)
    operator = first_operator(vit, 32)
    assert operator is not None and operator.kind == "Conv2d"
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    x[0, :, :10] = 0.0  # saturated pixels can move inwards only, and must not stop the others
    x_adv = null_space(operator.forward, x, torch.randn_like(x), eps=eps)
    length = sample_norm(x_adv - x)
    assert (length > 0.3).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    if eps is not None:
        torch.testing.assert_close(length, torch.full_like(length, eps))
    change = (vit(x_adv) - vit(x)).norm(dim=1)
    assert (change <= 1e-7 * length).all()
    random_change = (vit((x + 0.05 * torch.randn_like(x)).clamp(0, 1)) - vit(x)).norm(dim=1)
    assert (random_change > 1e-3).all()


def test_first_operator_of_students() -> None:
    projection = first_operator(OrthogonalProjection(16, 8), 16)
    assert projection is not None and projection.kind == "OrthogonalLinear"
    sll = SLLNetwork(16, 8, channels=8, depth=1, linear_depth=1, linear_width=8)
    nn.init.normal_(sll[1][0].bias)
    assert first_operator(sll, 16) is None
    default = first_operator(OrthogonalShiftNetwork(16, 8), 16)
    assert default is not None and default.kind == "OrthogonalPatches"


def test_images_that_a_layer_takes_in_pieces_collide_exactly() -> None:
    tiled = TiledMetric(PerceptualMetric(OrthogonalProjection(16, 8), 16), 2).double().eval().requires_grad_(False)
    operator = first_operator(tiled.encoder, 32)
    assert operator is not None and operator.kind == "OrthogonalLinear"
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    assert operator(x).shape[:2] == (3, 4)  # four tiles each
    hidden = null_space(operator.forward, x, torch.randn_like(x), eps=0.5)
    torch.testing.assert_close(sample_norm(hidden - x), torch.full((3,), 0.5, dtype=torch.float64))
    assert float(tiled(hidden, x).max()) < 1e-12 < float(tiled(x.roll(1, 0), x).min())


class Mixed(nn.Module):
    """Of which pieces of several images stand one after another, the first of all images first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.linear(x.flatten(1).view(len(x), 2, -1).transpose(0, 1).flatten(0, 1))
        return features


def test_pieces_that_are_not_together_are_no_operator() -> None:
    assert first_operator(Mixed(), 4) is None


def test_trivial_kernel_gives_no_perturbation() -> None:
    conv = nn.Conv2d(3, 16, 3, padding=1).double().requires_grad_(False)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    offset = conv(torch.zeros_like(x))
    x_adv = null_space(lambda d: conv(d) - offset, x, torch.randn_like(x), iterations=2000)
    assert torch.equal(x_adv, x)
    with pytest.raises(ValueError, match="budget eps"):
        null_space(lambda d: conv(d) - offset, x, torch.randn_like(x), box=None)
