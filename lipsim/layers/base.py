"""What every 1-Lipschitz layer of this package offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from threading import RLock
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipsim.layers.fingerprint import bits, single_bits
from lipsim.utils.precision import full_precision

_LOCK = RLock()  # of what threads share: modes of modules, and weights while they are folded
_HELD: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # blocks that hold a module, its own mode


class LipschitzLayer(nn.Module, ABC):
    """A layer that bounds its own Lipschitz constant (ℓ2 to ℓ2).

    Layers whose weights are a function of their parameters (a rescaling, an orthonormalisation) recompute it at every
    training step, and once for all in :meth:`freeze`.
    """

    @abstractmethod
    def lipschitz_bound(self) -> float:
        """An upper bound in float64 of the map that ``forward`` computes with the weights as they are stored.

        For every input, and for this class: a subclass that changes what runs has to declare a bound of its own.
        """

    def freeze(self) -> Self:
        """Fold derived weights into constants for evaluation, with no gradient to the parameters."""
        return self


class FoldedLayer(LipschitzLayer):
    """A layer with weights derived from its parameters, which :meth:`freeze` computes once for evaluation.

    What was folded is used in evaluation mode only, and only while what it was derived from is the same, bit by bit:
    after an optimizer step, a loaded state, any edit, a move to another device or dtype, the layer derives its weights
    again. (Half precision, in which nothing is certified, rounds what was folded.) A forward pass reads parameters once
    more for that, and a folded layer keeps a copy of them.
    """

    def __init__(self) -> None:
        super().__init__()
        # Plain attributes, not buffers: checkpoints hold the parameters only.
        self._folded: tuple[Tensor, ...] = ()
        self._folded_from: Source | None = None
        self._pinned: tuple[Tensor, ...] | None = None

    @abstractmethod
    def derive(self) -> tuple[Tensor, ...]:
        """The weights that ``forward`` uses, computed from the parameters."""

    def weights(self) -> tuple[Tensor, ...]:
        """The folded weights where they are still valid, else freshly derived ones."""
        if self._pinned is not None:
            return self._pinned
        folded = self._folded  # once: another thread may unfold in between
        if not folded or not self._fold_is_valid():
            return self.derive()
        return self._unless_changed(folded) if torch.compiler.is_dynamo_compiling() else folded

    def _fold_is_valid(self) -> bool:
        source = self._folded_from
        return source is not None and not self.training and source.is_that_of(self)

    # torch.compile cannot trace it, and asks once, while it compiles. (This mark is what
    # torch.compiler.assume_constant_result leaves, which takes a second to import.)
    _fold_is_valid._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _unless_changed(self, folded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The folded weights in a compiled graph: NaN after a change of what they were derived from.

        The graph cannot derive them again, and what it answers for other weights must not be taken for an answer.
        """
        assert self._folded_from is not None
        same = [
            (single_bits(tensor) == content.view(single_bits(tensor).dtype)).all()
            for tensor, (_, _, content) in zip(_tensors(self), self._folded_from.tensors, strict=True)
        ]
        return tuple(torch.where(torch.stack(same).all(), weight, torch.nan) for weight in folded)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        folded = self._folded if self._fold_is_valid() else ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._pinned is not None:
            self._pinned = tuple(fn(weight) for weight in self._pinned)
        if folded and not _HALVES & {weight.dtype for weight in folded}:
            rounded = tuple(fn(weight) for weight in folded)
            if _HALVES & {weight.dtype for weight in rounded}:
                # Derived from rounded parameters they would be ten times as far off as what is rounded at the end.
                with _LOCK, torch.no_grad():
                    self._folded, self._folded_from = rounded, Source(self)
        return self

    def freeze(self) -> Self:
        if self._pinned is None:
            self.eval()
            # Attacks differentiate through folded weights, which tensors made in inference mode do not allow.
            with _LOCK, torch.inference_mode(False), torch.no_grad(), full_precision():
                if not self._fold_is_valid():
                    self._folded_from = None
                    source = Source(self)
                    self._folded = tuple(weight.detach() for weight in self._derive_for_good())
                    self._folded_from = source
        return self

    def _derive_for_good(self) -> tuple[Tensor, ...]:
        return self.derive()

    def pin(self, weights: tuple[Tensor, ...]) -> None:
        """Use these weights for good, whatever the parameters; see :func:`exact_copy`."""
        self.unfold()
        self._pinned = weights

    def unfold(self) -> None:
        """Forget the folded weights, and what was kept to know whether they are valid."""
        with _LOCK:
            self._folded, self._folded_from = (), None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.unfold()
        return super().train(mode)


class Source:
    """All that something was derived from: bits of the tensors of a module, and the plain attributes of what is in it.

    A copy, not a checksum: comparing it takes half the time, and is exact.

    Args:
        layer: the module.
        whole: look at every attribute and at hooks too, by their identity where they are not plain.
    """

    def __init__(self, layer: nn.Module, whole: bool = False) -> None:
        self.whole = whole
        self.attributes, self._alive = _attributes(layer, whole)
        self.tensors = [(id(tensor), _kind(tensor), bits(tensor).clone()) for tensor in _tensors(layer)]

    def is_that_of(self, layer: nn.Module) -> bool:
        tensors = _tensors(layer)
        if len(tensors) != len(self.tensors) or _attributes(layer, self.whole)[0] != self.attributes:
            return False
        for tensor, (identity, kind, content) in zip(tensors, self.tensors, strict=True):
            # What a transform of torch.func carries through has its own derivative, which the layer has to derive.
            if _kind(tensor) != kind or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return False
            # So has a stranger in the place of a parameter, as of torch.func.functional_call.
            if id(tensor) != identity and (tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None):
                return False
            if not torch.equal(bits(tensor), content):
                return False
        return True


def _tensors(layer: nn.Module) -> list[Tensor]:
    # With those of children: a parametrisation moves a weight into one.
    return [*layer.parameters(), *layer.buffers()]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _attributes(layer: nn.Module, whole: bool = False) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """Class and plain attributes of a layer and of the modules inside, such as a stride; and what has to stay alive.

    With ``whole`` all others and forward hooks as well, by identities, which the second list keeps from other objects.
    """
    found: list[tuple[Any, ...]] = []
    alive: list[Any] = []
    for module in layer.modules():
        found.append((type(module),))
        for name, value in vars(module).items():
            if type(value) in _PLAIN:
                if name != "training":
                    found.append((name, value))
            elif whole and name not in _DERIVED:
                held = list(value.values()) if isinstance(value, dict) else [value]
                found.append((name, *map(id, held)))
                alive += held
    return found, alive


_PLAIN = (bool, int, float, str)
_DERIVED = frozenset({"_folded", "_folded_from"})  # these follow from the others
_HALVES = {torch.float16, torch.bfloat16}


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards.

    Blocks may nest and run in several threads at once: modes come back when the last block that holds a module ends,
    so a change of them inside is undone then. A module is in one mode for all threads: training it in one while another
    certifies it is not possible.
    """
    children = list(module.modules())
    with _LOCK:
        for child in children:
            blocks, mode = _HELD.get(child, (0, child.training))
            _HELD[child] = blocks + 1, mode
        module.eval()
    try:
        yield
    finally:
        with _LOCK:
            for child in children:
                blocks, mode = _HELD.pop(child)
                if blocks > 1:
                    _HELD[child] = blocks - 1, mode
                else:
                    child.training = mode  # not train(), which would reach the children as well


def exact_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy for evaluation that computes in ``dtype`` with the very weights that ``module`` derives in its own.

    Casting the parameters instead would derive other weights: a better orthonormalisation is another network.
    """
    copy = deepcopy(module).eval()
    with torch.no_grad(), full_precision(), evaluation_mode(module):
        for original, child in list(zip(module.modules(), copy.modules(), strict=True)):
            if isinstance(original, FoldedLayer) and isinstance(child, FoldedLayer):
                child.pin(tuple(weight.to(dtype) for weight in original.weights()))
    return copy.to(dtype).requires_grad_(False)


def unfreeze(module: nn.Module) -> None:
    """Forget what :func:`freeze` folded; the mode stays."""
    for child in module.modules():
        if isinstance(child, FoldedLayer):
            child.unfold()


def freeze(module: nn.Module) -> nn.Module:
    """Put a module into evaluation mode and fold the derived weights of all its layers; returns the module."""
    module.eval()
    for child in module.modules():
        if isinstance(child, LipschitzLayer):
            child.freeze()
    return module
