"""The protocol of level sets on a function whose level sets are known, and its files, tables and pictures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim.analysis.level_set_certificates import answer_radius_of, certified_rows, certify_level_sets
from lipsim.analysis.level_set_tables import (
    all_pairs,
    distance_rows,
    mean_and_spreads,
    plot_all_pairs,
    triangle_rows,
    width_rows,
    write_tables,
)
from lipsim.analysis.level_sets import LevelSetProtocol, derangements, measure_level_sets
from lipsim.attacks import ConfidenceObjective, Objective, TwoAFCObjective
from lipsim.attacks.level_set import Traversal
from lipsim.certificates.triangles import barycentric_grid
from lipsim.metric import PerceptualMetric
from lipsim.metric.distances import pixel_l2
from lipsim.students import OrthogonalProjection

SIZE = 12
SHORT = LevelSetProtocol(targets=3, steps=30, width_steps=(0, 30), widths=(0.1, 0.4), directions=64, noise=0.0)


class Brightness:
    """``slope·(sum of the pixels − that of the source) − most``: level sets are half-spaces."""

    def __init__(self, base: Tensor, most: float = 0.5, slope: float = 1.0) -> None:
        self.base, self.most, self.slope = base, most, slope

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope * (x.flatten(1).sum(1) - self.base) - self.most

    def select(self, rows: Tensor) -> Brightness:
        return Brightness(self.base[rows], self.most, self.slope)


def brightness_of(images: Tensor, slope: float = 1.0) -> Callable[[Tensor], Objective]:
    return lambda rows: Brightness(images[rows].flatten(1).sum(1), slope=slope)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 0.2 + 0.6 * torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("labels", [None, [0, 0, 0, 1, 1, 2, 2, 3], [0, 0, 0, 0, 1, 2, 3, 4]])
def test_derangements_move_everything(labels: list[int] | None) -> None:
    kinds = torch.arange(8) if labels is None else torch.tensor(labels)
    found = derangements(8, 20, seed=3, labels=None if labels is None else kinds)
    assert torch.equal(found.sort(1).values, torch.arange(8).expand(20, 8))
    assert (kinds[found] != kinds).all()
    assert len({tuple(row) for row in found.tolist()}) > 10
    assert torch.equal(found, derangements(8, 20, seed=3, labels=None if labels is None else kinds))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2], [7]])
def test_where_there_is_no_derangement_it_is_said(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="no label has more than half"):
        derangements(len(labels), 1, labels=torch.tensor(labels))


def test_a_half_space_is_measured_as_it_is(images: Tensor) -> None:
    found = measure_level_sets(brightness_of(images), images, SHORT, keep_outcomes=True, lpips=pixel_l2)
    base = images.flatten(1).sum(1)
    for i in range(len(images)):
        for k in range(3):
            target, outcome = images[found.target[i, k]], found.outcomes[i, k]
            assert int(found.target[i, k]) != i
            assert float(found.rmse[i, k]) == pytest.approx(float((target - outcome).square().mean().sqrt()))
            assert float(found.start_rmse[i, k]) == pytest.approx(float((target - images[i]).square().mean().sqrt()))
            assert float(found.linf[i, k]) == pytest.approx(float((target - outcome).abs().max()))
            assert float(found.lpips[i, k]) == pytest.approx(float((target - outcome).norm()))
            assert float(found.target_loss[i, k]) == pytest.approx(float(base[found.target[i, k]] - base[i]))
            # Linear: the most that is lost on a straight way is lost at its ends.
            assert float(found.path_loss[i, k]) == pytest.approx(max(0.0, float(found.loss[i, k])), abs=1e-9)
    assert (found.loss <= 0.5).all() and (found.rmse < found.start_rmse).all()
    # The mean over a triangle of a linear function is that of its corners, of which one loses nothing.
    pairs = [(0, 1), (0, 2), (1, 2)]
    corners = torch.stack([(found.loss[:, i] + found.loss[:, j]) / 3 for i, j in pairs], 1)
    torch.testing.assert_close(found.triangle_loss, corners)
    weights = barycentric_grid(10)[0] / 10
    assert weights.shape == (66, 3)
    for number, (i, j) in enumerate(pairs):
        at = weights[:, 1] * found.loss[:, i : i + 1] + weights[:, 2] * found.loss[:, j : j + 1]
        # Points that lose nothing at all are on either side of 0 by rounding.
        assert ((at < -1e-9).double().mean(1) <= found.triangle_share[:, number, 0]).all()
        torch.testing.assert_close((at < 0.2).double().mean(1), found.triangle_share[:, number, 2])
    assert (found.triangle_accepted == 1).all()


def test_the_width_of_a_half_space_is_a_quantile_of_the_normal_distribution(images: Tensor) -> None:
    protocol = replace(SHORT, directions=4_000, targets=1, width_steps=(0,), widths=(0.1, 0.4))
    found = measure_level_sets(brightness_of(images, slope=4.0), images[:2], protocol)
    # A random unit vector has a component along the gradient of about N(0, 1/n). Orthogonal to the walk, which is
    # orthogonal to the gradient itself, all of the gradient is left.
    scale = 4 * math.sqrt(3 * SIZE**2) / math.sqrt(3 * SIZE**2 - 1)
    normal = NormalDist()
    for j, distance in enumerate(protocol.widths):
        expected = normal.inv_cdf(0.95) * scale * distance
        assert found.width_high[:, 0, 0, j].tolist() == pytest.approx([expected] * 2, rel=0.08)
        assert found.width_low[:, 0, 0, j].tolist() == pytest.approx([-expected] * 2, rel=0.08)
        stay = normal.cdf(0.5 / (scale * distance))
        assert found.width_accepted[:, 0, 0, j].tolist() == pytest.approx([stay] * 2, abs=0.03)


def test_every_walk_starts_elsewhere_and_looks_in_other_directions(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, start = [], Traversal.start

    def recorded(*args: Any, **options: Any) -> Traversal:
        state = start(*args, **options)
        starts.append(state.x - images)
        return state

    monkeypatch.setattr(Traversal, "start", recorded)
    measure_level_sets(brightness_of(images), images, replace(SHORT, noise=2 / 255, steps=1, width_steps=()))
    unit = torch.stack([nn.functional.normalize(part.flatten(1), dim=1) for part in starts])
    # Of n independent numbers, a cosine is about N(0, 1/n).
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert bool(((unit[i] * unit[j]).sum(1).abs() < 5 / math.sqrt(3 * SIZE**2)).all())
    # One direction for each of three targets, up or down, at the source itself.
    protocol = replace(SHORT, directions=1, width_steps=(0,), steps=1)
    up = measure_level_sets(brightness_of(images), images, protocol).width_high[:, :, 0, 0] > 0
    assert 3 < int(up.sum()) < 16 and int((up == up[:, :1]).all(1).sum()) < 5


def test_numbers_do_not_depend_on_batches(images: Tensor) -> None:
    protocol = replace(SHORT, noise=2 / 255)
    whole = measure_level_sets(brightness_of(images), images, protocol)
    few = measure_level_sets(brightness_of(images), images, protocol, batch_size=2, sources=torch.tensor([1, 3, 4]))
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(few.tensors[name], tensor[[1, 3, 4]], equal_nan=True, rtol=1e-9, atol=1e-9)


def test_a_run_goes_on_and_refuses_results_of_another(images: Tensor, tmp_path: Path) -> None:
    calls: list[list[int]] = []

    def objective_of(rows: Tensor, slope: float = 1.0) -> Objective:
        calls.append(rows.tolist())
        return brightness_of(images, slope)(rows)

    said: list[str] = []
    protocol = replace(SHORT, targets=2, steps=5, width_steps=())
    first = measure_level_sets(objective_of, images, protocol, batch_size=2, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:06d}-{i + 1:06d}.safetensors" for i in (0, 2, 4)]
    (tmp_path / "000002-000003.safetensors").unlink()
    again = measure_level_sets(objective_of, images, protocol, batch_size=2, folder=tmp_path, say=said.append)
    assert said and all(text.startswith("sources 2 to 4 of 6") for text in said)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.nan_to_num(nan=-9.0), again.tensors[name].nan_to_num(nan=-9.0)), name
    for changed in (
        lambda: measure_level_sets(objective_of, images, replace(protocol, seed=1), batch_size=2, folder=tmp_path),
        lambda: measure_level_sets(objective_of, 0.9 * images, protocol, batch_size=2, folder=tmp_path),
        lambda: measure_level_sets(lambda r: objective_of(r, 1.1), images, protocol, batch_size=2, folder=tmp_path),
        lambda: measure_level_sets(objective_of, images, protocol, batch_size=2, folder=tmp_path, lpips=pixel_l2),
    ):
        with pytest.raises(ValueError, match="results of other images, settings or a model"):
            changed()
    # Classifiers that are as sure of all images as each other are still told apart.
    sure = tmp_path / "sure"

    class Sharp(Brightness):
        """0 at its own image, 1 at all others; in between by how far a point has gone."""

        def __init__(self, base: Tensor, power: float = 1.0) -> None:
            super().__init__(base)
            self.power = power

        def __call__(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            share = torch.linalg.vector_norm(x - self.base, dim=1) / torch.cdist(x, ends).amin(1).add(1e-9)
            return 0.5 - torch.exp(-((2 * share) ** self.power))

        def select(self, rows: Tensor) -> Sharp:
            return Sharp(self.base[rows], self.power)

    ends = images.flatten(1)
    one_step = replace(protocol, steps=1)
    measure_level_sets(lambda r: Sharp(ends[r]), images, one_step, folder=sure)
    measure_level_sets(lambda r: Sharp(ends[r]), images, one_step, folder=sure)
    with pytest.raises(ValueError, match="results of other images, settings or a model"):
        measure_level_sets(lambda r: Sharp(ends[r], 3.0), images, one_step, folder=sure)
    # Of one source, an image that is its second target alone.
    one, folder = torch.tensor([0]), tmp_path / "one"
    found = measure_level_sets(objective_of, images, protocol, sources=one, folder=folder, lpips=pixel_l2)
    assert found.lpips.isfinite().all()
    moved = images.clone()
    moved[found.target[0, 1]] *= 0.9
    for other, distance in ((moved, pixel_l2), (images, lambda x, y: 2 * pixel_l2(x, y))):
        with pytest.raises(ValueError, match="results of other images, settings or a model"):
            measure_level_sets(
                lambda r: brightness_of(images)(r), other, protocol, sources=one, folder=folder, lpips=distance
            )


def test_tables_and_pictures_of_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 3, SIZE, SIZE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4)).requires_grad_(False)
    y = network(x).argmax(1)

    def objective_of(rows: Tensor) -> Objective:
        return ConfidenceObjective(network, y[rows], x[rows])

    sets = {"a": measure_level_sets(objective_of, x, SHORT), "b": measure_level_sets(objective_of, x[:3], SHORT)}
    write_tables(tmp_path, sets, SHORT)
    write_tables(tmp_path / "one", sets, SHORT)
    short = replace(SHORT, targets=1, width_steps=())
    write_tables(tmp_path / "one", {"a": measure_level_sets(objective_of, x, short)}, short)
    assert {path.stem for path in (tmp_path / "one").iterdir()} == {"level_sets", "distances"}  # none of what was there
    shutil.rmtree(tmp_path / "one")
    names = ("distances", "triangles", "widths")
    assert {path.name for path in tmp_path.iterdir()} == {
        "level_sets.json", *(f"{name}.{kind}" for name in names for kind in ("md", "tex", "csv"))
    }  # fmt: skip
    content = json.loads((tmp_path / "level_sets.json").read_text())
    mean, draws, samples = mean_and_spreads(sets["a"].rmse)
    assert content[0]["rmse"] == {"mean": mean, "over draws": draws, "over samples": samples}
    assert mean == pytest.approx(float(sets["a"].rmse.mean(0).mean())) and "lpips" not in distance_rows(sets)[0]
    assert draws == pytest.approx(float(sets["a"].rmse.mean(0).std()))
    assert content[0]["triangle_share"]["mean"][3] == pytest.approx(float(sets["a"].triangle_share[..., 3].mean()))
    assert [row["model"] for row in width_rows(sets, SHORT)] == ["a", "a", "b", "b"]
    assert triangle_rows(sets, SHORT)[1]["< 0.3"].startswith(f"{float(sets['b'].triangle_share[..., 3].mean()):.3f}")

    outcomes, loss = all_pairs(objective_of, x, SHORT)
    assert torch.equal(outcomes[range(5), range(5)], x) and (loss.diagonal() == 0).all()
    assert (loss <= 0.2 + 1e-6).all()
    for i in range(5):
        for j in range(5):
            if i != j:  # row i goes to image i, from image j, whose class it keeps
                assert (outcomes[i, j] - x[i]).norm() < (x[j] - x[i]).norm()
                expected = network(x[j : j + 1]).softmax(1)[0, y[j]] - network(outcomes[i, j][None]).softmax(1)[0, y[j]]
                torch.testing.assert_close(loss[i, j], expected)
    plot_all_pairs(tmp_path / "grid.png", outcomes, loss, list("abcde"), "all pairs")
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 300


def test_bad_input_is_named(images: Tensor) -> None:
    with pytest.raises(ValueError, match="which image 2 is not"):
        measure_level_sets(lambda rows: Brightness(torch.where(rows == 2, -1e3, 1e3)), images, SHORT)
    with pytest.raises(ValueError, match="at least one source"):
        measure_level_sets(brightness_of(images), images, sources=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match=r"widths after 0 to 400 steps, got \(500,\)"):
        LevelSetProtocol(width_steps=(500,))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        all_pairs(brightness_of(images), images[:1])


def test_what_is_proved_of_a_linear_answer_is_true_and_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # With 1-Lipschitz orthonormal features and no ties, the radius is the distance to a hyperplane.
    metric = PerceptualMetric(OrthogonalProjection(SIZE, 8), SIZE).requires_grad_(False)
    reference, left, right = (torch.rand(4, 3, SIZE, SIZE) for _ in range(3))
    answer = TwoAFCObjective(metric, reference, left, right)
    protocol = replace(SHORT, targets=2, width_steps=(), noise=0.0)
    found = measure_level_sets(answer.select, reference, protocol, keep_outcomes=True)
    radius = answer_radius_of(metric, reference, left, right)
    certified = certify_level_sets(radius, reference, found)
    # A half-space is convex: whole segments and triangles between points inside are inside.
    assert (certified.segment > 0.99).all() and (certified.area > 0.9).all() and (certified.area_at_most == 1).all()
    assert certified.star.all()
    target = reference[found.target.flatten()].view(4, 2, *reference.shape[1:])
    torch.testing.assert_close(certified.achieved, (found.outcomes - target).double().flatten(2).norm(dim=2))
    assert (certified.achieved >= certified.bound).all()
    outside = (certified.bound > 0).nonzero().tolist()
    assert len(outside) > 1
    for i, k in outside:  # exact: the nearest point of the half-space is that far
        at = radius(target[i, k][None], torch.tensor([i]))
        assert float(certified.bound[i, k]) == pytest.approx(-float(at), rel=1e-3)
        assert float(answer.select(torch.tensor([i]))(target[i, k][None])) > 0
    (row,) = certified_rows({"linear": certified})
    assert row["stars proved"] == "1.00" and float(row["achieved / bound"]) >= 1
    two = replace(
        certified, achieved=torch.tensor([[1.5], [4.0]]).double(), bound=torch.ones(2, 1).double(),
        area=torch.empty(2, 0), area_at_most=torch.empty(2, 0),
    )  # fmt: skip
    (row,) = certified_rows({"one target each": two})
    assert row["achieved / bound"] == "2.8" and row["triangles proved inside"] == row["not proved outside"] == ""
    sizes: list[int] = []
    embedded = PerceptualMetric._features

    def counted(self: PerceptualMetric, *images: Tensor) -> Tensor:
        sizes.append(sum(len(part) for part in images))
        return embedded(self, *images)

    monkeypatch.setattr(PerceptualMetric, "_features", counted)
    many = [image.repeat(40, 1, 1, 1) for image in (reference, left, right)]
    repeated = answer_radius_of(metric, *many)
    outcome = replace(
        found, **{name: tensor.repeat(40, *[1] * (tensor.ndim - 1)) for name, tensor in found.tensors.items()}
    )
    outcome = replace(outcome, index=torch.arange(160))
    again = certify_level_sets(repeated, many[0], outcome)
    assert max(sizes) <= 3 * 64
    torch.testing.assert_close(again.segment, certified.segment.repeat(40, 1))
    torch.testing.assert_close(again.bound, certified.bound.repeat(40, 1))
    with pytest.raises(ValueError, match="keep_outcomes=True"):
        certify_level_sets(radius, reference, measure_level_sets(answer.select, reference, protocol))
