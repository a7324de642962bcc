"""Muon turns matrices by orthogonal steps, and is Adam on everything else."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipsim
from lipsim.datamodules import BuiltinData
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork
from lipsim.training import Constant, FineTuning, MuonWithAuxAdam
from lipsim.training.checkpoints import check_moments
from lipsim.training.muon import nearly_orthogonal


def _with_spectrum(rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with the given singular values, and the orthogonal matrix of its singular vectors."""
    generator = torch.Generator().manual_seed(rows)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (left * values) @ right.mT, left @ right.mT


@pytest.mark.parametrize("shape", [(24, 24), (16, 300), (300, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64) * 1e-6  # as small as gradients are
    matrix, vectors = _with_spectrum(*shape, values)
    found = nearly_orthogonal(matrix.to(dtype))
    assert found.dtype == dtype and found.shape == shape
    factors = torch.linalg.svdvals(found.double())
    assert 0.66 < factors.min() and factors.max() < 1.23
    if dtype == torch.float64:  # the vectors are those of the matrix: what is left is a symmetric factor of them
        assert torch.allclose(found @ vectors.mT, (found @ vectors.mT).mT, atol=1e-12)


def test_directions_that_a_gradient_lacks_stay_away() -> None:
    matrix, _ = _with_spectrum(12, 40, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    factors = torch.linalg.svdvals(nearly_orthogonal(matrix.float()))
    assert (factors[:3] > 0.66).all() and factors[3:].max() < 1e-2
    assert (nearly_orthogonal(torch.zeros(3, 5)) == 0).all()


def test_a_step_is_as_pytorch_takes_it() -> None:
    """On a matrix, against torch.optim.Muon, whose iterations are in bfloat16; on vectors, against torch.optim.Adam.

    On a wide matrix: on a tall one torch's step is longer by the root of rows over columns.
    """
    torch.manual_seed(0)
    mine = nn.Linear(30, 20)
    theirs = copy.deepcopy(mine)
    optimizer = MuonWithAuxAdam(mine.parameters(), lr=0.05, adam_lr=0.01, adam_betas=(0.8, 0.9))
    others = [
        torch.optim.Muon([theirs.weight], lr=0.05, momentum=0.95, weight_decay=0.0),
        torch.optim.Adam([theirs.bias], lr=0.01, betas=(0.8, 0.9)),
    ]
    start = mine.weight.detach().clone()
    for step in range(5):
        gradients = [torch.randn(20, 30), torch.randn(20)]
        for layer, steppers in ((mine, [optimizer]), (theirs, others)):
            layer.weight.grad, layer.bias.grad = gradients
            for stepper in steppers:
                stepper.step()
        if not step:
            turned = torch.linalg.svdvals((mine.weight - start).detach() / 0.05)
            assert 0.6 < turned.min() and turned.max() < 1.23
    moved = (mine.weight - start).norm()
    assert (mine.weight - theirs.weight).norm() < 0.02 * moved
    assert torch.equal(mine.bias, theirs.bias)


def test_a_kernel_counts_as_a_matrix() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2))
    before = kernel.detach().clone()
    kernel.grad = torch.randn(4, 3, 2, 2)
    MuonWithAuxAdam([kernel], lr=0.1, momentum=0.0).step()
    expected = before - 0.1 * nearly_orthogonal(kernel.grad.flatten(1)).view_as(kernel)
    torch.testing.assert_close(kernel.detach(), expected)


def test_vectors_of_any_shape_are_adams() -> None:
    """Biases of SLL layers are rows: a step of Muon would have the same length whatever their gradient is."""
    student = OrthogonalShiftNetwork(16, 8, grid=4, widths=(8, 16), depths=(1, 1), linear_width=8)
    matrices, vectors = (group["params"] for group in MuonWithAuxAdam(student.parameters()).param_groups)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in vectors} >= {"bias"}
    assert not any("bias" in names[id(p)] for p in matrices) and len(matrices) == 7
    one_row = nn.Parameter(torch.ones(1, 5, 1, 1))
    one_row.grad = torch.full_like(one_row, 1e-3)
    MuonWithAuxAdam([one_row], lr=10.0, adam_lr=0.1).step()
    torch.testing.assert_close(one_row.detach(), torch.full((1, 5, 1, 1), 0.9), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-38])
def test_vanishing_gradients_take_small_steps(scale: float) -> None:
    matrix = scale * torch.randn(6, 9)
    assert 0 <= nearly_orthogonal(matrix).norm() <= 5000 * scale / 1e-7  # five quintics take them up by 485


def test_momentum_dies_out_without_gradients() -> None:
    """As where every triplet is beyond the target of a hinge."""
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = MuonWithAuxAdam([weight], lr=0.1)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    weight.grad = torch.zeros(4, 4)
    for _ in range(2000):
        optimizer.step()
    before = weight.detach().clone()
    optimizer.step()
    assert torch.isfinite(before).all() and torch.equal(weight.detach(), before)


def test_steps_are_in_full_precision() -> None:
    """In TF32 the iterations of the Gram matrix leave their range."""
    weight = nn.Parameter(torch.randn(4, 4))
    weight.grad = torch.randn(4, 4)
    seen = []
    optimizer = MuonWithAuxAdam([weight])
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "lipsim.training.muon.nearly_orthogonal",
                lambda matrix: (
                    seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu"))) or matrix
                ),
            )
            optimizer.step()
        assert seen == [("ieee", False)] and torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_what_has_no_gradient_stays_and_a_closure_is_called() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        loss = used.square().sum()
        loss.backward()
        return loss

    assert MuonWithAuxAdam([used, unused]).step(closure) == 4
    assert (used != 1).all() and (unused == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "rates > 0"),
        ({"adam_lr": -1.0}, "rates > 0"),
        ({"momentum": 1.0}, r"\[0, 1\)"),
        ({"adam_betas": (0.9, 1.0)}, r"\[0, 1\)"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonWithAuxAdam([nn.Parameter(torch.ones(2, 2))], **options)
    with pytest.raises(ValueError, match="without names or groups"):
        MuonWithAuxAdam([{"params": []}])  # type: ignore[list-item]


def _train(folder: Path, epochs: int, optimizer: Any = MuonWithAuxAdam, **options: Any) -> lipsim.PerceptualMetric:
    torch.manual_seed(0)
    student = OrthogonalShiftNetwork(16, 8, grid=4, widths=(8, 16), depths=(1, 1), linear_width=8)
    stage = FineTuning(student, optimizer=optimizer, schedule=Constant())
    data = BuiltinData(num_train=12, num_val=4, num_test=4, image_size=16, batch_size=4)
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return lipsim.train(stage, data, max_epochs=epochs, directory=folder, **quiet, **options)


def test_a_training_resumes_with_its_moments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Matrices and vectors alternate in the network, and are a group each in the optimizer, which numbers them so."""
    torch.set_num_threads(1)
    with caplog.at_level("INFO"):
        whole = _train(tmp_path / "whole", 2)
    assert "learning rate of 7 parameters: 0.03" in caplog.text and "parameters: 0.002" in caplog.text
    _train(tmp_path / "half", 1)
    resumed = _train(tmp_path / "half", 2, checkpoint="last")
    before = torch.load(tmp_path / "half" / "checkpoints" / "last.ckpt", weights_only=True)
    assert before["global_step"] == 6
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (MuonWithAuxAdam, torch.optim.Adam, False),
        (torch.optim.Adam, MuonWithAuxAdam, False),
        (torch.optim.Adam, torch.optim.NAdam, False),
        (torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True), False),
        (partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.Adam, False),
        (torch.optim.Adam, torch.optim.AdamW, True),
    ],
)
def test_an_optimizer_does_not_go_on_from_the_moments_of_another(
    first: Any, second: Any, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The command line wins: training goes on with the one that it names."""
    torch.set_num_threads(1)
    _train(tmp_path, 1, first)
    caplog.clear()
    with caplog.at_level("INFO"):
        _train(tmp_path, 2, second, checkpoint="last")
    assert ("cannot go on from the moments in the checkpoint: it begins with none" in caplog.text) is not kept
    assert "initial_lr" not in caplog.text
    (state,) = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    steps = {int(moments["step"]) for moments in state["state"].values() if "step" in moments}
    assert steps == {6 if kept else 3}


def test_moments_of_other_parameters_are_refused(tmp_path: Path) -> None:
    _train(tmp_path, 1)
    (file,) = tmp_path.rglob("last.ckpt")
    wider = FineTuning(OrthogonalShiftNetwork(16, 8, grid=4, widths=(8, 20), depths=(1, 1), linear_width=8))
    wider.optimizer_factory = MuonWithAuxAdam
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter \d+ has shape .* as of another"):
        check_moments(file, wider.make_optimizer())
    with pytest.raises(ValueError, match=r"its optimizer has \d+ parameters, and 2 are trained"):
        check_moments(file, FineTuning(OrthogonalProjection(16, 4)).make_optimizer())
