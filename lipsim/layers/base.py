"""What every 1-Lipschitz layer of this package offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Self

import torch
from torch import Tensor, nn

from lipsim.precision import full_precision


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

    What was folded is used in evaluation mode only, and only while the parameters are the same: an optimizer step, a
    loaded state or a move to another device or dtype makes the layer derive its weights again.
    """

    def __init__(self) -> None:
        super().__init__()
        # Plain attributes, not buffers: checkpoints hold the parameters only.
        self._folded: tuple[Tensor, ...] = ()
        self._folded_from: tuple[tuple[int, int], ...] = ()
        self._pinned = False

    @abstractmethod
    def derive(self) -> tuple[Tensor, ...]:
        """The weights that ``forward`` uses, computed from the parameters."""

    def weights(self) -> tuple[Tensor, ...]:
        """The folded weights where they are still valid, else freshly derived ones."""
        return self._folded if self._fold_is_valid() else self.derive()

    def _fold_is_valid(self) -> bool:
        if self._pinned:
            return True
        return not self.training and bool(self._folded) and self._folded_from == self._parameter_versions()

    def freeze(self) -> Self:
        if not self._pinned:
            self.eval()
            # Attacks differentiate through folded weights, which tensors made in inference mode do not allow.
            with torch.inference_mode(False), torch.no_grad(), full_precision():
                self._folded = tuple(weight.detach() for weight in self._derive_for_good())
            self._folded_from = self._parameter_versions()
        return self

    def _derive_for_good(self) -> tuple[Tensor, ...]:
        return self.derive()

    def pin(self, weights: tuple[Tensor, ...]) -> None:
        """Use these weights for good, whatever the parameters; see :func:`exact_copy`."""
        self._folded, self._pinned = weights, True

    def unfold(self) -> None:
        """Forget the folded weights. Fused optimizers change parameters without counting a version."""
        if not self._pinned:
            self._folded = ()

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.unfold()
        return super().train(mode)

    def _parameter_versions(self) -> tuple[tuple[int, int], ...]:
        return parameter_versions(self, recurse=False)


def parameter_versions(module: nn.Module, recurse: bool = True) -> tuple[tuple[int, int], ...]:
    """Where the parameters lie and how often they were changed in place: different after nearly every change.

    Tensors made in inference mode have no version, and fused optimizers and writes to ``.data`` count none.
    """
    return tuple(_version(tensor) for tensor in (*module.parameters(recurse), *module.buffers(recurse)))


def _version(tensor: Tensor) -> tuple[int, int]:
    try:
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
    except RuntimeError:  # inside a transform of torch.func, where tensors have no storage: matches nothing
        return id(tensor), -2


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True  # not train(), which would reach the children as well
            if isinstance(child, FoldedLayer):
                child.unfold()


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
