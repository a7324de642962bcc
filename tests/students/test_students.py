"""Students: published sizes, shapes, start, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipsim
from lipsim import audit
from lipsim.audit.lower_bounds import attack_lipschitz
from lipsim.layers import OrthogonalLinear, freeze
from lipsim.metric import save
from lipsim.students import (
    OrthogonalProjection,
    OrthogonalShiftNetwork,
    ScatteringNetwork,
    ScatteringTransform,
    SLLNetwork,
    TorchlipNetwork,
)
from lipsim.students.stages import _cosines, _lowest_frequencies

STUDENTS: dict[str, Callable[[int, int], nn.Module]] = {
    "published": lambda size, features: SLLNetwork(
        size, features, channels=12, depth=3, linear_depth=2, linear_width=6
    ),
    "torchlip": lambda size, features: TorchlipNetwork(size, features, (4, 2), (1, 2), (16, 32)),
    "default": OrthogonalShiftNetwork,
    "linear": OrthogonalProjection,
    "scattering": lambda size, features: ScatteringNetwork(size, features, widths=(16, 32), linear_width=8),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_slices_are_the_layers_that_they_name(name: str) -> None:
    student, x = STUDENTS[name](32, 16).eval(), torch.rand(2, 3, 32, 32)
    assert isinstance(student, nn.Sequential)
    for cut in (0, 1, len(student)):
        torch.testing.assert_close(student[cut:](student[:cut](x)), student(x))
    assert student[-1] is list(student)[-1]


@torch.no_grad()
def test_the_published_network_computes_pixel_by_pixel_on_processors() -> None:
    student, seen = STUDENTS["published"](32, 16), []
    assert isinstance(student, SLLNetwork)
    student[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for network in (student.train(), freeze(student.eval())):
        network(torch.rand(2, 3, 32, 32))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, True]


@pytest.mark.parametrize(
    ("preset", "depth", "channels", "linear_depth", "width"),
    [
        ("small", 20, 45, 7, 1024),
        ("medium", 30, 60, 10, 2048),
        ("large", 50, 90, 10, 2048),
        ("xlarge", 70, 120, 15, 2048),
    ],
)
def test_published_sizes(preset: str, depth: int, channels: int, linear_depth: int, width: int) -> None:
    with torch.device("meta"):
        network = SLLNetwork.from_preset(preset)
    convolutions = depth * (5 * channels * 9 + 2 * 5)
    linear = linear_depth * (width * channels * 14**2 + 2 * width)
    assert sum(p.numel() for p in network[1].parameters()) == convolutions
    assert sum(p.numel() for p in network.parameters()) == convolutions + linear
    if preset == "small":  # what was published
        assert (round((convolutions + linear) / 1e6, 1), round(convolutions / 1e3, 1)) == (63.3, 40.7)


def test_presets_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(ValueError, match="small, medium, large, xlarge"):
        SLLNetwork.from_preset("tiny")
    with pytest.raises(ValueError, match="images of 32 pixels leave 180 features"):
        SLLNetwork.from_preset("small", 32, 256)


@pytest.mark.parametrize("size", [16, 32, 40])
@pytest.mark.parametrize("name", STUDENTS)
def test_students_are_one_lipschitz_at_their_start(name: str, size: int) -> None:
    student = STUDENTS[name](size, 12)
    assert student(torch.rand(2, 3, size, size)).shape == (2, 12)
    assert 0.3 < audit.lipschitz_bound(student, size).total <= 1 + 1e-5


@pytest.mark.parametrize("name", STUDENTS)
def test_frozen_students_compute_the_same(name: str) -> None:
    student, x = STUDENTS[name](32, 12).eval(), torch.rand(4, 3, 32, 32)
    expected = student(x).detach()
    torch.testing.assert_close(freeze(student)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_survive_a_file(name: str, tmp_path: Path) -> None:
    metric = lipsim.PerceptualMetric(STUDENTS[name](32, 12), 32).eval()
    loaded = lipsim.load(save(metric, tmp_path / "student.safetensors"))
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(loaded.embed(x), metric.embed(x), rtol=1e-5, atol=1e-5)
    assert loaded.lipschitz == pytest.approx(metric.lipschitz, abs=1e-6)


def test_a_student_made_in_inference_mode_is_one_elsewhere() -> None:
    for make in STUDENTS.values():
        torch.manual_seed(0)
        expected = make(16, 8).eval()
        with torch.inference_mode():
            torch.manual_seed(0)
            student = freeze(make(16, 8))
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(student(x), expected(x))


def test_spectral_layers_survive_steps_that_outrun_their_power_iteration() -> None:
    """A step of Adam moves the head by up to rate · √(rows · columns), and Björck converges for σ < √3 alone.

    4.4 here; the default student, whose head is 256 × 8192, has 2.9 at a rate of 0.002.
    """
    student = TorchlipNetwork(16, 64, (4,), (1,), (48,))
    x = torch.rand(8, 3, 16, 16)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss = student(x).square().sum()
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    bound = audit.lipschitz_bound(student, 16).total
    assert 0.9 < attack_lipschitz(student.eval(), x[:2], 20) <= bound * (1 + 1e-9) <= 1 + 1e-5


@pytest.mark.parametrize("size", [1, 7, 16, 30, 33, 64, 100, 224])
def test_the_default_student_takes_any_image_size(size: int) -> None:
    student = OrthogonalShiftNetwork(size, 6, linear_width=4).eval()
    assert student(torch.rand(1, 3, size, size)).shape == (1, 6)


@pytest.mark.parametrize("make", [OrthogonalShiftNetwork, ScatteringNetwork])
def test_heads_as_wide_as_what_they_read_are_alive(make: Callable[..., nn.Module]) -> None:
    for seed in range(25):  # of which one and four were born as zeros
        torch.manual_seed(seed)
        student = make(16, 384, 4, widths=(24, 96), depths=(1, 1), linear_width=16)
        head = next(layer for layer in student.modules() if isinstance(layer, OrthogonalLinear))
        features = student.eval()(torch.rand(2, 3, 16, 16))
        assert head.weight.shape[0] == 384 and (features[0] - features[1]).norm() > 0.1


@pytest.mark.parametrize("size", [16, 32, 41])
def test_scattering_without_training_is_a_metric(size: int, tmp_path: Path) -> None:
    student = ScatteringTransform(size)
    metric = lipsim.PerceptualMetric(student, size).eval()
    x = torch.rand(3, 3, size, size)
    assert metric.embed(x).shape == (3, student.out_features)
    loaded = lipsim.load(save(metric, tmp_path / "scattering.safetensors"))
    assert torch.equal(loaded.embed(x), metric.embed(x))
    assert 0.99 < loaded.lipschitz < 1 + 1e-6
    assert loaded.feature_error > 1e-8
    exact = lipsim.load(tmp_path / "scattering.safetensors").double()  # windows have a dtype, if no weights do
    assert exact.dtype == torch.float64 and exact.feature_error < 1e-12
    with pytest.raises(ValueError, match=r"images in torch\.float64, as the weights are"):
        exact.embed(x)


def test_the_default_student_preserves_the_norm_of_smooth_images() -> None:
    """What it starts as keeps low frequencies, and all of the length of those it keeps."""
    student = OrthogonalShiftNetwork(64, 3072, linear_depth=0, depths=(0, 0))
    for layer in student:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size=64, mode="bicubic").clamp(0, 1)
    kept = student(smooth).norm(dim=1) / (smooth - 0.5).flatten(1).norm(dim=1)
    assert kept.max() <= 1 + 1e-5 and kept.min() > 0.93
    noise = torch.rand(8, 3, 64, 64)
    assert (student(noise).norm(dim=1) / (noise - 0.5).flatten(1).norm(dim=1)).max() < 0.75


def test_the_start_is_made_of_cosines() -> None:
    basis = _cosines(5)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5))
    torch.testing.assert_close(basis[0], torch.full((5,), 5**-0.5))
    rows = _lowest_frequencies(3, 4, 7)
    torch.testing.assert_close(rows @ rows.T, torch.eye(7))
    means = rows[:3].view(3, 3, 16)  # the lowest frequency of each channel comes first
    torch.testing.assert_close(means, torch.eye(3).unsqueeze(2).expand(-1, -1, 16) / 4)


def _shifted_blocks(student: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(student.children())[:-2])(x)


def test_blocks_see_their_neighbours() -> None:
    """A patch reaches its neighbours through the shifts, and no further in one block."""
    student = OrthogonalShiftNetwork(32, 4, widths=(16,), depths=(1,), linear_depth=0)
    x = torch.rand(1, 3, 32, 32)
    y = x.clone()
    y[:, :, 12:16, 12:16] = torch.rand(3, 4, 4)  # patch (3, 3)
    changed = (_shifted_blocks(student, x) - _shifted_blocks(student, y)).abs().amax((0, 1)) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[[3, 2, 4, 3, 3], [3, 3, 3, 2, 4]] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrthogonalShiftNetwork(64, 4000), "at most 3072 out_features"),
        (lambda: OrthogonalShiftNetwork(64, 8, widths=(7,), depths=(1,)), "even widths"),
        (lambda: OrthogonalShiftNetwork(64, 8, widths=(8,), depths=(1, 2)), "one length"),
        (lambda: OrthogonalShiftNetwork(64, 8, widths=(), depths=()), "one stage at least"),
        (lambda: ScatteringNetwork(64, 4000), "at most 3072 out_features"),
        (lambda: ScatteringNetwork(64, 8, grid=9), "a grid that 2 stages divide, got 9"),
        (lambda: ScatteringNetwork(64, 8, widths=(7,), depths=(1,)), "even widths"),
        (lambda: TorchlipNetwork(64, 8, (4,), (1,), (7,)), "even widths"),
        (lambda: TorchlipNetwork(64, 8, (4,), (1, 1), (8,)), "one length"),
        (lambda: TorchlipNetwork(50, 8), "divide one after another"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
