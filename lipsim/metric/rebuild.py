"""An encoder built again from what a file says, which may be anything: without more of it than the file has weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from lipsim.metric.encoders import encoder_class, is_of_this_package
from lipsim.utils.errors import LipsimError

# A constructor may make parts that it replaces, as timm does with heads and torch with parametrised weights, and keep
# buffers that files do not hold.
_SPARE_FACTOR, _SPARE_TENSORS, _SPARE_ELEMENTS = 8, 1024, 2**24
_RANDOM = "random"  # lipsim.teachers.branch.RANDOM, without its seconds of import
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.linspace}


def build_encoder(name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Build an encoder, and stop its constructor where it makes many times more weights than a file has to fill them.

    A header is a few bytes that can ask for any depth and width: time and memory that nothing in the file pays for.

    Args:
        name: one of :func:`lipsim.metric.encoders.registered_names`.
        config: arguments of its constructor.
        state: the weights of the file.

    Raises:
        ValueError: they cannot fill what the configuration asks for.
    """
    if _names_files(config):
        raise LipsimError("its configuration names a weight file; the file of a metric has all weights itself")
    cls = encoder_class(name)
    tensors = _SPARE_FACTOR * len(state) + _SPARE_TENSORS
    elements = _SPARE_FACTOR * sum(tensor.numel() for tensor in state.values()) + _SPARE_ELEMENTS
    with ExitStack() as guards:
        guards.enter_context(_limited_modules(tensors, elements))
        if all(map(is_of_this_package, _encoders(name, config))):  # others may derive large tensors of no file
            guards.enter_context(_LimitedTensors(elements))
        return cls(**config)


def _encoders(name: str, config: Any) -> Iterator[str]:
    """The names of an encoder and of those that it joins."""
    yield name
    for part in config.values() if isinstance(config, Mapping) else ():
        if isinstance(part, Mapping) and isinstance(part.get("encoder"), str):
            yield from _encoders(part["encoder"], part.get("config"))


def _names_files(config: Any) -> bool:
    """Whether a configuration asks for the weights of another file, which a stranger's header must not choose."""
    if isinstance(config, Mapping):
        return any((key == "weights" and value != _RANDOM) or _names_files(value) for key, value in config.items())
    return isinstance(config, list) and any(map(_names_files, config))


@contextmanager
def _limited_modules(tensors: int, elements: int) -> Iterator[None]:
    """Refuse more parameters and buffers than ``tensors``, and larger ones than ``elements``, made in this thread."""
    thread, count = threading.get_ident(), 0

    def check(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal count
        if threading.get_ident() != thread or tensor is None:
            return
        count += 1
        if count > tensors:
            raise LipsimError(f"its configuration asks for more than {tensors} tensors, far more than the file has")
        _check_size(tensor.shape, elements)

    with ExitStack() as hooks:
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
            hooks.callback(register(check).remove)
        yield


class _LimitedTensors(TorchFunctionMode):
    """Refuses new tensors of more than ``elements`` before they take memory."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            _check_size(_size(func, args, kwargs), self.elements)
        return func(*args, **kwargs)


def _size(factory: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape that a call of a factory asks for."""
    if factory is torch.linspace:
        return (kwargs["steps"] if "steps" in kwargs else args[2],)
    size = kwargs.get("size", args)
    return tuple(size[0]) if size and isinstance(size[0], Sequence) else tuple(size)


def _check_size(shape: Sequence[int], elements: int) -> None:
    if math.prod(shape) > elements:
        raise LipsimError(f"its configuration asks for a tensor of shape {tuple(shape)}, far more than the file has")
