"""float64 as torch's default dtype, as notebooks of numerical people have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import lipsim
from lipsim.attacks import TwoAFCObjective, apgd
from lipsim.cli.stage import train
from lipsim.data import BuiltinTriplets
from lipsim.metric.distances import BASELINES
from lipsim.students import OrthogonalShiftNetwork

LINEAR = Path(__file__).parents[1] / "configs" / "quickstart" / "linear.yaml"


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_file_keeps_its_own_dtype_and_certificates() -> None:
    images = [BuiltinTriplets("test", 2, image_size=64)[1].reference.mul(255).byte(), *torch.zeros(2, 3, 64, 64).byte()]
    images[2] += 200
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        metric = lipsim.load("quickstart")
        batch = [metric.preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())).unsqueeze(0) for i in images]
        assert batch[0].dtype == next(metric.parameters()).dtype == torch.float32
        found.append(metric.certify(*batch))
    torch.testing.assert_close(found[0].radius, found[1].radius, rtol=0, atol=0)


def test_students_start_in_the_default_dtype() -> None:
    student = OrthogonalShiftNetwork(16, 12, grid=4, widths=(32,), depths=(1,), linear_depth=1, linear_width=12)
    assert student(torch.rand(2, 3, 16, 16)).dtype == torch.float64


@pytest.mark.parametrize("name", BASELINES)
def test_attacks_keep_the_dtype_of_the_images(name: str) -> None:
    x, left, right = (torch.rand(2, 3, 32, 32, dtype=torch.float32) for _ in range(3))
    objective = TwoAFCObjective(BASELINES[name], x, left, right)
    assert objective(x).dtype == apgd(objective, x, norm=2, eps=1.0, steps=3).dtype == torch.float32


def test_votes_are_float32() -> None:
    assert BuiltinTriplets("train", 2, image_size=16)[0].right_vote.dtype == torch.float32


def test_a_stage_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.accelerator=cpu", "--data.num_train=8", "--data.num_val=8", "--model.student.out_features=4"]
    train(["--config", str(LINEAR), *small, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
    metric = lipsim.load("runs/quickstart/linear/linear.safetensors")
    assert next(metric.parameters()).dtype == torch.float32
