"""Norm-preserving changes of shape: every one is an isometry, drops coordinates, or pools them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.layers.base import LipschitzLayer
from lipsim.utils.errors import LipsimError


class ChannelPadding(LipschitzLayer):
    """Append zero channels: ``(N, C, H, W) → (N, channels, H, W)``, an isometry.

    On a processor the result is laid out pixel by pixel, which the convolutions after it keep: those of the published
    network are 1.5 to 2 times as fast then (``benchmarks/README.md``).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        if channels < in_channels:
            raise LipsimError(f"expected at least {in_channels} channels to pad to, got {channels}")
        self.added = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return F.pad(x.movedim(-3, -1), (0, self.added)).movedim(-1, -3)
        return F.pad(x, (0, 0, 0, 0, 0, self.added))

    def lipschitz_bound(self) -> float:
        return 1.0


class SpaceToDepth(LipschitzLayer):
    """Move each ``block × block`` patch into channels, ``(N, C, H, W) → (N, C·block², H/block, W/block)``.

    Invertible down-sampling (Jacobsen et al. 2018, i-RevNet): a permutation of coordinates, hence an isometry.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.block)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return str(self.block)


class ChannelShift(LipschitzLayer):
    """Roll four groups of channels by one pixel, down, up, right and left; the other channels stay.

    A permutation of the coordinates of ``(N, C, H, W)``, since what leaves on one side returns on the other, hence an
    isometry. Shifts in place of spatial kernels: Wu et al. 2018.

    Args:
        channels: number of channels ``C``.
        share: of the channels that move, in [0, 1]; the last ones.

    Raises:
        ValueError: another share.
    """

    def __init__(self, channels: int, share: float = 0.5) -> None:
        super().__init__()
        # Files of earlier versions hold shares a little above 1, of which no group is larger for it.
        if not (0 <= share and int(channels * share / 4) <= channels // 4):
            raise LipsimError(f"expected a share in [0, 1], got {share}")
        group = int(channels * share / 4)
        self.groups = [channels - 4 * group, *[group] * 4]

    def forward(self, x: Tensor) -> Tensor:
        stay, down, up, right, left = x.split(self.groups, dim=1)
        return torch.cat([stay, down.roll(1, 2), up.roll(-1, 2), right.roll(1, 3), left.roll(-1, 3)], dim=1)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"{sum(self.groups)}, moving={sum(self.groups[1:])}"


class ScaledAvgPool2d(LipschitzLayer):
    """Mean over ``block × block`` windows times ``block``, the norm-preserving scale on constant windows.

    The rows of this map are orthonormal (entries ``1/block``), so its norm is exactly 1. Pixels that fill no window are
    dropped.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.block) * self.block

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return str(self.block)


class L2NormPool2d(LipschitzLayer):
    """Euclidean norm of each ``block × block`` window, ``(N, C, H, W) → (N, C, H/block, W/block)``.

    Preserves the norm of the input, and is 1-Lipschitz by the triangle inequality. Windows of zeros have gradient 0.
    Pixels that fill no window are dropped.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        height, width = (size // self.block * self.block for size in x.shape[2:])
        windows = F.pixel_unshuffle(x[:, :, :height, :width], self.block).unflatten(1, (x.shape[1], -1))
        # Scaled by the largest entry: squares of small numbers vanish. A window of zeros is divided by 1.
        largest = windows.detach().abs().amax(2, keepdim=True)
        scale = torch.where(largest > 0, largest, 1.0)
        squares = (windows / scale).square().sum(2)
        positive = squares > 0
        return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0) * scale.squeeze(2)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return str(self.block)


class Centering(LipschitzLayer):
    """Subtract a constant from every value: images in [0, 1] become centred, distances stay."""

    def __init__(self, offset: float = 0.5) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x - self.offset

    def lipschitz_bound(self) -> float:
        return 1.0


class Truncation(LipschitzLayer):
    """Keep the first ``features`` of ``(N, D)``.

    Raises:
        ValueError: the input has fewer features; the published network would silently return them.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.features:
            raise LipsimError(f"expected at least {self.features} features, got {x.shape[-1]}")
        return x[..., : self.features]

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return str(self.features)
