"""Whether a module runs the code and the weights that its Lipschitz bound is about.

A bound belongs to a class. It says nothing about a hook, about a method that an instance or a subclass replaces, or
about a class that was patched after its definition; each of those is found here, and :mod:`lipsim.audit` refuses it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

# What nn.Module and nn.Sequential run on the way to and in a forward pass.
_RUNS = {
    "forward",
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "_slow_forward",
    "__iter__",
    "__getattr__",
    "__getattribute__",
}
# What any class may define: it decides how a module is built, shown or put into a mode, and not what it then computes.
_FREE = {"extra_repr", "train"}
_ROOTS = (nn.Module, nn.Sequential, ABC, Generic, object)  # of which only _RUNS matters

_Code = tuple[object, CodeType | None]
_genuine: dict[type, dict[str, _Code]] = {}


def remember(classes: Iterable[type]) -> None:
    """Record the methods of classes and of their bases, to find later patches by."""
    for kind in classes:
        for cls in kind.__mro__:
            if cls not in (ABC, Generic, object):
                _genuine.setdefault(cls, {name: (value, _code(value)) for name, value in _methods(cls)})


def is_remembered(kind: type) -> bool:
    """Whether a class is one of those of :func:`remember`, and not derived from one."""
    return kind in _genuine


def fault(module: nn.Module) -> str | None:
    """Why no bound of its class covers this module, itself without those inside it; None where nothing is wrong."""
    if any((module._forward_hooks, module._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)):
        return "has forward hooks, which may compute anything; remove them to audit it"
    if vars(module).get("_compiled_call_impl") is not None:
        return "has a compiled forward; audit the module without compile()"
    for name in vars(module):
        if _counts(name) and any(_is_code(vars(cls).get(name)) for cls in type(module).__mro__):
            return f"has a {name} of its own, which may compute anything; delete the attribute to audit it"
    for cls in type(module).__mro__:
        patched = _patched(cls)
        if patched:
            return f"runs another {cls.__name__}.{patched} than the original, which may compute anything; restore it"
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        reason = _tensor_fault(tensor)
        if reason:
            return reason
    return None


def definer(kind: type, name: str) -> type | None:
    """The class that a method of ``kind`` comes from; None where there is none."""
    cls = next((cls for cls in kind.__mro__ if name in vars(cls)), None)
    return cls if cls and _is_code(vars(cls)[name]) else None


def redefinition(kind: type, base: type) -> str | None:
    """The first method that ``kind``, or a class between it and ``base``, changes of what ``base`` is built on.

    To implement what is abstract changes nothing, and neither does a new method.

    Returns:
        ``Class.method``, or None.
    """
    mro = kind.__mro__
    for i, cls in enumerate(mro[: mro.index(base)]):
        for name, value in _methods(cls):
            owner = next((other for other in mro[i + 1 :] if name in vars(other)), None)
            if owner is None or (owner in _ROOTS and name not in _RUNS):
                continue
            before = vars(owner)[name]
            unimplemented = getattr(before, "__isabstractmethod__", False) or before is vars(nn.Module)["forward"]
            if value is not before and not unimplemented:
                return f"{cls.__name__}.{name}"
    return None


def _tensor_fault(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"has weights of type {type(tensor).__name__}, which may compute anything; store them as plain tensors"
    if tensor.is_meta:
        return "has weights without values, on the meta device; load them first"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        return (
            f"has weights in half precision ({tensor.dtype}), whose rounding no bound covers; store them in float32 "
            "or float64"
        )
    return None if torch.isfinite(tensor).all() else "has non-finite weights"


def _patched(cls: type) -> str | None:
    """The name of a method that is not the one that was remembered."""
    if cls not in _genuine:
        return None
    now, genuine = dict(_methods(cls)), _genuine[cls]
    for name in now.keys() | genuine.keys():
        value, code = genuine.get(name, (None, None))
        # A function of another module was put here before anything could be remembered.
        foreign = isinstance(value, FunctionType) and value.__module__ != cls.__module__
        if foreign or now.get(name) is not value or _code(value) is not code:
            return name
    return None


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class itself defines and a forward pass may run."""
    for name, value in vars(cls).items():
        if _counts(name) and _is_code(value) and (cls not in _ROOTS or name in _RUNS):
            yield name, value


def _counts(name: str) -> bool:
    special = name.startswith("__") and name.endswith("__")
    return name not in _FREE and (name in _RUNS or not special)


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def _code(value: object) -> CodeType | None:
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return value.__code__ if isinstance(value, FunctionType) else None
