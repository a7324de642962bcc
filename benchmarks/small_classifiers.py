"""Small classifiers of 32 × 32 images, of many shapes: what the correlation of nullity with attacks ranges over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lipsim.analysis.models import Normalized


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.layers(x)
        return output


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def mlp(widths: Sequence[int]) -> nn.Module:
    """Linear layers of these widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((3 * 32 * 32, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def cnn(width: int, depth: int = 1) -> nn.Module:
    """3 × 3 convolutions, in three stages of doubling width."""
    layers, channels = [_conv(3, width, 3, 2)], width
    for stage in range(2):
        layers += [_conv(channels, channels, 3) for _ in range(depth)]
        layers.append(_conv(channels, 2 * width * 2**stage, 3, 2))
        channels = 2 * width * 2**stage
    return nn.Sequential(*layers, _head(channels))


def separable(width: int) -> nn.Module:
    """Depthwise convolutions and expanding 1 × 1 ones, as in MobileNet: hardly a layer must have a kernel."""
    layers, channels = [_conv(3, width, 3, 2)], width
    for stride in (1, 2, 1, 2):
        out = channels * stride
        layers += [_conv(channels, channels, 3, stride, groups=channels), _conv(channels, out, 1)]
        channels = out
    return nn.Sequential(*layers, _head(channels))


def bottleneck(width: int, blocks: int = 2) -> nn.Module:
    """ResNet's bottlenecks: 1 × 1 convolutions that reduce and expand around a 3 × 3 one."""
    layers: list[nn.Module] = [_conv(3, width, 3, 2)]
    for stage in range(2):
        inner = width // 4
        for _ in range(blocks):
            layers.append(_Residual(_conv(width, inner, 1), _conv(inner, inner, 3), _conv(inner, width, 1)))
        if not stage:
            layers.append(_conv(width, 2 * width, 1, 2))
            width *= 2
    return nn.Sequential(*layers, _head(width))


def vit(width: int, depth: int, patch: int = 4, ratio: float = 2.0) -> nn.Module:
    """A ViT on patches, the mean of its tokens classified."""
    from timm.models.vision_transformer import VisionTransformer

    network: nn.Module = VisionTransformer(
        img_size=32,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // 16,
        mlp_ratio=ratio,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    )
    return network


def mixer(width: int, depth: int, patch: int = 4) -> nn.Module:
    """ConvMixer: patches, then depthwise 5 × 5 and 1 × 1 convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, patch, patch), nn.GELU(), nn.BatchNorm2d(width)]
    for _ in range(depth):
        layers += [_Residual(_conv(width, width, 5, groups=width)), _conv(width, width, 1)]
    return nn.Sequential(*layers, _head(width))


# Name, builder, and the highest rate that it trains well at.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "MLP 64": (lambda: mlp((64,)), 0.05),
    "MLP 256-256": (lambda: mlp((256, 256)), 0.05),
    "MLP 512-512-512": (lambda: mlp((512, 512, 512)), 0.05),
    "MLP 32-256-512": (lambda: mlp((32, 256, 512)), 0.05),
    "CNN 8": (lambda: cnn(8), 0.1),
    "CNN 16": (lambda: cnn(16), 0.1),
    "CNN 32": (lambda: cnn(32), 0.1),
    "CNN 48": (lambda: cnn(48), 0.1),
    "CNN 16, deep": (lambda: cnn(16, 3), 0.1),
    "separable 16": (lambda: separable(16), 0.1),
    "separable 48": (lambda: separable(48), 0.1),
    "bottleneck 32": (lambda: bottleneck(32), 0.1),
    "bottleneck 64": (lambda: bottleneck(64), 0.1),
    "ViT 32, 2 blocks": (lambda: vit(32, 2), 0.2),
    "ViT 64, 2 blocks": (lambda: vit(64, 2), 0.2),
    "ViT 64, 4 blocks": (lambda: vit(64, 4), 0.2),
    "ViT 96, patches of 8": (lambda: vit(96, 3, patch=8), 0.2),
    "ViT 64, wide MLP": (lambda: vit(64, 2, ratio=4), 0.2),
    "mixer 32": (lambda: mixer(32, 3), 0.1),
    "mixer 64": (lambda: mixer(64, 3), 0.1),
}


def build(name: str, seed: int) -> nn.Module:
    """A network of :data:`NETWORKS`, with its own random weights, for images in [0, 1]."""
    torch.manual_seed(seed)
    return Normalized(NETWORKS[name][0](), (0.5,), (0.25,))
