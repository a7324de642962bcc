"""What changes speed and memory does not change what is computed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lipsim.students import OrthogonalShiftNetwork, SLLNetwork, TorchlipNetwork
from lipsim.training import Acceleration, FineTuning

STUDENTS = {
    "published": lambda: SLLNetwork(32, 8, channels=6, depth=5, linear_depth=2, linear_width=16),
    "default": lambda: OrthogonalShiftNetwork(32, 8),
}


def _step(encoder: nn.Module, acceleration: Acceleration, x: Tensor, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """Features, and all gradients of one training step."""
    encoder.train().zero_grad()
    run = acceleration.wrap(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = run(x)
    features.float().square().sum().backward()
    return features.detach().float(), torch.cat([p.grad.flatten() for p in encoder.parameters()])


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": True},
        {"checkpoint": True},
        {"channels_last": True, "checkpoint": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"compile": True, "channels_last": True, "checkpoint": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "+".join(options),
)
# torch's compiler calls what torch itself deprecates, and says what a machine without a GPU lacks.
@pytest.mark.filterwarnings("ignore")
def test_options_change_nothing(student: str, options: dict[str, bool]) -> None:
    encoder, x = STUDENTS[student](), torch.rand(4, 3, 32, 32)
    expected, gradient = _step(encoder, Acceleration(), x)
    got, accelerated = _step(encoder, Acceleration(**options), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((accelerated - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.parametrize("student", STUDENTS)
def test_autocast_trains_to_its_precision(student: str) -> None:
    encoder, x = STUDENTS[student](), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        for parameter in encoder.parameters():  # |W Wᵀ| has no gradient where W is orthonormal
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    expected, gradient = _step(encoder, Acceleration(), x)
    got, half = _step(encoder, Acceleration(channels_last=True), x, bf16=True)
    assert float((got - expected).norm() / expected.norm()) < 0.02
    assert 1e-5 < float((half - gradient).norm() / gradient.norm()) < 0.1  # it did run in bf16


def test_checkpointing_keeps_less() -> None:
    encoder, x = SLLNetwork(32, 8, channels=16, depth=16, linear_depth=1, linear_width=4), torch.rand(2, 3, 32, 32)

    def kept(acceleration: Acceleration) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            acceleration.wrap(encoder)(x)
        return sum(sizes.values())

    assert kept(Acceleration(checkpoint=True)) < 0.5 * kept(Acceleration())


def test_a_sequence_is_needed_to_checkpoint() -> None:
    with pytest.raises(ValueError, match="expected a sequence of layers to checkpoint, got one Linear"):
        Acceleration(checkpoint=True).wrap(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="cannot checkpoint SpectralConv2d"):
        Acceleration(checkpoint=True).wrap(TorchlipNetwork(16, 8, blocks=(4,), depths=(1,), widths=(8,)))


def test_a_copied_stage_trains_its_own_encoder() -> None:
    stage = FineTuning(student=OrthogonalShiftNetwork(32, 8), acceleration=Acceleration(checkpoint=True))
    x = torch.rand(2, 3, 32, 32)
    before = stage.embed(x)
    copy = deepcopy(stage)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(copy.embed(x), before)
    torch.testing.assert_close(stage.embed(x), before)
    assert not any("_run" in name for name in stage.state_dict())
