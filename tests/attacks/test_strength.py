"""Every attack against closed forms: linear objectives, 1-Lipschitz encoders, budgets, boxes, seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lipsim import PerceptualMetric
from lipsim.attacks import DistanceObjective, TwoAFCObjective, apgd, mi_fgsm, minimal_norm, one_pixel, pgd, square
from lipsim.attacks.objectives import value_and_gradient
from lipsim.attacks.one_pixel import _three_others
from lipsim.attacks.projections import Ball, Box, Norm, expand, sample_norm
from lipsim.attacks.square import _bump, _tiles
from lipsim.certificates import linear_margin
from lipsim.layers import GroupSort, OrthogonalLinear
from lipsim.metric.distances import pixel_l2, ssim
from lipsim.students import OrthogonalProjection, SLLNetwork
from lipsim.utils.sampling import sample_uniform

Attack = Callable[..., Tensor]
GRADIENT: list[Attack] = [pgd, apgd, mi_fgsm]
ALL: list[tuple[Attack, Norm]] = [
    *((attack, norm) for attack in GRADIENT for norm in (2, "inf", 0)),
    (square, 2),
    (square, "inf"),
]
BOXES = [(*case, box) for case in ALL for box in ((0.0, 1.0), None) if case[1] != 0 or box]  # ℓ0 needs a box
NAMES = [f"{attack.__name__}-{norm}" for attack, norm in ALL]


class Linear:
    """``⟨w, x⟩ − c``, whose maximum over any ball and box has a closed form."""

    def __init__(self, w: Tensor, offset: Tensor) -> None:
        self.w, self.offset = w, offset

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(1) - self.offset

    def select(self, rows: Tensor) -> Linear:
        return Linear(self.w[rows], self.offset[rows])


def _linear(count: int = 8, size: int = 8, channels: int = 3) -> tuple[Linear, Tensor]:
    """An objective that is out of reach, so that no attack stops early."""
    x = torch.rand(count, channels, size, size, dtype=torch.float64)
    w = torch.randn_like(x)
    return Linear(w, (x * w).flatten(1).sum(1) + 1e6), x


def _optimum(w: Tensor, x: Tensor, norm: Norm, eps: float, box: Box) -> Tensor:
    """Largest ``⟨w, δ⟩`` in the ball and the box."""
    low, high = (-1e9, 1e9) if box is None else box
    if norm == "inf":
        return (w * ((x + eps * w.sign()).clamp(low, high) - x)).flatten(1).sum(1)
    if norm == 0:
        gains = torch.where(w > 0, (high - x) * w, (low - x) * w).sum(1).flatten(1)
        return gains.topk(int(eps)).values.sum(1)
    below, above = torch.zeros(len(x)).double(), torch.full((len(x),), 1e3).double()
    for _ in range(200):  # on the multiplier of δ = clip(λw)
        factor = (below + above) / 2
        delta = (x + expand(factor, x) * w).clamp(low, high) - x
        longer = delta.flatten(1).norm(dim=1) > eps
        below, above = torch.where(longer, below, factor), torch.where(longer, factor, above)
    return (w * delta).flatten(1).sum(1)


@pytest.mark.parametrize(("attack", "norm", "box"), BOXES)
def test_linear_optima(attack: Attack, norm: Norm, box: Box) -> None:
    objective, x = _linear()
    eps = {2: 0.7, "inf": 0.06, 0: 5}[norm]
    options = {"steps": 1500} if attack is square else {}
    x_adv = attack(objective, x, norm=norm, eps=eps, box=box, **options)
    share = (objective(x_adv) - objective(x)) / _optimum(objective.w, x, norm, eps, box)
    # Squares meet a ``w`` of white noise one pixel at a time, at best.
    assert share.min() > ((0.45 if norm == 2 else 0.8) if attack is square else 0.95)
    assert share.max() <= 1 + 1e-9


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=NAMES)
def test_budgets_boxes_and_identity(attack: Attack, norm: Norm) -> None:
    objective, x = _linear(4)
    x = x.float()
    objective = Linear(objective.w.float(), objective.offset.float())
    x[0] = (x[0] > 0.5).float()  # on the faces of the box
    eps: float = {2: 2.0, "inf": 0.3, 0: 3}[norm]
    x_adv = attack(objective, x, norm=norm, eps=eps, steps=30, restarts=2)
    assert x_adv.dtype == x.dtype and x_adv.shape == x.shape
    assert sample_norm(x_adv - x, norm).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (objective(x_adv) >= objective(x)).all()
    assert torch.equal(attack(objective, x, norm=norm, eps=0, steps=5), x)
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="budget eps"):
            attack(objective, x, norm=norm, eps=bad)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\], got values from"):
        attack(objective, x + 1, norm=norm, eps=eps)


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=NAMES)
def test_three_images_with_a_budget_each(attack: Attack, norm: Norm) -> None:
    objective, x = _linear(4, channels=9)
    eps: float = {2: 0.3, "inf": 0.05, 0: 2}[norm]
    x_adv = attack(objective, x, norm=norm, eps=eps, parts=3, steps=1000 if attack is square else 50)
    lengths = torch.stack([sample_norm(d, norm) for d in (x_adv - x).chunk(3, 1)])
    assert lengths.max() <= eps + 1e-6 and lengths.min() > 0.5 * eps
    pairs = zip(objective.w.chunk(3, 1), x.chunk(3, 1), strict=True)
    optimum = sum(_optimum(w, y, norm, eps, (0.0, 1.0)) for w, y in pairs)
    share = (objective(x_adv) - objective(x)) / optimum
    assert share.min() > (0.35 if attack is square else 0.95) and share.max() <= 1 + 1e-9


def _sorting_encoder() -> torch.nn.Module:
    """Orthonormal maps and sorting: 1-Lipschitz, and an isometry wherever the order does not change."""
    layers = [torch.nn.Flatten(), OrthogonalLinear(192, 64), GroupSort(2), OrthogonalLinear(64, 16)]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("kind", ["linear", "sorting"])
def test_perturbations_of_encoders_with_known_radii(kind: str) -> None:
    """The radius of an orthonormal map is exact; where sorting keeps its order, so is that of the network."""
    encoder = OrthogonalProjection(8, 24) if kind == "linear" else _sorting_encoder()
    metric = PerceptualMetric(encoder, 8, lipschitz=1.0).double().eval().requires_grad_(False)
    images = 0.4 + 0.2 * torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)
    radius = metric.certify(*images).radius
    objective = TwoAFCObjective(metric, *images)
    assert (objective(images[0]) < 0).all()
    # Where one straight step of the radius already breaks, no shorter one can, and the radius is the answer.
    z0, z1 = metric.embed(images[1]), metric.embed(images[2])
    _, gradient = value_and_gradient(lambda x: objective.sign * linear_margin(metric.embed(x), z0, z1)[0], images[0])
    direction = Ball(2, 1.0).direction(gradient)
    known = objective(images[0] + expand(radius, direction) * (1 + 1e-6) * direction) > 0
    assert known.all() if kind == "linear" else known.sum() >= 2
    x_adv = minimal_norm(objective, images[0], steps=100)
    found = sample_norm(x_adv - images[0])
    assert (objective(x_adv) > 0).all()
    assert (found >= radius * (1 - 1e-9)).all() and (found[known] <= radius[known] * 1.01).all()
    for i in known.nonzero().flatten().tolist()[:2]:
        row, x = objective.select(torch.tensor([i])), images[0, i : i + 1]
        for attack in GRADIENT:
            broken = [float(row(attack(row, x, eps=float(radius[i]) * s))) > 0 for s in (1 - 1e-9, 1.05)]
            assert broken == [False, True], attack.__name__


@pytest.mark.parametrize("target", ["reference", "left", "right", "all"])
@pytest.mark.parametrize("attack", [pgd, apgd, mi_fgsm, square])
def test_no_attack_breaks_a_certificate(attack: Attack, target: str) -> None:
    sll = SLLNetwork(16, 8, channels=12, depth=2, linear_depth=1, linear_width=8)
    metric = PerceptualMetric(sll, 16).double().eval()
    metric.audit()
    metric.requires_grad_(False)
    reference = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    left, right = ((reference + 0.3 * torch.randn_like(reference)).clamp(0, 1) for _ in range(2))
    found = metric.certify(reference, left, right)
    radii = {
        "reference": found.radius,
        "left": found.left_radius,
        "right": found.right_radius,
        "all": found.joint_radius,
    }[target]
    objective = TwoAFCObjective(metric, reference, left, right, target=target)  # type: ignore[arg-type]
    for box in ((0.0, 1.0), None):
        for i in range(2):
            row = objective.select(torch.tensor([i]))
            eps = float(radii[i]) * (1 - 1e-9)
            x_adv = attack(row, row.images, eps=eps, steps=30, box=box, parts=row.parts)
            assert float(row(x_adv)) <= 0
            pixels = int(found.pixels[i])
            if target == "reference" and attack is apgd and box and pixels:
                assert float(row(apgd(row, row.images, norm=0, eps=pixels, steps=30))) <= 0


@pytest.mark.parametrize("attack", [pgd, apgd, mi_fgsm, square])
def test_the_target_all_moves_three_images(attack: Attack) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16).requires_grad_(False)
    images = torch.rand(3, 6, 3, 16, 16)
    joint = metric.certify(*images).joint_radius.max()
    for callable_ in (metric, metric.forward, pixel_l2):
        objective = TwoAFCObjective(callable_, *images, target="all")
        assert objective.parts == 3 and torch.equal(objective.images, torch.cat(list(images), 1))
        x_adv = attack(objective, objective.images, eps=3 * float(joint), parts=3, steps=200)
        assert (objective(x_adv) > 0).any()
        moved = torch.stack([sample_norm(d) for d in (x_adv - objective.images).chunk(3, 1)])
        assert (moved[:, objective(x_adv) > 0] > 0).all()


@pytest.mark.parametrize("attack", [apgd, mi_fgsm, square, one_pixel])
def test_samples_do_not_depend_on_their_batch(attack: Attack) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16).double().requires_grad_(False)
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    options: dict[str, Any] = {"restarts": 2, "seed": 3}
    pixels = {"generations": 8, "population": 12, "num_pixels": 2}
    options |= pixels if attack is one_pixel else {"steps": 8, "eps": 0.3}
    whole = attack(TwoAFCObjective(metric, *images), images[0], index=list(range(100, 106)), **options)
    part = attack(TwoAFCObjective(metric, *images[:, 4:]), images[0, 4:], index=torch.tensor([104, 105]), **options)
    torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-12)
    other = attack(TwoAFCObjective(metric, *images), images[0], index=list(range(200, 206)), **options)
    if attack in (square, one_pixel):
        assert not torch.equal(other, whole)
    with pytest.raises(ValueError, match="one index a sample"):
        attack(TwoAFCObjective(metric, *images), images[0], index=[1], **options)


def test_broken_samples_are_left_alone_and_rows_stay_aligned() -> None:
    """Budgets that suffice for some of the samples only: each gets its own result."""
    seen: list[int] = []

    class Counting(Linear):
        def __call__(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().__call__(x)

        def select(self, rows: Tensor) -> Linear:
            return Counting(self.w[rows], self.offset[rows])

    x, w = torch.rand(9, 3, 6, 6, dtype=torch.float64), torch.randn(9, 3, 6, 6, dtype=torch.float64)
    needed = torch.tensor([-1.0, 0.05, 0.1, 0.5, 0.02, 9, 0.3, 9, 0.01], dtype=torch.float64)
    objective = Counting(w, (x * w).flatten(1).sum(1) + needed * w.flatten(1).norm(dim=1))
    for attack in (pgd, apgd, mi_fgsm):
        seen.clear()
        x_adv = attack(objective, x, eps=0.6, steps=40, box=None)
        assert ((objective(x_adv) > 0) == (needed < 0.6)).all()
        assert torch.equal(x_adv[0], x[0])
        assert seen[1] == 8 and seen[-2] == 2 and sum(seen) < 40 * 6


def test_each_image_has_pixels_of_its_own() -> None:
    """Three images in the channels, each of which is worth most at another place."""
    best = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    for image, place in enumerate(((0, 1), (2, 2), (3, 0))):
        best[image, :, place[0], place[1]] = 1.0
    x = torch.zeros(2, 9, 4, 4, dtype=torch.float64)
    objective = DistanceObjective(lambda x, y: ((x - y) * best.flatten(0, 1)).sum((1, 2, 3)), x, threshold=100.0)
    x_adv = one_pixel(objective, x, generations=60, population=100, parts=3)
    assert (sample_norm(x_adv - x, 0, parts=3) == 1).all() and (
        objective(x_adv) + 100 > 6
    ).all()  # 3 with one place for all
    with pytest.raises(ValueError, match="that 2 parts divide"):
        one_pixel(objective, x, parts=2)


def test_one_pixel_finds_the_best_pixel() -> None:
    objective, x = _linear(5, size=10)
    gains = torch.where(objective.w > 0, (1 - x) * objective.w, -x * objective.w).sum(1).flatten(1)
    for count, share in ((1, 0.99), (2, 0.75)):
        x_adv = one_pixel(objective, x, num_pixels=count, generations=60, population=200)
        assert sample_norm(x_adv - x, 0).max() <= count
        best = gains.topk(count).values.sum(1)
        found = objective(x_adv) - objective(x)
        assert (found > share * best).all() and (found <= best + 1e-9).all()
    within_reach = Linear(objective.w, (x * objective.w).flatten(1).sum(1) + 0.5 * gains.max(1).values)
    assert (within_reach(one_pixel(within_reach, x, generations=30, population=100)) > 0).all()
    for bad in ({"num_pixels": 0}, {"box": None}, {"population": 3}):
        with pytest.raises(ValueError, match="expected"):
            one_pixel(objective, x, **bad)


def test_evolution_takes_three_different_others() -> None:
    draws = sample_uniform(torch.empty(50, 5, 3), seed=1)
    own = torch.arange(5).expand(50, 5)
    chosen = torch.stack([own, *_three_others(draws)], -1)
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all() and chosen.min() == 0 and chosen.max() == 4
    counts = torch.bincount(chosen[:, 0, 1:].flatten(), minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 20  # every other member has its chance


@pytest.mark.parametrize("distance", [ssim, pixel_l2], ids=["ssim", "pixels"])
def test_any_callable_can_be_attacked(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = 0.3 + 0.4 * torch.rand(4, 3, 16, 16)
    y = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    for attack in (pgd, apgd, mi_fgsm, square):
        apart = attack(DistanceObjective(distance, x), x, eps=0.5, steps=60)
        assert (distance(apart, x) > 0.01).all()
        if attack is square:  # spends its whole budget on smooth squares: nothing to undo noise with
            continue
        alike = attack(DistanceObjective(distance, y, increase=False), x, eps=0.5, steps=60)
        assert (distance(alike, y) < distance(x, y)).all()
        if distance is pixel_l2:  # as far as the budget, straight away or towards
            torch.testing.assert_close(distance(apart, x), torch.full((4,), 0.5), rtol=0.03, atol=0)
            torch.testing.assert_close(distance(alike, y), distance(x, y) - 0.5, rtol=0.05, atol=0)
    z = torch.rand_like(x)
    for target in ("left", "right"):
        objective = TwoAFCObjective(distance, x, y, z, target=target)  # type: ignore[arg-type]
        moving = {"left": y, "right": z}[target]
        expected = distance(x, y) - distance(x, z)
        torch.testing.assert_close(objective(moving), -expected.abs(), rtol=1e-4, atol=1e-6)


def test_a_distance_without_gradients_is_refused_by_name() -> None:
    x = torch.rand(2, 3, 8, 8)
    steps = DistanceObjective(lambda a, b: (a - b).abs().gt(0.1).flatten(1).sum(1).float(), x)
    with pytest.raises(ValueError, match="no gradient; attack it with square or one_pixel"):
        apgd(steps, x, eps=1.0)
    assert (one_pixel(steps, x, generations=2, population=8) != x).any()


def test_projection_to_pixels_is_the_nearest_point() -> None:
    """Against all pairs of pixels of a small image."""
    x, target = torch.rand(6, 2, 2, 3, dtype=torch.float64), torch.randn(6, 2, 2, 3, dtype=torch.float64)
    found = Ball(0, 2).project(target, x)
    best = torch.full((6,), float("inf"), dtype=torch.float64)
    for i in range(6):
        for j in range(i):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[[i, j]] = True
            candidate = torch.where(mask.view(1, 1, 2, 3), target.clamp(0, 1), x)
            best = best.minimum((candidate - target).flatten(1).norm(dim=1))
    torch.testing.assert_close((found - target).flatten(1).norm(dim=1), best)
    assert sample_norm(found - x, 0).max() <= 2
    with pytest.raises(ValueError, match="whole number of pixels and a box"):
        Ball(0, 2, None)
    with pytest.raises(ValueError, match="2 parts divide"):
        Ball(2, 1.0, None, 2).check(torch.rand(1, 3, 4, 4))


def test_bumps_of_square_are_those_of_the_authors_code() -> None:
    """The left three columns of its two halves of η for a side of 5, each of norm 1; the others mirror them."""
    low, middle, high = 0.0695257999450998, 0.22595884982157438, 0.8516910493274727
    upper = [[low, middle, middle], [low, middle, high]]
    low, middle, high = 0.06447421093996819, 0.20954118555489662, 0.7898090840146104
    lower = [[low, middle, middle], [low, middle, high], [low, middle, middle]]
    left = torch.tensor([*upper, *lower], dtype=torch.float64)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    expected = signs[:, None] * torch.cat([left, left[:, :2].flip(1)], 1) / 2**0.5
    torch.testing.assert_close(_bump(5, expected), expected, rtol=1e-12, atol=0)
    for side in range(1, 12):
        assert float(_bump(side, expected).norm()) == pytest.approx(1)


def test_square_starts_from_five_by_five_tiles() -> None:
    delta = _tiles(torch.rand(4, 3, 23, 32, dtype=torch.float64), 0.5)
    torch.testing.assert_close(sample_norm(delta), torch.full((4,), 0.5, dtype=torch.float64))
    inside = delta[:, :, 1:21, 6:26]
    assert delta.count_nonzero() == inside.count_nonzero() == inside.numel()
    tiles = inside.unfold(2, 4, 4).unfold(3, 4, 4)
    tiles = tiles / tiles.flatten(-2).norm(dim=-1)[..., None, None]
    bump = _bump(4, delta)
    upright = torch.isclose((tiles * bump).sum((-2, -1)).abs(), torch.tensor(1.0, dtype=torch.float64))
    turned = torch.isclose((tiles * bump.T).sum((-2, -1)).abs(), torch.tensor(1.0, dtype=torch.float64))
    # One direction in all channels, and signs for each.
    assert (upright ^ turned).all() and (upright == upright[:, :1]).all() and upright.any() and turned.any()


@pytest.mark.parametrize("attack", GRADIENT)
def test_gradients_too_small_to_square_are_followed(attack: Attack) -> None:
    """The square of 1e-30 is 0 in float32; the direction is as good as any other."""
    x = 0.3 + 0.4 * torch.rand(3, 3, 8, 8)
    w = torch.randn_like(x)
    objective = Linear(1e-30 * w, torch.full((3,), 1e-28))
    moved = attack(objective, x, eps=0.1, steps=20) - x
    along = (moved * w).flatten(1).sum(1) / w.flatten(1).norm(dim=1)
    assert (along > 0.095).all()
