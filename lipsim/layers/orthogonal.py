"""Linear maps with orthonormal rows or columns: they preserve the norm of what they keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer
from lipsim.layers.norms import matrix_norm_bound


class OrthogonalLinear(FoldedLayer):
    """Affine map ``(N, in) → (N, out)`` with orthonormal rows where ``out ≤ in``, and orthonormal columns above.

    The weight is the Cholesky-QR factor of an unconstrained parameter, ``Q = L^{-1} P`` with ``P Pᵀ = L Lᵀ``: two
    matrix products and a small triangular solve, where Householder QR walks over the columns. Its loss of orthogonality
    grows with the squared condition number of ``P``; a second pass, in evaluation only, removes it (CholeskyQR2,
    Fukaya et al. 2014).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # A Gaussian matrix of rank r ≤ n is close to orthonormal up to scale; the exact QR start costs seconds at 224
        # pixels and one Cholesky-QR step removes the difference anyway.
        nn.init.normal_(self.weight, std=max(in_features, out_features) ** -0.5)

    def derive(self) -> tuple[Tensor]:
        """The orthonormal matrix ``Q``, ``(out, in)``."""
        return (orthonormal(self.weight, 1 if self.training else 2),)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights()[0], self.bias)

    def lipschitz_bound(self) -> float:
        return matrix_norm_bound(self.weights()[0])

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}"


class OrthogonalPatches(FoldedLayer):
    """The same orthonormal map of every ``patch × patch`` block, ``(N, C, H, W) → (N, out, H/patch, W/patch)``.

    A convolution whose stride is its kernel size, so its norm is that of one matrix (reshaped kernel orthogonalisation,
    Serrurier et al. 2021, is exact here). A patch of 1 mixes channels. Pixels that fill no patch are dropped.

    Args:
        in_channels: channels ``C`` of the input.
        out_channels: channels of the output; an isometry from ``C·patch²`` on.
        patch: side of a block.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(out_channels, in_channels, patch, patch))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.orthogonal_(self.kernel)

    def derive(self) -> tuple[Tensor]:
        """The orthonormal kernel, ``(out, C, patch, patch)``."""
        return (orthonormal(self.kernel.flatten(1), 1 if self.training else 2).view_as(self.kernel),)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights()[0], self.bias, stride=self.kernel.shape[-1])

    def lipschitz_bound(self) -> float:
        return matrix_norm_bound(self.weights()[0].flatten(1))

    def extra_repr(self) -> str:
        out_channels, in_channels, patch, _ = self.kernel.shape
        return f"{in_channels}, {out_channels}, patch={patch}, bias={self.bias is not None}"


def init_orthogonal_(weight: Tensor) -> Tensor:
    """Fill ``(rows, columns)`` with random orthonormal rows, or columns; large matrices in a fraction of QR's time."""
    rows, columns = sorted(weight.shape)
    if weight.is_meta:
        return weight
    if weight.numel() < 2**20 or 2 * rows > columns:  # small, or a Gaussian matrix is too badly conditioned
        return nn.init.orthogonal_(weight)
    with torch.no_grad():
        return weight.copy_(orthonormal(torch.randn_like(weight, dtype=torch.float64)))


def init_delta_orthogonal_(kernel: Tensor) -> Tensor:
    """Fill ``(out, in, k, k)`` with a random orthonormal matrix at the centre (Xiao et al. 2018, "delta-orthogonal").

    Beside it is noise that only breaks the symmetry between the other taps; more of it would loosen the rescaling of
    the layers here at once, which is exact for orthonormal rows.
    """
    out_channels, in_channels, size, _ = kernel.shape
    with torch.no_grad():
        nn.init.normal_(kernel, std=1e-3 / math.sqrt(in_channels * size**2))
        kernel[:, :, size // 2, size // 2] += nn.init.orthogonal_(torch.empty(out_channels, in_channels))
    return kernel


def orthonormal(weight: Tensor, passes: int = 1) -> Tensor:
    """A matrix with orthonormal rows and the span of ``(out, in)``, or orthonormal columns if ``out > in``.

    Differentiable, in the dtype of the weight, computed in float32 at least. A matrix without full rank has no such
    factor: it gives zeros, which are 1-Lipschitz.
    """
    with torch.autocast(weight.device.type, enabled=False):
        tall = weight.shape[0] > weight.shape[1]
        rows = weight.mT if tall else weight
        rows = rows.float() if weight.dtype in (torch.float16, torch.bfloat16) else rows
        for _ in range(passes):
            rows = _cholesky_qr(rows)
        return (rows.mT if tall else rows).to(weight.dtype)


def _cholesky_qr(rows: Tensor) -> Tensor:
    # The factor does not depend on the scale of the weight, whose square must not overflow or vanish.
    rows = rows / rows.detach().abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    gram = (rows @ rows.mT).double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    failed = torch.linalg.cholesky_ex(gram.detach()).info > 0
    # Replaced without a branch, and before a gradient becomes NaN.
    factor = torch.linalg.cholesky_ex(torch.where(failed, identity, gram)).L
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.where(failed, 0.0, inverse).to(rows.dtype) @ rows
