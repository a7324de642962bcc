"""Small classifiers of several architectures, for images of some 32 pixels: what the analyses compare sets by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.analysis.models import Normalized
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import cpu_seed


class _Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, out_channels, stride=stride), nn.ReLU(), *_convolution(out_channels, out_channels)
        )
        same = stride == 1 and channels == out_channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_convolution(channels, out_channels, 1, stride=stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class _Inverted(nn.Module):
    """A wide depthwise convolution between two of one pixel (Sandler et al. 2018)."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int = 3) -> None:
        super().__init__()
        wide = expansion * channels
        self.body = nn.Sequential(
            *_convolution(channels, wide, 1),
            nn.ReLU6(),
            *_convolution(wide, wide, stride=stride, groups=wide),
            nn.ReLU6(),
            *_convolution(wide, out_channels, 1),
        )
        self.same = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.body(x)
        return x + change if self.same else change


class _Dense(nn.Module):
    """Convolutions that each see all that the ones before gave (Huang et al. 2017)."""

    def __init__(self, channels: int, growth: int, depth: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1, bias=False))
            for width in range(channels, channels + depth * growth, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.cat([x, part(x)], 1)
        return x


class _Mixing(nn.Module):
    """One hidden layer over the positions, one over the channels of tokens ``(N, T, D)`` (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.first_norm(x).mT).mT
        mixed: Tensor = x + self.over_channels(self.second_norm(x))
        return mixed


class _Patches(nn.Module):
    """Image to tokens ``(N, T, D)``, one for each patch."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.projection(x).flatten(2).mT
        return tokens


class _Mean(nn.Module):
    """Mean over the positions: ``(N, D, H, W)`` or, with ``dim`` 1, tokens ``(N, T, D)`` to ``(N, D)``."""

    def __init__(self, dim: int | tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


def _convolution(
    channels: int, out_channels: int, side: int = 3, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, side, stride, side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


def _resnet(classes: int, width: int, _size: int) -> nn.Module:
    return nn.Sequential(
        *_convolution(3, width, stride=2),
        nn.ReLU(),
        _Residual(width, width, 1),
        _Residual(width, 2 * width, 2),
        _Residual(2 * width, 4 * width, 2),
        _Mean(),
        nn.Linear(4 * width, classes),
    )


def _vgg(classes: int, width: int, _size: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for out_channels in (width, 2 * width, 4 * width):
        layers += [*_convolution(channels, out_channels), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out_channels
    layers += [*_convolution(channels, channels), nn.ReLU(), _Mean(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


def _mobilenet(classes: int, width: int, _size: int) -> nn.Module:
    return nn.Sequential(
        *_convolution(3, width, stride=2),
        nn.ReLU6(),
        _Inverted(width, width, 1),
        _Inverted(width, 2 * width, 2),
        _Inverted(2 * width, 4 * width, 2),
        _Inverted(4 * width, 4 * width, 1),
        _Mean(),
        nn.Linear(4 * width, classes),
    )


def _densenet(classes: int, width: int, _size: int) -> nn.Module:
    layers: list[nn.Module] = _convolution(3, width, stride=2)
    channels = width
    for block in range(3):
        layers.append(_Dense(channels, width, 2))
        channels += 2 * width
        if block < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), _Mean(), nn.Linear(channels, classes))


def _mixer(classes: int, width: int, size: int) -> nn.Module:
    channels, tokens = 4 * width, (size // 4) ** 2
    blocks = [_Mixing(tokens, channels) for _ in range(2)]
    return nn.Sequential(_Patches(channels, 4), *blocks, nn.LayerNorm(channels), _Mean(1), nn.Linear(channels, classes))


def _alexnet(classes: int, width: int, _size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2 * width, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )


def _mlp(classes: int, width: int, size: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    features = 3 * size**2
    for _ in range(2):
        layers += [nn.Linear(features, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU()]
        features = 16 * width
    return nn.Sequential(*layers, nn.Linear(features, classes))


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet": _resnet,
    "vgg": _vgg,
    "mobilenet": _mobilenet,
    "densenet": _densenet,
    "mixer": _mixer,
    "alexnet": _alexnet,
    "mlp": _mlp,
}


def small_network(
    architecture: str, num_classes: int, *, image_size: int = 32, width: int = 16, seed: int = 0
) -> nn.Module:
    """A classifier of images ``(N, 3, S, S)`` in [0, 1] with random weights; far smaller than what its name recalls.

    Args:
        architecture: of :data:`ARCHITECTURES`.
        num_classes: of its logits.
        image_size: side ``S``, at least 16.
        width: channels at first.
        seed: of the weights.

    Raises:
        ValueError: an unknown architecture, or images that are too small.
    """
    if architecture not in ARCHITECTURES or image_size < 16:
        raise LipsimError(
            f"expected one of {', '.join(ARCHITECTURES)} for images of at least 16 pixels, got {architecture!r} for "
            f"{image_size}"
        )
    with cpu_seed(seed):
        network = ARCHITECTURES[architecture](num_classes, width, image_size)
    # A third faster on a CPU.
    if width >= 8:
        # Below, oneDNN 3.12 on AVX2 writes past the gradient of a strided 1 × 1 kernel in this layout.
        network = network.to(memory_format=torch.channels_last)
    return Normalized(network, (0.5,), (0.25,))
