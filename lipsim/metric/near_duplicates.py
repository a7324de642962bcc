"""Distances of near-duplicates to all digits.

The distance of two images is about half the squared length of what their unit features differ by. That difference has
the rounding of both features, 1e-7 of their length in float32, which changes with the batch, as matrix products choose
their order of summation by its size. Where the distance is 1e-6 this is a ten-thousandth of it. So such pairs are
embedded again in float64, with the very weights that the encoder uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipsim.certificates import geometry
from lipsim.layers.base import Source, exact_copy

# The relative error in float32 is 2·η/√(2d), with the error η of a unit feature: 1e-5 at this distance for η = 7e-7,
# where 4e-7 was the most between batches of 1 to 64 photographs.
NEAR = 1e-2


class NearDuplicates:
    """Computes small distances again, and keeps the encoder's copy in float64 that it takes.

    The copy is used for as long as the encoder is what it was when it was made: its modules with their attributes and
    hooks, and all tensors bit by bit. It is no part of a copy of this, nor of a pickle.
    """

    def __init__(self) -> None:
        self._exact: tuple[Source, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NearDuplicates:
        return NearDuplicates()

    def __reduce__(self) -> tuple[Any, ...]:
        return NearDuplicates, ()

    @torch.no_grad()
    def refine(self, distance: Tensor, encoder: nn.Module, x: Tensor, y: Tensor, anchor: float) -> Tensor:
        """The distances with those of near-duplicates computed in float64, and exactly 0 between equal images.

        As they are where something differentiates through them, or runs in less than float32: float64 would not help.

        Args:
            distance: ``(N,)``, as the encoder's features have it.
            encoder: with weights in float32.
            x: images, ``(N, 3, S, S)``, or one.
            y: the others, or one.
            anchor: ``κ``.
        """
        if not _is_plain(distance, x) or any(module.training for module in encoder.modules()):
            return distance
        near = (distance < NEAR).nonzero().flatten()
        if not len(near):
            return distance
        x, y = (images.expand(len(distance), -1, -1, -1)[near] for images in (x, y))
        z, z_other = self._copy(encoder)(torch.cat([x, y]).double()).chunk(2)
        exact = geometry.cosine_distance(z, z_other, anchor)
        exact = torch.where((x == y).flatten(1).all(1), 0.0, exact)
        return distance.index_copy(0, near, exact.to(distance.dtype))

    def _copy(self, encoder: nn.Module) -> nn.Module:
        known = self._exact
        if known is None or not known[0].is_that_of(encoder):
            with torch.inference_mode(False):
                known = Source(encoder, whole=True), exact_copy(encoder)
            self._exact = known
        return known[1]


def _is_plain(distance: Tensor, x: Tensor) -> bool:
    """Whether nothing differentiates, maps or compiles, and the features are of float32 throughout."""
    return (
        not torch.compiler.is_compiling()
        and not distance.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(distance)
        and forward_ad.unpack_dual(distance).tangent is None
        and distance.dtype == x.dtype == torch.float32
        and x.device.type != "mps"  # which has no float64
        and not torch.is_autocast_enabled(x.device.type)
    )
