"""Layers of other packages, run on their explicit kernels so that what is bounded is what is computed.

Their classes are free to do anything in ``forward``; here they only derive a weight. Its norm is measured, not taken
from their papers: orthogonium's AOC and deel-torchlip's spectral layers hold up, orthogonium's adaptive SOC does not
(1.002 to 1.005 instead of 1), and the bound says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import _LOCK, FoldedLayer
from lipsim.layers.norms import conv_norm_bound, gram_iteration_bound, matrix_norm_bound
from lipsim.layers.padding import check_padding, check_sides, repeats_rows
from lipsim.utils.errors import LipsimError


class _ExplicitWeight(FoldedLayer):
    """Holds the layer that derives ``weight`` and ``bias``, which it reads like plain attributes.

    In evaluation mode the weights are always folded, without a gradient to the parameters: some sources iterate a
    little further each time they are read, and what is bounded must be what is computed.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def derive(self) -> tuple[Tensor, ...]:
        """The weight, and the bias where there is one."""
        with torch.autocast(next(self.source.parameters()).device.type, enabled=False):
            weight, bias = self.source.weight, self.source.bias
        return (weight,) if bias is None else (weight, bias)  # type: ignore[return-value]

    def _derive_for_good(self) -> tuple[Tensor, ...]:
        # In training mode: sources that iterate there alone would serve the weight of the step before the last. What
        # they iterate on is put back, so that folding again gives the same.
        # What was made in inference mode can be written to in there alone; the fold is of ordinary tensors.
        written_in = any(tensor.is_inference() for _, tensor in self._tensors())
        with torch.inference_mode(written_in):
            state = {name: tensor.clone() for name, tensor in self._tensors()}
            self.source.train()
            weights = tuple(weight.clone() for weight in self.derive())
            self.source.eval()
            for name, tensor in self._tensors():
                tensor.data.copy_(state[name])  # the same values as before, so no version to count
        return tuple(weight.clone() for weight in weights) if written_in else weights

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.source.named_parameters()
        yield from self.source.named_buffers()

    def weights(self) -> tuple[Tensor, ...]:
        if self.training or self._pinned is not None:
            return super().weights()
        with _LOCK:  # another thread may unfold in between
            if not self._fold_is_valid():
                self.freeze()
            return self._folded

    def pin(self, weights: tuple[Tensor, ...]) -> None:
        super().pin(weights)
        # Parametrised weights refuse to change their dtype, and are not needed any more.
        self._modules.pop("source", None)
        # What asks for the dtype of an encoder asks its parameters.
        self.weight = nn.Parameter(weights[0], requires_grad=False)


class ExplicitConv2d(_ExplicitWeight):
    """A convolution with an explicit, derived kernel, bounded by the norm of this kernel.

    Args:
        source: ``nn.Conv2d`` or a subclass of it; its ``forward`` is not used.

    Raises:
        ValueError: padding other than zeros, or circular padding that repeats rows of the operator; in ``forward``, a
            circular image whose sides are no multiples of the stride.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        if not isinstance(source, nn.Conv2d):
            raise LipsimError(f"expected an nn.Conv2d or a subclass of it, got {type(source).__name__}")
        super().__init__(source)
        reach = [(taps - 1) * step for taps, step in zip(source.kernel_size, source.dilation, strict=True)]
        if source.padding == "same":
            before = [extent // 2 for extent in reach]
            after = [extent - extent // 2 for extent in reach]
        else:
            before = after = [0, 0] if isinstance(source.padding, str) else list(source.padding)
        self.pads = (before[1], after[1], before[0], after[0])
        check_padding(source.padding_mode, [a + b for a, b in zip(before, after, strict=True)], reach)
        self.circular = source.padding_mode == "circular"
        self.options: dict[str, Any] = {
            "stride": source.stride,
            "dilation": source.dilation,
            "groups": source.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.circular:
            check_sides(x, self.options["stride"])
        x = F.pad(x, self.pads, mode="circular" if self.circular else "constant") if any(self.pads) else x
        weight, *bias = self.weights()
        return F.conv2d(x, weight, bias[0] if bias else None, **self.options)

    def lipschitz_bound(self) -> float:
        weight = self.weights()[0]
        steps, (left, right, top, bottom) = self.options["dilation"], self.pads
        reach = [(taps - 1) * step for taps, step in zip(weight.shape[2:], steps, strict=True)]
        if repeats_rows("circular" if self.circular else "zeros", [top + bottom, left + right], reach):
            return math.inf  # edited since: rows of the operator repeat
        return conv_norm_bound(weight, **self.options)


class ExplicitLinear(_ExplicitWeight):
    """An affine map with an explicit, derived weight, bounded by the norm of this weight.

    Args:
        source: ``nn.Linear`` or a subclass of it; its ``forward`` is not used.
    """

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source)

    def forward(self, x: Tensor) -> Tensor:
        weight, *bias = self.weights()
        return F.linear(x, weight, bias[0] if bias else None)

    def lipschitz_bound(self) -> float:
        return matrix_norm_bound(self.weights()[0])


class AOCConv2d(ExplicitConv2d):
    """Adaptive orthogonal convolution (Boissin et al. 2025) of the package orthogonium, ``pip install lipsim[aoc]``.

    Orthogonal with circular padding; zero padding loses norm at the border only.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel, at least ``stride``.
        stride: of the convolution.
        padding: pixels on each side; default half of what the kernel overlaps.
        padding_mode: "zeros" or "circular".
        bias: whether to add a learned bias.

    Raises:
        ValueError: orthogonium is not installed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        try:
            from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
        except ImportError as error:
            raise LipsimError("AOCConv2d needs the package orthogonium: pip install 'lipsim[aoc]'") from error
        super().__init__(
            AdaptiveOrthoConv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=(kernel_size - stride + 1) // 2 if padding is None else padding,
                padding_mode=padding_mode,
                bias=bias,
            )
        )


class _Bjorck(nn.Module):
    """The Björck iteration of torchlip's layers, on a weight scaled to where it converges.

    Each singular value ``σ`` becomes ``1.5σ − 0.5σ³``, which tends to 1 for ``0 < σ < √3`` and to infinity beyond. The
    spectral norm before it is one step of a power iteration, a lower bound, and a step of Adam changes a wide matrix by
    more than that can follow: at a rate of 0.002, ``σ`` was 2.3 after the first and the weights NaN after the second.

    Args:
        original: what it takes the place of, ``_BjorckNorm`` of torchlip.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.eps: float = original.eps
        self._w_bjorck: Tensor
        self.register_buffer("_w_bjorck", original._w_bjorck)  # under torchlip's name: files hold it

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return self._w_bjorck
        from deel.torchlip.normalizers import bjorck_normalization

        # A bound from above. Without a gradient: the iteration takes any scale out again.
        bound = gram_iteration_bound(weight.detach().flatten(1)[..., None, None])
        orthonormal: Tensor = bjorck_normalization(weight * (1.5 / bound).clamp(max=1), self.eps)
        self._w_bjorck = orthonormal.data
        return orthonormal


def _convergent(source: nn.Module) -> Any:
    """A spectral layer of torchlip with its Björck iteration replaced by :class:`_Bjorck`."""
    parametrizations: Any = source.parametrizations.weight  # type: ignore[union-attr]
    for i, parametrization in enumerate(parametrizations):
        if hasattr(parametrization, "_w_bjorck"):
            parametrizations[i] = _Bjorck(parametrization)
    return source


class SpectralConv2d(ExplicitConv2d):
    """Spectrally normalised convolution of deel-torchlip (Serrurier et al. 2021), zero-padded to the input's size.

    Its Björck iteration makes the kernel orthonormal as a matrix, which is the operator for ``kernel_size`` 1 (norm
    1.000); a 3 × 3 one is divided by a bound of what overlaps, and about 0.63 of the budget is left.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = True) -> None:
        from deel import torchlip

        if kernel_size % 2 != 1:
            raise LipsimError(f"expected an odd kernel_size, got {kernel_size}")
        source = torchlip.SpectralConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        super().__init__(_convergent(source))


class SpectralLinear(ExplicitLinear):
    """Spectrally normalised affine map of deel-torchlip: power iteration, then Björck towards orthonormal rows.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        from deel import torchlip

        super().__init__(_convergent(torchlip.SpectralLinear(in_features, out_features, bias=bias)))
