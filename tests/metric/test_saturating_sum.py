"""The sum of two metrics of which one saturates: its distances, its certificates under attack, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim.attacks import DistanceObjective, TwoAFCObjective, apgd, auto, minimal_norm
from lipsim.attacks.objectives import TARGETS, Target
from lipsim.cli.main import main
from lipsim.metric import PerceptualMetric, SaturatingSum, TiledMetric, certify_files, save
from lipsim.students import OrthogonalShiftNetwork, ScatteringTransform
from lipsim.teachers import SmallViT

SIZE = 16


def _student(seed: int = 0, **options: Any) -> PerceptualMetric:
    torch.manual_seed(seed)
    encoder = OrthogonalShiftNetwork(image_size=SIZE, out_features=8, widths=(16, 16), depths=(1, 1))
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return PerceptualMetric(encoder, SIZE, **options).eval().requires_grad_(False)


def _moduli(**options: Any) -> PerceptualMetric:
    encoder = ScatteringTransform(image_size=SIZE, orientations=4)
    return PerceptualMetric(encoder, SIZE, **options).eval().requires_grad_(False)


def _both(weight: float = 1.0, scale: float = 0.02) -> SaturatingSum:
    return SaturatingSum(_student(), _moduli(), weight, scale)


def _triplets(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of some colours: half of the candidates are the reference with another texture, half are others."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3 * count, 3, 2, 2, generator=generator)
    x, x0, x1 = nn.functional.interpolate(coarse, SIZE, mode="bilinear").chunk(3)
    x0, x1 = (torch.where((torch.arange(count) % 2 == 0)[:, None, None, None], x, other) for other in (x0, x1))
    noise = [size * torch.randn(x.shape, generator=generator) for size in (0.05, 0.1, 0.15)]
    return tuple((image + some).clamp(0, 1) for image, some in zip((x, x0, x1), noise, strict=True))  # type: ignore[return-value]


def test_it_is_the_sum_of_both_distances_of_which_one_saturates() -> None:
    first, second = _student(), _moduli()
    metric = SaturatingSum(first, second, weight=0.7, scale=0.1)
    x, y, _ = _triplets(6)
    expected = first(x, y) + 0.7 * (1 - torch.exp(-second(x, y) / 0.1))
    torch.testing.assert_close(metric(x, y), expected)
    assert not metric(x, x).any()
    assert (metric(x, y[:1]) > 0).all()  # one image for all
    assert "weight=0.7, scale=0.1" in repr(metric)


def test_it_has_gradients_to_the_images() -> None:
    metric = _both().double()
    x, y, _ = (image.double() for image in _triplets(2))
    assert torch.autograd.gradcheck(metric, (x[:1].requires_grad_(), y[:1]), nondet_tol=1e-10)


def test_what_it_answers_is_what_it_certifies() -> None:
    metric = _both()
    x, x0, x1 = _triplets(40)
    found = metric.certify(x, x0, x1)
    margin = metric(x, x1) - metric(x, x0)
    torch.testing.assert_close(found.margin, margin.double(), rtol=1e-4, atol=1e-6)
    assert (found.prefers_left == (margin > 0)).all() and 0 < found.prefers_left.double().mean() < 1
    assert (found.radius > 0).all() and found.radius.dtype == torch.float32


@pytest.mark.parametrize("target", TARGETS)
def test_attacks_break_no_certificate(target: Target) -> None:
    metric = _both()
    images = _triplets(24, seed=1)
    found = metric.certify(*images)
    radius = {
        "reference": found.radius,
        "left": found.left_radius,
        "right": found.right_radius,
        "all": found.joint_radius,
    }[target]
    objective = TwoAFCObjective(metric, *images, target=target, chosen_left=found.prefers_left)
    parts = objective.parts
    moved = minimal_norm(objective, objective.images, steps=40, polish=40, parts=parts)
    broken = objective(moved) > 0
    assert broken.double().mean() > 0.5
    length = (moved - objective.images).unflatten(1, (parts, 3)).flatten(2).norm(dim=-1).amax(1)
    assert (length > radius)[broken].all()
    assert (length[broken] / radius[broken]).median() < {"all": 8}.get(target, 5)  # so that the attack is one


def test_the_suite_finds_nothing_inside_a_radius() -> None:
    metric = _both(weight=0.5, scale=0.05)
    images = _triplets(12, seed=2)
    radius = metric.certify(*images).radius
    objective = TwoAFCObjective(metric, *images)
    eps = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
    found = auto(objective, images[0], eps=eps, steps=10, queries=20)
    assert (found.broken_at > radius).all() and found.broken_at.isfinite().any()


def test_intervals_hold_what_attacks_reach() -> None:
    metric = _both()
    x, y, _ = _triplets(12, seed=3)
    lower, upper = metric.distance_bounds(x, y, eps=0.2)
    assert ((lower < metric(x, y)) & (metric(x, y) < upper)).all()
    for increase in (True, False):
        moved = apgd(DistanceObjective(metric, y, increase=increase), x, eps=0.2, steps=20, seed=0)
        reached = metric(moved, y)
        assert ((lower <= reached) & (reached <= upper)).all()


def test_intervals_are_of_pairs() -> None:
    x, y, _ = _triplets(3)
    with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 3 and 2"):
        _both().distance_bounds(x, y[:2], eps=0.2)


def test_without_a_bound_nothing_is_certified() -> None:
    torch.manual_seed(0)
    teacher = PerceptualMetric(SmallViT(image_size=SIZE), SIZE, lipschitz=math.inf).eval()
    x, _, x1 = _triplets(4)
    for metric in (SaturatingSum(teacher, _moduli()), SaturatingSum(_moduli(), teacher)):
        found = metric.certify(x, x, x1)  # which the second part would decide whatever the first one says
        assert not metric.has_bound and not found.radius.any() and not found.joint_radius.any()
        assert found.margin.abs().max() > 0


def test_rounding_errors_of_both_are_covered() -> None:
    images = _triplets(20)
    exact = _both().certify(*images).radius
    for first, second in ((_student(feature_error=1e-3), _moduli()), (_student(), _moduli(feature_error=1e-3))):
        assert (SaturatingSum(first, second, 1.0, 0.02).certify(*images).radius < exact).all()


def test_a_layer_that_works_in_place_leaves_the_images() -> None:
    first = PerceptualMetric(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), SIZE)
    x, x0, x1 = (image - 0.5 for image in _triplets(3))
    kept = [image.clone() for image in (x, x0, x1)]
    same = PerceptualMetric(nn.Sequential(nn.ReLU(), nn.Flatten()), SIZE)
    found, expected = (SaturatingSum(f, _moduli()).certify(x, x0, x1, check_range=False) for f in (first, same))
    assert torch.equal(found.margin, expected.margin) and torch.equal(found.radius, expected.radius)
    assert torch.equal(*(SaturatingSum(f, _moduli())(x, x0, check_range=False) for f in (first, same)))
    assert all(torch.equal(*pair) for pair in zip((x, x0, x1), kept, strict=True))


def test_what_is_refused() -> None:
    first = _student()
    x, x0, x1 = _triplets(2)
    with pytest.raises(ValueError, match="see images in the same way"):
        SaturatingSum(first, PerceptualMetric(ScatteringTransform(image_size=32), 32))
    with pytest.raises(ValueError, match="of whole images"):
        SaturatingSum(TiledMetric(first, 2), _moduli())
    with pytest.raises(ValueError, match="expected a finite scale ≥ 1e-06"):
        SaturatingSum(first, _moduli(), scale=0.0)
    with pytest.raises(ValueError, match="as many candidates"):
        _both().certify(x, x0[:1], x1)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        _both().certify(2 * x, x0, x1)
    for mixed in ((x.half(), x0, x1), (x, x0.half(), x1)):
        with pytest.raises(ValueError, match="half precision"):
            _both().certify(*mixed)
    with pytest.raises(ValueError, match="16"):
        _both().certify(x, x0[..., :8, :8], x1)
    with pytest.raises(ValueError, match="half precision"):
        deepcopy(_both()).half().certify(x.half(), x0.half(), x1.half())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two metrics, and the three images of a triplet."""
    found = {}
    for name, metric in (("first", _student()), ("second", _moduli())):
        found[name] = save(metric, tmp_path / f"{name}.safetensors")
    for name, image in zip(("reference", "left", "right"), _triplets(1), strict=True):
        found[name] = tmp_path / f"{name}.png"
        Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(found[name])
    return found


def test_image_files(files: dict[str, Path]) -> None:
    metric = _both()
    images = [metric.read(files[name]) for name in ("reference", "left", "right")]
    found, expected = certify_files(metric, files["reference"], files["left"], files["right"]), metric.certify(*images)
    assert found.radius["reference"] == pytest.approx(float(expected.radius))
    assert found.answer == ("left" if bool(expected.prefers_left) else "right")
    assert found.lipschitz == max(metric.first.lipschitz, metric.second.lipschitz)
    assert found.original_radius is not None and metric.image_size == found.image_size == SIZE


def test_the_command(files: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = [str(files[name]) for name in ("reference", "left", "right")]
    options = ["--metric", str(files["first"]), "--near", str(files["second"]), "--weight", "0.5", "--scale", "0.1"]
    assert _run("certify", *images, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    metric = _both(0.5, 0.1)
    expected = metric.certify(*(metric.read(image) for image in images))
    assert found["margin"] == pytest.approx(float(expected.margin), rel=1e-5)
    assert found["radius"]["joint"] == pytest.approx(float(expected.joint_radius), rel=1e-2)  # less the rounding
    table = tmp_path / "triplets.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["reference", "left", "right"], [Path(image).name for image in images]])
    assert _run("certify", str(table), *options, "--csv") == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert float(row["radius"]) == pytest.approx(found["radius"]["reference"])
    for wrong in (["--weight", "2"], [*options, "--smooth", "0.25"]):
        assert _run("certify", *images, *wrong) == 1 and "--near" in capsys.readouterr().err


def _run(*args: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
