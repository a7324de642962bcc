"""The published student, implemented as its formulas read: what ``students.py`` compares with.

Nothing is folded or fused: every forward pass computes ``|W Wᵀ|`` again, and the way back is a transposed convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PublishedConv(nn.Module):
    """``x − 2 Wᵀ T relu(W x + b)`` on images."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inner, channels, 3, 3) / (channels * 9) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(1, inner, 1, 1))
        self.q = nn.Parameter(torch.zeros(inner))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        inner = F.relu(F.conv2d(x, self.kernel, padding=1) + self.bias)
        gram = F.conv2d(self.kernel, self.kernel, padding=2).abs().sum((2, 3))
        q = torch.exp(self.q)
        scale = 1 / (gram * q[None, :] / q[:, None]).sum(1)
        return x - 2 * F.conv_transpose2d(scale.view(1, -1, 1, 1) * inner, self.kernel, padding=1)


class PublishedLinear(nn.Module):
    """``x − 2 Wᵀ T relu(W x + b)`` on vectors."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, features) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(1, inner))
        self.q = nn.Parameter(torch.zeros(inner))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C)`` to the same shape."""
        inner = F.relu(F.linear(x, self.weight) + self.bias)
        q = torch.exp(self.q)
        scale = 1 / ((self.weight @ self.weight.T).abs() * q[None, :] / q[:, None]).sum(1)
        return x - 2 * F.linear(scale * inner, self.weight.T)


class PublishedNetwork(nn.Module):
    """The published network from images ``(N, 3, S, S)`` to ``(N, out_features)``; defaults are its small preset."""

    def __init__(self, image_size: int = 224, out_features: int = 1792, channels: int = 45, depth: int = 20) -> None:
        super().__init__()
        self.channels, self.out_features = channels, out_features
        self.convs = nn.Sequential(*(PublishedConv(channels, 5) for _ in range(depth)))
        features = channels * (image_size // 16) ** 2
        self.linear = nn.Sequential(*(PublishedLinear(features, 1024) for _ in range(7)))

    def forward(self, x: Tensor) -> Tensor:
        """Images to features."""
        x = self.convs(F.pad(x, (0, 0, 0, 0, 0, self.channels - 3)))
        for _ in range(2):
            x = F.avg_pool2d(x, 4, divisor_override=4)
        return self.linear(x.flatten(1))[:, : self.out_features]


class PlainConvolutions(nn.Module):
    """Plain layers of the shapes of the published network: the floor of what its inference can cost."""

    def __init__(self, image_size: int = 224, out_features: int = 1792, channels: int = 45, depth: int = 20) -> None:
        super().__init__()
        self.channels, self.out_features = channels, out_features
        blocks = (
            (nn.Conv2d(channels, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, channels, 3, padding=1))
            for _ in range(depth)
        )
        self.convs = nn.Sequential(*(layer for block in blocks for layer in block))
        features = channels * (image_size // 16) ** 2
        self.linear = nn.Sequential(
            *(nn.Sequential(nn.Linear(features, 1024), nn.ReLU(), nn.Linear(1024, features)) for _ in range(7))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images to features."""
        x = self.convs(F.pad(x, (0, 0, 0, 0, 0, self.channels - 3)))
        return self.linear(F.avg_pool2d(x, 16).flatten(1))[:, : self.out_features]
