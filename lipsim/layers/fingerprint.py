"""What a module computes, told apart by its content: bits of tensors, structure, plain attributes, hooks and code.

Version counters and addresses do not tell: fused optimizers, writes to ``.data``, under ``inference_mode`` or through
numpy count no version, and addresses are used again. Here every bit is read, at about the speed of memory.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Neither changes what a forward pass in evaluation mode computes, or is itself compared where it is used.
_IGNORED = frozenset(
    {
        "training",
        "_folded_from",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_non_persistent_buffers_set",
    }
)
# Their classes keep nothing that a network computes with; of their functions the code is told apart.
_LIBRARIES = frozenset({"torch", "torchvision", "timm", "abc", "typing", "collections", "lipsim"})
_SMALL = 2**12  # bytes of a tensor that is read as a whole


class Fingerprint:
    """Equal for equal content, within one process: code and hooks are told apart by their identity.

    A checksum of 64 bits a tensor and SHA-256 over all of them: content that differs is taken for equal with a
    probability below 1e-9, for the most regular changes (signs of two weights), and 1e-19 for all others.
    """

    def __init__(self, digest: bytes, alive: tuple[Any, ...] = ()) -> None:
        self.digest = digest
        self._alive = alive  # an identity must not be used again while this fingerprint stands for it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and bool(self.digest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fingerprint:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint, (b"",)  # equal to nothing: identities mean nothing in another process


def fingerprint(*content: Any) -> Fingerprint:
    """Fingerprint of modules, tensors, containers and plain values: what they would compute in evaluation mode.

    Seen are all bits, shapes and dtypes of parameters, buffers and other tensors, the modules and their order, every
    other attribute, forward hooks (global ones too), and the functions of all classes. Devices count; memory formats,
    ``requires_grad`` and backward hooks do not.
    """
    reader = _Reader()
    with torch.no_grad(), torch._C._DisableFuncTorch():
        for item in (*content, _global_forward_hooks, _global_forward_pre_hooks):
            reader.read(item)
        reader.tokens.append(_digest(reader.tensors))
    return Fingerprint(hashlib.sha256(repr(reader.tokens).encode()).digest(), tuple(reader.alive))


def bits(tensor: Tensor) -> Tensor:
    """The content of a tensor as a vector of integers, which compare NaN and −0.0 as what is stored."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.contiguous().reshape(-1)
    size = flat.element_size()
    # Eight bytes at a time where they fit.
    fits = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return flat.view(torch.int64 if fits else _INTEGERS[size])


def single_bits(tensor: Tensor) -> Tensor:
    """:func:`bits` with one integer an element, of what is strided; torch.compile can trace it."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def structure(module: nn.Module) -> str:
    """The layers of a module as it prints them, and the functions that they keep: the same in another process.

    Not every attribute: a forward pass may write some.
    """
    kept = [
        f"{name}.{key} = {value.__module__}.{value.__qualname__}"
        for name, layer in module.named_modules()
        for key, value in vars(layer).items()
        if isinstance(value, FunctionType | BuiltinFunctionType) and not key.startswith("_")
    ]
    return "\n".join([re.sub(r"0x[0-9a-fA-F]+", "", repr(module)), *kept])  # addresses


class _Reader:
    """Collects what is plain as tokens, and tensors apart."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self.tensors: list[Tensor] = []
        self.alive: list[Any] = []
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []

    def read(self, item: Any) -> None:
        if type(item) in _PLAIN:
            self.tokens.append(item)
            return
        if isinstance(item, type):
            self._class(item)
            return
        if id(item) in self._seen:
            self.tokens.append(("seen", self._seen[id(item)]))
            return
        self._seen[id(item)] = len(self._seen)
        self._held.append(item)  # else its id could be another object's before the end
        if isinstance(item, Tensor):
            self.tokens.append(("tensor", str(item.dtype), tuple(item.shape), str(item.device)))
            self.tensors.append(item)
        elif isinstance(item, nn.Module):
            self._class(type(item))
            self._attributes(vars(item), _IGNORED)
        elif isinstance(item, dict):
            self._attributes(item)
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            self.tokens.append((type(item).__name__, len(item)))
            for part in item:
                self.read(part)
        elif isinstance(item, np.ndarray) and item.dtype != object:
            self.tokens.append(("array", str(item.dtype), item.shape, item.tobytes()))
        elif isinstance(item, (torch.dtype, torch.device, np.generic)):
            self.tokens.append(repr(item))
        elif isinstance(item, FunctionType):
            self._function(item)
        elif isinstance(item, MethodType):
            self.read(item.__func__)
            self.read(item.__self__)
        else:
            self._class(type(item))
            self._attributes(getattr(item, "__dict__", {}))
            slots = [name for base in type(item).__mro__ for name in _names(vars(base).get("__slots__", ()))]
            self._attributes({name: getattr(item, name) for name in slots if hasattr(item, name)})
            self._identity(item)

    def _function(self, function: FunctionType) -> None:
        """Its code, its defaults and what it closes over; not the globals that it reads."""
        self._identity(function)
        self._identity(function.__code__)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for part in (*(function.__defaults__ or ()), *cells):
            self.read(part)
        self.read(dict(function.__kwdefaults__ or {}))

    def _attributes(self, attributes: dict[Any, Any], ignored: frozenset[str] = frozenset()) -> None:
        for name, value in attributes.items():
            if name in ignored:
                continue
            if type(name) is str and (type(value) in _PLAIN or (isinstance(value, dict) and not value)):
                self.tokens.append((name, value if type(value) in _PLAIN else ()))  # most are: no call for them
            else:
                self.read(name)
                self.read(value)
        self.tokens.append("end")

    def _class(self, cls: type) -> None:
        """A class is what its functions do, and those of its bases, which anybody may replace."""
        for base in cls.__mro__[:-1]:
            if id(base) in self._seen:
                self.tokens.append(("seen", self._seen[id(base)]))
                if base is cls:
                    return
                continue
            self._seen[id(base)] = len(self._seen)
            self._identity(base)
            members = dict(vars(base))
            self.tokens.append(tuple(map(id, members.values())))
            self.alive.extend(members.values())
            if base.__module__.partition(".")[0] in _LIBRARIES:
                functions = [member for member in members.values() if isinstance(member, FunctionType)]
                self.tokens.append(tuple(id(function.__code__) for function in functions))
                self.alive.extend(function.__code__ for function in functions)
                continue
            for name, member in members.items():
                if isinstance(member, (FunctionType, dict, list, set, deque, Tensor, np.ndarray)):
                    self.tokens.append(name)
                    self.read(member)

    def _identity(self, item: Any) -> None:
        self.tokens.append(id(item))
        self.alive.append(item)


def _names(slots: str | Iterable[str]) -> list[str]:
    found = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _digest(tensors: Iterable[Tensor]) -> bytes:
    """One digest of the bits of all tensors, computed where they lie; one transfer a device."""
    pieces: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_meta:
            continue
        words = bits(tensor)
        small = words.numel() * words.element_size() <= _SMALL
        piece = words if small else _checksums(words)
        pieces.setdefault(tensor.device, []).append(piece.view(torch.uint8))
    digest = hashlib.sha256()
    for parts in pieces.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.digest()


def _checksums(words: Tensor) -> Tensor:
    """Sums modulo 2⁶⁴ of words times random numbers, which depend on the position; two for each slab.

    Alone, a sum of 64-bit words sees of their highest bit only whether it flips an even number of times, hence the
    second one, of their upper halves.
    """
    if words.dtype != torch.int64:
        words = words.long()
    factors, others = _factors(words.device)
    sums = []
    for slab in words.split(len(factors)):
        sums.append((slab * factors[: len(slab)]).sum())
        sums.append(((slab >> 32) * others[: len(slab)]).sum())
    return torch.stack(sums)


@lru_cache
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    # A slab stays in the cache of a processor; elsewhere each costs the launch of its kernels.
    size = 2**15 if device.type == "cpu" else 2**20
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63, (2, size), dtype=np.int64) | 1
    with torch.inference_mode(False):
        first, second = torch.from_numpy(numbers).to(device)
    return first, second
