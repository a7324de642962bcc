"""Linear maps with orthonormal rows: they preserve the norm of what they keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer


class OrthogonalLinear(FoldedLayer):
    """Affine map ``(N, in) → (N, out)`` whose weight has orthonormal rows (``out ≤ in``).

    The weight is the Cholesky-QR factor of an unconstrained parameter, ``Q = L^{-1} P`` with ``P Pᵀ = L Lᵀ``: two
    matrix products and a small triangular solve, where Householder QR walks over the columns. Its loss of orthogonality
    grows with the squared condition number of ``P``; :meth:`lipschitz_bound` measures what is really left.

    Args:
        in_features: size of the input.
        out_features: size of the output, at most ``in_features``.
        bias: whether to add a learned bias.

    Raises:
        ValueError: ``out_features > in_features``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if out_features > in_features:
            raise ValueError(f"expected out_features ≤ in_features = {in_features}, got {out_features}")
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # A Gaussian matrix of rank r ≤ n is close to orthonormal up to scale; the exact QR start costs seconds at 224
        # pixels and one Cholesky-QR step removes the difference anyway.
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def derive(self) -> tuple[Tensor]:
        """The orthonormal rows ``Q``, ``(out, in)``."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight.float() if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight
            gram = (weight @ weight.mT).double()
            factor = torch.linalg.cholesky(gram)
            inverse = torch.linalg.solve_triangular(factor, torch.eye(len(gram)).to(gram), upper=False)
            return (inverse.to(weight.dtype) @ weight,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights()[0], self.bias)

    def lipschitz_bound(self) -> float:
        (q,) = self.weights()
        q = q.detach().double()
        # λ_max of the small Gram matrix; the margin covers the rounding of a float64 product and eigensolver.
        largest = float(torch.linalg.eigvalsh(q @ q.mT)[-1])
        return (largest + q.numel() * 2.3e-16) ** 0.5 * (1 + 1e-12)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}"
