"""What students are: layers one after the other."""

from __future__ import annotations

from typing import overload

from torch import nn


class LayerSequence(nn.Sequential):
    """Layers one after the other, with a constructor of its own; a slice of them is a plain ``nn.Sequential``.

    A slice of ``nn.Sequential`` is made by the constructor of its class, which takes sizes here and no layers.

    Example:
        >>> import torch
        >>> from lipsim.students import OrthogonalShiftNetwork
        >>> student = OrthogonalShiftNetwork(image_size=32, out_features=64)
        >>> student[:1](torch.rand(2, 3, 32, 32)).shape[0]
        2
    """

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    def __getitem__(self, index: slice | int) -> nn.Module:
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)
