"""What a metric is built on: an encoder of images, as a contract, and what some encoders offer besides.

Any ``nn.Module`` from images ``(N, 3, S, S)`` to features ``(N, D)`` makes a metric. What it says of itself beyond that
is one of these protocols, which ``isinstance`` tells.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Encoder(Protocol):
    """An encoder that can be described and built again: what files, caches and conversions work with.

    Attributes:
        image_size: side ``S`` of its input.
        out_features: dimension ``D`` of its features.
        config: arguments of its constructor, in the types of JSON
            (:func:`lipsim.utils.arguments.records_arguments` keeps them).
    """

    image_size: int
    out_features: int
    config: dict[str, Any]

    def __call__(self, x: Tensor, /) -> Tensor:
        """Images ``(N, 3, S, S)`` in [0, 1] to features ``(N, D)``."""
        ...


@runtime_checkable
class BoundedEncoder(Encoder, Protocol):
    """An encoder that declares its own Lipschitz bound, where :mod:`lipsim.audit` does not look at its layers."""

    def lipschitz_bound(self) -> float:
        """A proven bound (ℓ2 to ℓ2) for every input, in float64 and rounded up."""
        ...


@runtime_checkable
class ResizingEncoder(Protocol):
    """An encoder that was trained on images resized in one way.

    Attributes:
        resize: "float" or "pil", see :class:`lipsim.data.Preprocess`.
    """

    resize: str


@runtime_checkable
class CheckpointingEncoder(Protocol):
    """An encoder that knows which activations to keep in training, and which to compute again."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block alone, or everything."""
        ...


def declared_image_size(encoder: nn.Module) -> int | float | None:
    """Side of the images that an encoder says it takes; None where it says nothing, or something else than a number."""
    size: Any = getattr(encoder, "image_size", None)  # also through torch.compile, which hands attributes on
    return size if isinstance(size, int | float) else None


def head_of(encoder: nn.Module) -> nn.Module | None:
    """The part behind the backbone that can be tuned alone, a module called ``head``; None where there is none."""
    return dict(encoder.named_children()).get("head")


def first_weight(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, or else buffer, whose dtype and device inputs need; None without any."""
    return next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of the weights, and torch's default where there are none."""
    weight = first_weight(module)
    return torch.get_default_dtype() if weight is None else weight.dtype
