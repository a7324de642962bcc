"""Linear maps with orthonormal rows or columns: they preserve the norm of what they keep."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer
from lipsim.layers.norms import matrix_norm_bound

_BLOCK = 256  # rows of a Gram matrix at a time
_AT_MOST_SINGLE = {torch.float16, torch.bfloat16, torch.float32}


class OrthogonalLinear(FoldedLayer):
    """Affine map ``(N, in) → (N, out)`` with orthonormal rows where ``out ≤ in``, and orthonormal columns above.

    The weight is the Cholesky-QR factor of an unconstrained parameter, ``Q = L^{-1} P`` with ``P Pᵀ = L Lᵀ``: two
    matrix products and a small triangular solve, where Householder QR walks over the columns. Its loss of orthogonality
    grows with the squared condition number of ``P``; a second pass, in evaluation only, removes it (CholeskyQR2,
    Fukaya et al. 2014). In training with few images ``Q x`` is solved for without ``Q``.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        few, many = sorted((in_features, out_features))
        if 2 * few <= many:
            # A long Gaussian matrix is close to orthonormal up to scale; the exact QR start costs seconds at 224 pixels
            # and one Cholesky-QR step removes the difference anyway.
            nn.init.normal_(self.weight, std=many**-0.5)
        else:  # a square one may have no Cholesky factor in float32, and would be zeros that nothing trains
            init_orthogonal_(self.weight)

    def derive(self) -> tuple[Tensor]:
        """The orthonormal matrix ``Q``, ``(out, in)``."""
        return (orthonormal(self.weight, 1 if self.training else 2),)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_projected(x):
            return F.linear(x, self.weights()[0], self.bias)
        device = x.device.type
        half = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            y = _project(x, self.weight)
            y = y if self.bias is None else y + self.bias
            return y.to(torch.get_autocast_dtype(device) if half else x.dtype)

    def _is_projected(self, x: Tensor) -> bool:
        """Whether training can do without the matrix itself, which a subclass may derive in another way.

        With as many vectors as they are long there is nothing to gain. What dtypes do not go together is left to
        ``F.linear`` to refuse.
        """
        if not self.training or self._pinned is not None:
            return False
        if type(self).derive is not OrthogonalLinear.derive or type(self).weights is not FoldedLayer.weights:
            return False
        dtypes = {x.dtype, self.weight.dtype}
        alike = dtypes <= _AT_MOST_SINGLE if torch.is_autocast_enabled(x.device.type) else len(dtypes) == 1
        out_features, in_features = self.weight.shape
        return alike and out_features <= in_features and x.ndim > 1 and x.shape[:-1].numel() < in_features

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

    Differentiable, in the dtype of the weight, computed in float32 at least. A matrix without full rank, or in float32
    one of a condition number from some 10⁴ on, has no such factor: it gives zeros, which are 1-Lipschitz.
    """
    with torch.autocast(weight.device.type, enabled=False):
        tall = weight.shape[0] > weight.shape[1]
        rows = _at_least_single(weight.mT if tall else weight)
        for _ in range(passes):
            rows = _scaled(rows)
            identity = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
            rows = _solve(rows, identity).to(rows.dtype) @ rows
        return (rows.mT if tall else rows).to(weight.dtype)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """``x Qᵀ`` for ``Q = orthonormal(weight)``, ``(…, in) → (…, out)``, where ``out ≤ in``, as ``L^{-1} (P xᵀ)``.

    Forming ``Q``, and a gradient of its size, would cost more than all the rest of a step with few images.
    """
    with torch.autocast(weight.device.type, enabled=False):
        rows = _scaled(_at_least_single(weight))
        columns = rows @ x.flatten(0, -2).to(rows.dtype).mT
        return _solve(rows, columns.double()).to(rows.dtype).mT.reshape(*x.shape[:-1], len(rows))


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _scaled(rows: Tensor) -> Tensor:
    # The factor does not depend on the scale of the weight, whose square must not overflow or vanish.
    return rows / rows.detach().abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)


def _solve(rows: Tensor, right: Tensor) -> Tensor:
    """``L^{-1} B`` for ``P Pᵀ = L Lᵀ`` and ``B`` in float64; zeros where ``P`` has not full rank."""
    solution, _, exists = _GramSolve.apply(rows, right)
    found: Tensor = solution * exists
    return found


class _GramSolve(torch.autograd.Function):
    """``L^{-1} B`` for the Cholesky factor ``P Pᵀ = L Lᵀ`` of rows ``P``, with a closed form of its backward pass.

    For ``W = L^{-1} B`` and the gradient ``W̄``, that of ``B`` is ``L^{-ᵀ} W̄``, and that of ``P`` is
    ``L^{-ᵀ} C L^{-1} P``, where ``C`` is symmetric with the lower triangle of ``−W̄ Wᵀ``: the rules of the Cholesky
    factorisation (Murray 2016, "Differentiation of the Cholesky decomposition") and of a triangular solve, in which a
    product of triangles cancels. Autograd goes through these one by one, in float64.

    ``L`` is an output too, though nobody reads it: second derivatives reach ``P`` through what the backward pass reads
    of it. The third output is 1, or 0 where there is no factor; ``L`` is the identity then, before a gradient becomes
    NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor, info = torch.linalg.cholesky_ex(_lower_gram(rows).double())
        failed = info > 0
        factor = torch.where(failed, torch.eye(len(rows), dtype=factor.dtype, device=factor.device), factor)
        return _lower(factor, right), factor, (~failed).to(factor.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        solution, factor, exists = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(exists)
        ctx.save_for_backward(inputs[0], solution, factor)
        ctx.save_for_forward(inputs[0], solution, factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, through_factor: Tensor | None, _: None) -> Any:
        # Of operations that are differentiable themselves.
        rows, solution, factor = ctx.saved_tensors
        needs_rows, needs_right = ctx.needs_input_grad
        grad_right = _lower_adjoint(factor, gradient) if needs_right and gradient is not None else None
        if not needs_rows or (gradient is None and through_factor is None):
            return None, grad_right
        with torch.autocast(rows.device.type, enabled=False):
            # Cubic in the rows, so in their own precision.
            factor, terms = factor.to(rows.dtype), []
            if gradient is not None:
                terms.append(-gradient.to(rows.dtype) @ solution.to(rows.dtype).mT)
            if through_factor is not None:
                terms.append(factor.mT @ through_factor.to(rows.dtype))
            product = reduce(torch.add, terms)
            symmetric = _lower_adjoint(factor, product.tril() + product.tril(-1).mT)
            return torch.linalg.solve_triangular(factor, symmetric, upper=False, left=False) @ rows, grad_right

    @staticmethod
    def jvp(ctx: Any, rows_t: Tensor | None, right_t: Tensor | None) -> Any:
        rows, solution, factor = ctx.saved_tensors
        solution_t, factor_t = torch.zeros_like(solution), torch.zeros_like(factor)
        if right_t is not None:
            solution_t = solution_t + _lower(factor, right_t)
        if rows_t is not None:
            with torch.autocast(rows.device.type, enabled=False):
                half = (rows_t @ rows.mT).double()
            inner = _lower(factor, _lower(factor, half + half.mT).mT)
            inner = (inner.tril() + inner.tril(-1)) / 2
            factor_t, solution_t = factor @ inner, solution_t - inner @ solution
        return solution_t, factor_t, None


def _lower(factor: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(factor, right, upper=False)
    return solution


def _lower_adjoint(factor: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, right, upper=True)
    return solution


def _lower_gram(rows: Tensor) -> Tensor:
    """The lower triangle of ``P Pᵀ``, which is all that a Cholesky factorisation reads; blocks beside it are 0."""
    blocks = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] @ rows[: start + _BLOCK].mT
        blocks.append(F.pad(block, (0, len(rows) - block.shape[1])))
    return torch.cat(blocks)
