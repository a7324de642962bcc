"""A smoothed metric on a linear encoder, whose answers under noise have known probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipsim import PerceptualMetric
from lipsim.attacks import SmoothedObjective, TwoAFCObjective, apgd, pgd
from lipsim.attacks.objectives import value_and_gradient
from lipsim.certificates import smoothed_radius
from lipsim.metric import SaturatingSum, SmoothedMetric, TiledMetric

SIZE, SIGMA = 4, 0.5


class _Linear(nn.Module):
    """Two orthonormal directions of 4-pixel images, times a length; no bound is declared to the metric."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.linalg.qr(torch.randn(3 * SIZE**2, 2, generator=torch.Generator().manual_seed(0)))[0].T
        self.register_buffer("weight", 3 * rows)
        self.embedded: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.embedded.append(len(x))
        return x.flatten(1) @ self.weight.T  # type: ignore[no-any-return, operator]


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(_Linear(), SIZE, anchor=0.0, lipschitz=math.inf)


@pytest.fixture
def images(metric: PerceptualMetric) -> tuple[Tensor, Tensor, Tensor]:
    """References at known distances from the half-space of the answer, some with left nearer."""
    rows = metric.encoder.weight / 3
    base = torch.full((3, SIZE, SIZE), 0.5).flatten()

    def image(*at: float) -> Tensor:
        found = base - (base @ rows.T) @ rows + torch.tensor(at) @ rows
        return found.view(1, 3, SIZE, SIZE)

    # Of candidates at 0° and 90° the decision is the diagonal, at |a − b|/√2 from (a, b).
    points = [(0.4, 0.1), (0.1, 0.3), (0.6, 0.1)]
    left, right = image(0.3, 0.0).expand(3, -1, -1, -1), image(0.0, 0.3).expand(3, -1, -1, -1)
    return torch.cat([image(*point) for point in points]), left, right


def _distances() -> Tensor:
    return torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) / 2**0.5


def test_radii_are_those_of_the_half_space_and_no_attack_breaks_one(
    metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    distance = _distances()
    found = SmoothedMetric(metric, SIGMA, samples=4000).certify(*images, check_range=False)
    assert found.prefers_left.tolist() == (distance > 0).tolist() and not found.abstained.any()
    assert bool((found.radius <= distance.abs()).all())
    # All 4,000 draws with one answer would still be no proof of more than what α leaves.
    assert bool((found.radius > distance.abs() - 0.15 * SIGMA).all())
    p = torch.special.ndtr(distance.abs() / SIGMA)
    said = torch.where(distance > 0, found.counts[:, 0], found.counts[:, 1])
    assert bool(((said / 4000 - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()) and not found.counts[:, 2].any()

    # The smoothed decision of a half-space is the half-space, so that an attack can differentiate through it.
    exact = metric.frozen_copy(torch.float64)
    for row in range(3):
        x, left, right = (image[row : row + 1].double() for image in images)
        objective = TwoAFCObjective(exact, x, left, right, check_range=False)
        for eps, breaks in ((float(found.radius[row]), False), (1.05 * float(distance[row].abs()), True)):
            moved = pgd(objective, x, norm=2, eps=eps, steps=60, box=None)
            assert bool(objective(moved) > 0) == breaks


class _HalfSpace:
    """``h(x) = ⟨w, x⟩ − b``, with a ``b`` for each sample."""

    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        self.weight, self.offset = weight, offset

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight - self.offset

    def select(self, rows: Tensor) -> _HalfSpace:
        return _HalfSpace(self.weight, self.offset[rows])


def test_the_objective_of_a_smoothed_half_space_is_the_half_space() -> None:
    """Draws in pairs of opposite signs: the sum of both soft votes is 1 on the boundary alone."""
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(48, dtype=torch.float64), dim=0)
    x = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    plane = _HalfSpace(weight, x.flatten(1) @ weight + torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6], dtype=torch.float64))
    smoothed = SmoothedObjective(plane, x, SIGMA, draws=6, seed=3, index=[4, 9, 2, 0, 1])
    assert bool((smoothed(x) < 0).all())
    for factor, broken in ((0.999, False), (1.001, True)):
        length = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6], dtype=torch.float64) * factor
        moved = x + length.view(-1, 1, 1, 1) * weight.view(3, 4, 4)
        assert bool(((smoothed(moved) > 0) == broken).all())
    # A sample has its noise in whatever company, and a part of the objective is that of its samples.
    rows = torch.tensor([3, 1, 1])
    assert torch.equal(smoothed.select(rows)(x[rows]), smoothed(x)[rows])
    alone = SmoothedObjective(plane.select(rows[:1]), x[rows[:1]], SIGMA, draws=6, seed=3, index=[0])
    assert torch.allclose(alone(x[3:4]), smoothed(x)[3:4])
    gradient = value_and_gradient(smoothed, x)[1].flatten(1)
    assert torch.allclose(torch.nn.functional.normalize(gradient, dim=1), weight.expand(5, -1))
    for draws, message in ((5, "an even number of draws, got 5"), (0, "draws ≥ 1, got 0")):
        with pytest.raises(ValueError, match=message):
            SmoothedObjective(plane, x, SIGMA, draws=draws)
    with pytest.raises(ValueError, match="sigma"):
        SmoothedObjective(plane, x, 0.0)


def test_an_attack_on_smoothed_answers_ends_where_their_half_space_does(
    metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    distance = _distances()
    smoothed = SmoothedMetric(metric, SIGMA, samples=4000)
    clean = smoothed.certify(*images, check_range=False)
    answer = TwoAFCObjective(metric, *images, chosen_left=clean.prefers_left, check_range=False)
    objective = SmoothedObjective(answer, images[0], SIGMA, draws=64)
    for row in range(3):
        start, one = images[0][row : row + 1], torch.tensor([row])
        for eps, flips in ((float(clean.radius[row]), False), (1.3 * float(distance[row].abs()), True)):
            moved = apgd(objective.select(one), start, eps=eps, steps=20, box=None)
            found = smoothed.certify(moved, images[1][one], images[2][one], index=[7], check_range=False)
            assert bool(found.prefers_left != clean.prefers_left[row]) == flips


def test_attacks_on_answers_with_noise_on_all_images(
    metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    """An image that moves alone has the votes of three that may move, of which two stay, and falls beyond a radius."""
    images = tuple(x.double() for x in images)  # type: ignore[assignment]
    metric.double()
    smoothed = SmoothedMetric(metric, SIGMA / 4, samples=2000, moving="all")
    clean = smoothed.certify(*images, check_range=False)
    options: dict[str, Any] = {"sigma": SIGMA / 4, "draws": 64, "seed": 5, "index": [4, 2, 9], "check_range": False}
    all_three = SmoothedObjective.of_triplets(metric, *images, target="all", chosen_left=clean.prefers_left, **options)
    assert all_three.parts == 3 and torch.equal(all_three.images, torch.cat(images, 1))
    for place, target in enumerate(("reference", "left", "right")):
        votes = SmoothedObjective.of_triplets(
            metric,
            *images,
            target=target,
            chosen_left=clean.prefers_left,
            **options,  # type: ignore[arg-type]
        )
        assert votes.parts == 1 and torch.equal(votes.images, images[place])
        assert bool((votes(images[place]) < 0).all())
        moved = [x + 0.3 * torch.rand_like(x) if here == place else x for here, x in enumerate(images)]
        assert torch.allclose(votes(moved[place]), all_three(torch.cat(moved, 1)))
        rows = torch.tensor([2, 0])
        assert torch.allclose(votes.select(rows)(moved[place][rows]), votes(moved[place])[rows])
    own = SmoothedObjective.of_triplets(metric, *images, **options)  # without noise it answers the same here
    assert torch.allclose(own(images[0]), all_three(torch.cat(images, 1)))

    alone = smoothed_radius(clean.p_lower, SIGMA / 4)
    for row in range(3):
        one = torch.tensor([row])
        for eps, flips in ((float(alone[row]), False), (1.5 * float(_distances()[row].abs()), True)):
            moved_to = apgd(own.select(one), images[0][one], eps=eps, steps=20, box=None)
            found = smoothed.certify(moved_to, images[1][one], images[2][one], index=[7], check_range=False)
            assert bool(found.prefers_left != clean.prefers_left[row]) == flips and not found.abstained.any()


def test_draws_depend_on_seed_and_index_alone(metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor]) -> None:
    options: dict[str, Any] = {"samples": 100, "selection": 11}
    whole = SmoothedMetric(metric, SIGMA, **options).certify(*images, index=[5, 2**40, 7], check_range=False)
    small = SmoothedMetric(metric, SIGMA, batch_size=7, **options)
    rows = [
        small.certify(*(x[row : row + 1] for x in images), index=torch.tensor([index]), check_range=False)
        for row, index in ((2, 7), (0, 5), (1, 2**40))
    ]
    assert torch.cat([row.counts for row in rows]).equal(whole.counts[[2, 0, 1]])
    assert bool((whole.counts.sum(1) == 100).all())
    same = [x[:1].expand(3, -1, -1, -1) for x in images]
    by_index = SmoothedMetric(metric, SIGMA, **options).certify(*same, check_range=False).counts
    by_seed = [
        SmoothedMetric(metric, SIGMA, seed=seed, **options).certify(*(x[:1] for x in images), check_range=False).counts
        for seed in range(3)
    ]
    assert len(by_index.unique(dim=0)) > 1 and len(torch.cat(by_seed).unique(dim=0)) > 1


@pytest.mark.parametrize(("moving", "still"), [("reference", 2), ("left", 2), ("right", 2), ("all", 0)])
def test_which_images_have_noise_and_what_it_costs(
    metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor], moving: Any, still: int
) -> None:
    one = [x[2:] for x in images]
    smoothed = SmoothedMetric(metric, 0.05, samples=50, selection=10, moving=moving, batch_size=16)
    metric.encoder.embedded.clear()
    told: list[int] = []
    found = smoothed.certify(*one, check_range=False, advance=told.append)
    embedded = metric.encoder.embedded
    assert sum(embedded) == smoothed.passes == sum(told) + still and max(embedded) <= 16
    # Hardly any noise: every draw agrees with the metric itself, and the radius is the largest that 50 draws can prove.
    assert found.counts.tolist() == [[50, 0, 0]]
    largest = 0.05 * float(torch.special.ndtri(torch.tensor(0.001 ** (1 / 50), dtype=torch.float64)))
    assert float(found.radius) == pytest.approx(largest / (3**0.5 if moving == "all" else 1), rel=1e-6)


def test_names_are_no_metrics() -> None:
    for make in (
        lambda: SmoothedMetric("photos", 0.25),  # type: ignore[arg-type]
        lambda: SaturatingSum("photos", "scattering"),  # type: ignore[arg-type]
        lambda: TiledMetric("photos"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"a PerceptualMetric, got str; lipsim\.load\('photos'\) gives that"):
            make()


def test_ties_and_answers_that_are_none_count_against_either(metric: PerceptualMetric) -> None:
    x = torch.rand(1, 3, SIZE, SIZE)
    smoothed = SmoothedMetric(metric, 0.1, samples=20, selection=5)
    tie = smoothed.certify(x, x, x)
    metric.encoder.weight.zero_()  # without an anchor such features have no direction
    none = smoothed.certify(x, 1 - x, x)
    for found in (tie, none):
        assert bool(found.abstained) and found.counts.tolist() == [[0, 0, 20]] and float(found.radius) == 0


def test_smoothed_distances_stay_in_their_interval(
    metric: PerceptualMetric, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    metric.anchor = 1.0
    x, y, _ = images
    eps, smoothed = 0.2, SmoothedMetric(metric, SIGMA, samples=2000)
    low, high = smoothed.distance_bounds(x, y, eps, check_range=False)
    assert bool((low > 0).all()) and bool((high < 2).all()) and bool((high - low < 0.8).all())
    zero = smoothed.distance_bounds(x, y, 0.0, check_range=False)
    assert bool((zero[0] > low).all()) and bool((zero[1] < high).all())
    # The features alone are drawn, as the noise on them is normal, too: 9σ² along each direction.
    noise = 3 * SIGMA * torch.randn(100_000, 1, 2)
    z_y = metric.embed(y, check_range=False)
    for angle in torch.linspace(0, 2 * math.pi, 13)[:-1].tolist():
        change = 3 * eps * torch.tensor([math.cos(angle), math.sin(angle)])
        z = metric.embed(x, check_range=False) + change + noise
        e, e_y = (torch.cat([f, torch.ones_like(f[..., :1])], -1) for f in (z, z_y))
        distance = 1 - torch.cosine_similarity(e, e_y.expand_as(e), dim=-1).mean(0)
        assert bool((low < distance).all()) and bool((distance < high).all())


def test_nobodys_images_change(metric: PerceptualMetric) -> None:
    """A first layer that works in place, on images that are its argument and not a copy."""
    metric.encoder = nn.Sequential(nn.Threshold(0.5, 0.0, inplace=True), metric.encoder)
    images = torch.rand(3, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    smoothed = SmoothedMetric(metric, SIGMA, samples=3, selection=1)
    smoothed.distance_bounds(images[0], images[1], 0.1)
    smoothed.certify(*images)
    assert torch.equal(images, before)


def test_what_is_refused(metric: PerceptualMetric) -> None:
    x = torch.rand(2, 3, SIZE, SIZE)
    smoothed = SmoothedMetric(metric, SIGMA, samples=2, selection=1)
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        smoothed.certify(x, x, 3 * x)
    with pytest.raises(ValueError, match="as many images on each side, got 2, 2, 1"):
        smoothed.certify(x, x, x[:1])
    with pytest.raises(ValueError, match="one index a sample, got 1 for 2"):
        smoothed.certify(x, x, x, index=[3])
    with pytest.raises(ValueError, match="half precision"):
        smoothed.certify(x.half(), x, x)
    for call in (smoothed.certify, lambda *files: smoothed.distance_bounds(*files[:2], 0.1)):
        with pytest.raises(ValueError, match=r"expected a tensor of images, got str; metric\.read makes one"):
            call("a.png", "b.png", "c.png")  # type: ignore[arg-type]
    for wrong in ({"sigma": 0.0}, {"alpha": 0.5}, {"samples": 0}, {"seed": -1}, {"moving": "both"}):
        with pytest.raises(ValueError, match=f"expected .*{next(iter(wrong))}"):
            SmoothedMetric(metric, **{"sigma": SIGMA, **wrong})  # type: ignore[arg-type]


def test_shared_images_have_their_noise_once(metric: PerceptualMetric) -> None:
    """Of noise on the reference, the counts of one triplet after the other; of noise on all, their statistics."""
    x = 0.5 + 0.2 * torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2], [0, 2, 1], [3, 4, 0], [4, 3, 2], [0, 1, 1]])
    numbers = [7, 2**40, 1, 0, 3]
    options: dict[str, Any] = {"samples": 600, "selection": 50, "batch_size": 64}
    smoothed = SmoothedMetric(metric, SIGMA, **options)
    metric.encoder.embedded.clear()
    told: list[int] = []
    (found,) = smoothed.certify_shared(x, ids, index=numbers, check_range=False, advance=told.append)
    assert sum(told) == 3 * 650 and sum(metric.encoder.embedded) == 3 * 650 + 5  # three references, five images
    one_by_one = smoothed.certify(
        *(x[c] for c in ids.unbind(1)), index=[numbers[i] for i in ids[:, 0]], check_range=False
    )
    for name, value in vars(found).items():
        assert torch.equal(value, getattr(one_by_one, name)), name
    assert found.counts[4].tolist() == [0, 0, 600]  # the candidates are one image
    # The second triplet is the first one turned around, of the same noise.
    assert found.counts[1].tolist() == found.counts[0, [1, 0, 2]].tolist()

    metric.encoder.embedded.clear()
    reference, every = smoothed.certify_shared(
        x, ids[:4], moving=("reference", "all"), index=numbers, check_range=False
    )
    assert sum(metric.encoder.embedded) == 5 * 650 + 5
    assert torch.equal(reference.counts, found.counts[:4])
    parts = [x[c] for c in ids[:4].unbind(1)]
    alone = SmoothedMetric(metric, SIGMA, moving="all", **options).certify(*parts, check_range=False)
    share, expected = every.counts[:, 0] / 600, alone.counts[:, 0] / 600
    assert bool(((share - expected).abs() < 4 * (2 * 0.25 / 600) ** 0.5).all())
    assert bool((every.counts != reference.counts).any())
    p = every.p_lower
    assert torch.allclose(every.radius, (SIGMA * torch.special.ndtri(p.clamp(min=0.5)) / 3**0.5), rtol=1e-9)


def test_noise_of_shared_images_does_not_depend_on_how_much_is_drawn_at_once(
    metric: PerceptualMetric, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[0, 1, 2], [2, 3, 0]])
    smoothed = SmoothedMetric(metric, SIGMA, samples=70, selection=9, moving="all")
    (whole,) = smoothed.certify_shared(x, ids)
    monkeypatch.setattr("lipsim.metric.smoothed._SHARED_IMAGES", 4 * 5)  # five draws of four images
    metric.encoder.embedded.clear()
    (small,) = smoothed.certify_shared(x, ids)
    assert torch.equal(whole.counts, small.counts) and max(metric.encoder.embedded) == 5
    assert sum(metric.encoder.embedded) == 4 * 79  # nothing stands still
    (named,) = smoothed.certify_shared(x, ids, moving="all")
    assert torch.equal(named.counts, whole.counts)
    # A part of the triplets, over more images than they have.
    (part,) = smoothed.certify_shared(x, ids[1:])
    assert torch.equal(part.counts, whole.counts[1:])


def test_what_shared_images_refuse(metric: PerceptualMetric) -> None:
    x = torch.rand(3, 3, SIZE, SIZE)
    smoothed = SmoothedMetric(metric, SIGMA, samples=2, selection=1)
    ids = torch.tensor([[0, 1, 2]])
    for rows, message in (
        (ids.int(), r"rows of images \(N, 3\) in int64, got \(1, 3\) in torch.int32"),
        (ids[:, :2], r"got \(1, 2\)"),
        ([[0, 1, 2]], "got list"),
        (ids + 1, "rows of 3 images, got 1 to 3"),
        (ids - 1, "got -1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            smoothed.certify_shared(x, rows)
    with pytest.raises(ValueError, match="different numbers for the images"):
        smoothed.certify_shared(x, ids, index=[1, 2, 1])
    with pytest.raises(ValueError, match="one index a sample, got 1 for 3"):
        smoothed.certify_shared(x, ids, index=[1])
    with pytest.raises(ValueError, match=r"rows \[0, 2, 0\] of triplet 1"):
        smoothed.certify_shared(x, torch.tensor([[0, 1, 2], [0, 2, 0]]), moving=["all"])
    with pytest.raises(ValueError, match="moving to be one of"):
        smoothed.certify_shared(x, ids, moving=["both"])  # type: ignore[list-item]
    (none,) = smoothed.certify_shared(x, ids[:0])
    assert none.radius.shape == (0,)
