"""Full precision and evaluation mode, nested and in several threads at once."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipsim import PerceptualMetric
from lipsim.layers import ExplicitLinear, OrthogonalPatches, SLLLinear, evaluation_mode
from lipsim.layers.base import _HELD
from lipsim.utils.precision import _BACKENDS, full_precision

_TIMEOUT = 30.0


@pytest.fixture
def lowered() -> Iterator[list[str]]:
    """Products of float32 in bfloat16, as ``--trainer.precision`` and users set it."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield _flags()
    finally:
        torch.set_float32_matmul_precision("highest")


def _flags() -> list[str]:
    return [backend.fp32_precision for backend in _BACKENDS]


def _together(*functions: Callable[[], Any]) -> list[Any]:
    """Run each function in a thread of its own; returns what they return, raises what they raise."""
    results: list[Any] = [None] * len(functions)

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:  # raised again below, in the thread of the test
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_TIMEOUT)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_settings_nest_and_come_back(lowered: list[str]) -> None:
    ieee = ["ieee"] * len(lowered)
    assert lowered != ieee
    with full_precision():
        with full_precision():
            assert _flags() == ieee
        assert _flags() == ieee
    assert _flags() == lowered
    with pytest.raises(ZeroDivisionError), full_precision(), full_precision():
        _ = 1 / 0
    assert _flags() == lowered


def test_settings_changed_inside_are_undone(lowered: list[str]) -> None:
    with full_precision():
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert _flags() == ["ieee"] * len(lowered)
    assert _flags() == lowered


def test_inherited_settings_stay_inherited() -> None:
    before = _flags()
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
        with full_precision():
            assert _flags() == ["ieee"] * len(before)
        assert _flags() == ["tf32"] * len(before)
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        assert _flags() == ["none"] * len(before)
    finally:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision


def test_two_threads_that_overlap(lowered: list[str]) -> None:
    """The first to enter leaves first: the other one is still in full precision, and what was before comes back."""
    entered, left = threading.Barrier(2, timeout=_TIMEOUT), threading.Barrier(2, timeout=_TIMEOUT)
    ieee = ["ieee"] * len(lowered)

    def first() -> None:
        with full_precision():
            entered.wait()
        left.wait()

    def second() -> None:
        with full_precision():
            entered.wait()
            left.wait()
            assert _flags() == ieee
            assert not torch.is_autocast_enabled("cpu")

    _together(first, second)
    assert _flags() == lowered


class _Waiting(nn.Module):
    """Identity that lets another thread run in the middle of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.wait: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.wait()
        return x

    def lipschitz_bound(self) -> float:
        return 1.0


def test_two_threads_that_certify(lowered: list[str]) -> None:
    """Both are in the middle of a forward pass; the second one goes on when the first one is done."""
    encoder = nn.Sequential(OrthogonalPatches(3, 12, patch=2), waiting := _Waiting(), nn.Flatten(), nn.Linear(768, 32))
    with torch.no_grad():
        nn.init.normal_(encoder[3].weight, std=0.1)
    metric = PerceptualMetric(encoder, 16).train()
    metric.lipschitz = metric.lipschitz  # no audits: they would run the layer that waits
    images = torch.rand(3, 8, 3, 16, 16)
    expected = metric.certify(*images)
    both, done = threading.Barrier(2, timeout=_TIMEOUT), threading.Event()
    first_thread = threading.local()

    def wait() -> None:
        both.wait()
        if not hasattr(first_thread, "here"):
            assert done.wait(_TIMEOUT)

    def first() -> Any:
        first_thread.here = True
        try:
            return metric.certify(*images)
        finally:
            done.set()

    waiting.wait = wait
    for certificate in _together(first, lambda: metric.certify(*images)):
        for name in ("margin", "radius", "joint_radius"):
            assert torch.equal(getattr(certificate, name), getattr(expected, name))
    assert _flags() == lowered
    assert all(module.training for module in metric.modules())


def test_modes_come_back_when_the_last_block_ends() -> None:
    net = nn.Sequential(SLLLinear(5, 4), nn.Sequential(nn.ReLU(), nn.Dropout())).train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    entered, left = threading.Barrier(2, timeout=_TIMEOUT), threading.Barrier(2, timeout=_TIMEOUT)

    def first() -> None:
        with evaluation_mode(net):
            entered.wait()
        left.wait()

    def second() -> None:
        with evaluation_mode(net[0]), evaluation_mode(net):
            entered.wait()
            left.wait()
            assert not any(module.training for module in net.modules())

    _together(first, second)
    assert [module.training for module in net.modules()] == modes


def test_modes_nest_and_survive_errors() -> None:
    net = nn.Sequential(SLLLinear(5, 4), nn.ReLU()).train()
    net[1].eval()
    with pytest.raises(ZeroDivisionError), evaluation_mode(net):
        with evaluation_mode(net[0]):
            assert not net[0].training
        assert not net[0].training
        net.train()  # undone, as a change of the precision is
        _ = 1 / 0
    assert net.training and net[0].training and not net[1].training
    del net
    gc.collect()
    assert not len(_HELD)


class _Iterating(nn.Module):
    """A weight that iterates while it is read, as those of other packages do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.readers = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.readers += 1
        alone = self.readers == 1
        self.steps.add_(1.0)
        threading.Event().wait(0.05)  # long enough for the other thread to come, if nothing keeps it out
        self.readers -= 1
        assert alone, "two threads read at once"
        return weight * self.steps


def test_threads_fold_one_at_a_time() -> None:
    source = nn.Linear(5, 4)
    parametrize.register_parametrization(source, "weight", iterating := _Iterating())
    iterating.steps.zero_()
    layer, x = ExplicitLinear(source).eval(), torch.randn(3, 5)
    start = threading.Barrier(2, timeout=_TIMEOUT)

    def run() -> Tensor:
        start.wait()
        with torch.no_grad():
            return layer(x)

    first, second = _together(run, run)
    assert torch.equal(first, second)
    assert float(iterating.steps) == 0  # put back


def test_threads_that_audit_do_not_take_each_others_folded_weights() -> None:
    """Each audit folds and unfolds the layers while another reads them."""
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), SLLLinear(12, 8), SLLLinear(12, 8)), 2)
    bound, before = metric.audit().total, sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = _together(*[lambda: [metric.audit().total for _ in range(15)]] * 4)
    finally:
        sys.setswitchinterval(before)
    assert {total for totals in found for total in totals} == {bound}
