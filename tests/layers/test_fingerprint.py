"""A fingerprint changes with every bit, and with nothing else."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipsim.layers.fingerprint import _checksums, bits, fingerprint

SIZES = [1, 3, 7, 1000, 1025, 2**16 + 3, 3 * 2**16 + 1]  # in one piece, in slabs, with a rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("size", SIZES)
def test_every_bit_counts(size: int, dtype: torch.dtype) -> None:
    tensor = (torch.randn(size) * 3).to(dtype)
    before = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == before
    raw = tensor.view(torch.uint8)
    for position in {0, size // 2, size - 1, raw.numel() - 1}:
        changed = tensor.clone()
        changed.view(torch.uint8)[position] ^= 1
        assert fingerprint(changed) != before


def _signs(x: Tensor) -> None:
    x[torch.randperm(len(x))[: max(2, len(x) // 3)]] *= -1


def _swap(x: Tensor) -> None:
    x[[0, len(x) - 1]] = x[[len(x) - 1, 0]]


def _two_signs(x: Tensor) -> None:
    x[[1, len(x) - 2]] *= -1


def _moved(x: Tensor) -> None:
    x.copy_(x.roll(2))


def _not_a_number(x: Tensor) -> None:
    x[1] = torch.nan


@pytest.mark.parametrize("edit", [_signs, _swap, _two_signs, _moved, _not_a_number])
@pytest.mark.parametrize("size", [1000, 2**16 + 3, 3 * 2**16 + 1])
def test_regular_changes(size: int, edit: Callable[[Tensor], None]) -> None:
    tensor = torch.randn(size)
    before = fingerprint(tensor)
    edit(tensor)
    assert fingerprint(tensor) != before


def test_two_signs_never_cancel() -> None:
    """The highest bits of two words, whose changes cancel in a plain sum of products modulo 2⁶⁴."""
    words = bits(torch.randn(2**16))
    before = _checksums(words)
    for position in range(1, 2000):
        changed = words.clone()
        changed[[0, position]] ^= -(2**63)
        assert not torch.equal(_checksums(changed), before)


def test_zeros_signs_and_empty_tensors() -> None:
    assert fingerprint(torch.zeros(5)) != fingerprint(-torch.zeros(5))
    assert fingerprint(torch.full((5,), torch.nan)) == fingerprint(torch.full((5,), torch.nan))
    assert fingerprint(torch.empty(0)) != fingerprint(torch.empty(0, 3))
    assert fingerprint(torch.zeros(())) != fingerprint(torch.ones(()))


def test_shapes_dtypes_and_places() -> None:
    tensor = torch.randn(4, 6)
    before = fingerprint(tensor)
    assert fingerprint(tensor.view(6, 4)) != before
    assert fingerprint(tensor.view(torch.int32)) != before
    assert fingerprint(tensor, tensor) != fingerprint(tensor, tensor.clone())
    images = torch.randn(2, 3, 4, 4)
    assert fingerprint(images) == fingerprint(images.contiguous(memory_format=torch.channels_last))
    assert fingerprint(tensor[:, 1:]) == fingerprint(tensor[:, 1:].clone())
    assert fingerprint(nn.Parameter(tensor[1])) == fingerprint(nn.Parameter(tensor[1].clone(), requires_grad=False))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "buffer": lambda net: net[1].running_mean.add_(1),
    "attribute": lambda net: setattr(net[2], "negative_slope", 0.2),
    "new attribute": lambda net: setattr(net[2], "scale", 1),
    "type of an attribute": lambda net: setattr(net[1], "affine", 1),
    "tuple": lambda net: setattr(net[0], "stride", (1, 2)),
    "list": lambda net: setattr(net[0], "listed", [1, {"a": np.ones(3)}]),
    "hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net[0].register_forward_pre_hook(lambda *_: None),
    "forward": lambda net: setattr(net[0], "forward", lambda x: x),
    "appended": lambda net: net.append(nn.ReLU()),
    "None": lambda net: net._modules.update({"1": None}),
    "class": lambda net: setattr(net[2], "__class__", nn.ReLU),
    "order": lambda net: net._modules.update(dict(zip("012", [net[1], net[0], net[2]], strict=True))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_module_is(name: str) -> None:
    net = _net()
    before = fingerprint(net)
    assert fingerprint(net) == before == fingerprint(deepcopy(net))
    CHANGES[name](net)
    assert fingerprint(net) != before


def test_contents_of_attributes() -> None:
    net = _net()
    net[0].listed = [1, {"a": np.ones(3)}, torch.ones(2)]
    before = fingerprint(net)
    net[0].listed[1]["a"][2] = 0
    between = fingerprint(net)
    net[0].listed[2][0] = 0
    assert len({before, between, fingerprint(net)}) == 3


def test_what_does_not_count() -> None:
    net = _net()
    before = fingerprint(net)
    net.eval().requires_grad_(False)
    net[0].register_full_backward_hook(lambda *_: None)
    assert fingerprint(net) == before


def test_identities_do_not_leave_the_process() -> None:
    content = fingerprint(_net())
    assert deepcopy(content) == content
    assert pickle.loads(pickle.dumps(content)) != content


class _Gain:
    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.value * x


class _Slotted:
    __slots__ = ("value",)


class _Stateful(nn.Module):
    settings: dict[str, float] = {"gain": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.slotted, self.past = _Gain(), _Slotted(), deque([1.0])
        self.slotted.value = 1.0

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.gain(x) * self.settings["gain"] * self.past[0] * self.slotted.value * factor


STATES: dict[str, Callable[[_Stateful], object]] = {
    "object that is called": lambda module: setattr(module.gain, "value", 5.0),
    "slots": lambda module: setattr(module.slotted, "value", 5.0),
    "queue": lambda module: module.past.appendleft(5.0),
    "dictionary of the class": lambda module: module.settings.update(gain=5.0),
    "default of forward": lambda module: setattr(type(module).forward, "__defaults__", (5.0,)),
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_forward_reads_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Stateful, "settings", {"gain": 1.0})
    module = _Stateful()
    before = fingerprint(module)
    assert fingerprint(module) == before
    try:
        STATES[name](module)
        assert module(torch.ones(1)) == 5.0
        assert fingerprint(module) != before
    finally:
        _Stateful.forward.__defaults__ = (1.0,)
