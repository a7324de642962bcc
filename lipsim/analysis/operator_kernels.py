"""The kernel of a convolution as an operator on images of one size: what of an image it cannot see.

A kernel of its weight is one of a window (:mod:`lipsim.analysis.nullity`). Windows overlap, so that what one misses
another sees, and the operator has a smaller kernel, often none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipsim.analysis.nullity import rank
from lipsim.utils.checks import taking_images

# At most so many iterations of conjugate gradients, and the relative residual at which a random vector counts as
# reached. Of n coordinates one that is missed keeps about 1/√n of its norm, thousandths for an image. Float32 is tried
# first. AlexNet's first layer, which the border makes ill-conditioned, takes a thousand.
_SEARCHES = {torch.float32: (100, 1e-5), torch.float64: (3000, 1e-6)}
_PATIENCE = 200  # iterations in which the smallest residual has to halve; what is missed keeps it up
_DENSE = 1024  # coordinates of an input up to which the whole matrix is taken
_Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], torch.Size]


@dataclass(frozen=True)
class OperatorKernel:
    """The kernel of a convolution as an operator on inputs of one size.

    Attributes:
        name: of the layer.
        kind: its class.
        size: height and width of its input.
        inputs: dimension of the input, ``C_in · H · W``.
        outputs: dimension of the output.
        unseen: coordinates of the input that the operator does not read at all.
        low: the kernel has at least this dimension.
        high: and at most this.
    """

    name: str
    kind: str
    size: tuple[int, int]
    inputs: int
    outputs: int
    unseen: int
    low: int
    high: int

    @property
    def dimension(self) -> int | None:
        """Dimension of the kernel; None where only its bounds are known."""
        return self.low if self.low == self.high else None

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def operator_kernel(layer: nn.Conv2d, size: tuple[int, int], name: str = "", seed: int = 0) -> OperatorKernel:
    """Dimension of the kernel of a convolution on inputs ``(C_in, H, W)``, its padding included.

    Where windows do not overlap and none is padded, the operator is block diagonal and the dimension is counted from
    the rank of the weight. Otherwise a random vector tells, with probability 1: if one of the input lies in the range
    of the adjoint, the operator loses nothing of what it reads; if one of the output lies in the range of the operator,
    it reaches everything, and the kernel has what the outputs are fewer. Conjugate gradients find out. Where
    neither does, or they do not converge (as where as many go in as come out), the dimension is bounded: what outputs
    cannot carry is lost, what windows apart from each other carry is not.

    Args:
        layer: the convolution.
        size: height and width of its input.
        name: of the layer.
        seed: of the random vectors.
    """
    kind, (height, width) = type(layer).__name__, size
    shape = (layer.in_channels, height, width)
    inputs = math.prod(shape)
    ranks, basis = _row_spaces(layer)
    # Where the weight is zero nothing is read: counted without rounding, on weights of 0 and 1.
    forward, adjoint, output = _operator(_with_weight(layer, (basis != 0).float()), shape)
    reads, gives = adjoint(torch.ones(output)) > 0.5, forward(torch.ones(1, *shape)) > 0.5
    unseen, positions = int((~reads).sum()), output[-2] * output[-1]
    seen, carried = inputs - unseen, int(gives.sum())
    least = unseen + max(0, seen - carried)

    def operator(dtype: torch.dtype) -> _Operator:
        return _operator(_with_weight(layer, basis.to(dtype)), shape)

    if _windows_are_apart(layer):
        covered = positions * layer.in_channels * math.prod(layer.kernel_size)
        least = most = inputs - covered + positions * (covered // positions - sum(ranks))
    elif inputs <= _DENSE:
        unit = torch.eye(inputs, dtype=torch.float64).view(inputs, *shape)
        least = most = inputs - int(torch.linalg.matrix_rank(operator(torch.float64)[0](unit).flatten(1)))
    elif _is_reached(operator, *((reads, True) if seen <= carried else (gives, False)), seed):
        most = least
    else:
        most = unseen + seen - sum(ranks) * _windows_apart(layer, output[-2:])
    return OperatorKernel(name, kind, size, inputs, layer.out_channels * positions, unseen, least, most)


def _operator(convolution: nn.Conv2d, shape: tuple[int, ...]) -> _Operator:
    """A convolution without a bias, its adjoint, and the shape of its output."""
    with torch.enable_grad():
        primal = torch.zeros(1, *shape, dtype=convolution.weight.dtype, requires_grad=True)
        output: Tensor = convolution(primal)

    def adjoint(y: Tensor) -> Tensor:
        return torch.autograd.grad(output, primal, y, retain_graph=True)[0]

    def forward(v: Tensor) -> Tensor:
        with torch.no_grad():
            image: Tensor = convolution(v)
            return image

    return forward, adjoint, output.shape


def _row_spaces(layer: nn.Conv2d) -> tuple[list[int], Tensor]:
    """Ranks of the groups of a convolution, and orthonormal rows that span what its weight spans, zeros behind them.

    Outputs that depend on each other carry nothing of their own; the kernel is that of the rows. From the eigenvectors
    of the Gram matrix, a tenth of the time of singular vectors.
    """
    ranks, bases = [], []
    for part in layer.weight.detach().double().cpu().chunk(layer.groups):
        matrix = part.flatten(1)
        count = rank(matrix)
        basis = torch.zeros_like(matrix)
        if count:
            wide = len(matrix) <= matrix.shape[1]
            values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
            values, vectors = values[-count:], vectors[:, -count:]
            basis[:count] = (vectors / values.sqrt()).T @ matrix if wide else vectors.T
        ranks.append(count)
        bases.append(basis.view_as(part))
    return ranks, torch.cat(bases)


def _with_weight(layer: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """A copy of a convolution, with its own padding, another weight and no bias."""
    twin = copy.copy(layer)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    return twin


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _windows_are_apart(layer: nn.Conv2d) -> bool:
    """Whether no two windows overlap and none reaches over the border, as in a patch embedding."""
    plain = type(layer) is nn.Conv2d and layer.padding in ((0, 0), "valid") and layer.dilation == (1, 1)
    return plain and all(s >= k for s, k in zip(layer.stride, layer.kernel_size, strict=True))


def _windows_apart(layer: nn.Conv2d, positions: Sequence[int]) -> int:
    """A number of windows that do not overlap, of those that lie inside the input."""
    counts = []
    for i, number in enumerate(positions):
        extent = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        # At most so many windows on each side reach over the border.
        over = 2 * -(-extent // layer.stride[i])
        counts.append(max(0, number - over) // -(-extent // layer.stride[i]))
    return math.prod(counts)


def _is_reached(operator: Callable[[torch.dtype], _Operator], coordinates: Tensor, of_adjoint: bool, seed: int) -> bool:
    """Whether a random vector on some coordinates lies in the range of the operator, or of its adjoint.

    Float32 may say so; float64 decides.
    """
    target = coordinates * torch.randn(coordinates.shape, dtype=torch.float64, generator=_generator(seed))
    for dtype, (iterations, goal) in _SEARCHES.items():
        forward, adjoint, _ = operator(dtype)
        first, second = (forward, adjoint) if of_adjoint else (adjoint, forward)
        if _residual(lambda u, a=first, b=second: b(a(u)), target.to(dtype), iterations, goal) <= goal:  # type: ignore[misc]
            return True
    return False


def _residual(gram: Callable[[Tensor], Tensor], target: Tensor, iterations: int, goal: float) -> float:
    """How closely conjugate gradients solve ``gram(u) = target``, relative to ``target``; ``gram`` is semidefinite."""
    residual, direction = target.clone(), target.clone()
    start = energy = mark = float(residual.square().sum())
    for iteration in range(iterations):
        if iteration % _PATIENCE == _PATIENCE - 1:
            if energy > mark / 4:
                break
            mark = energy
        if energy <= start * goal**2:
            break
        image = gram(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        residual -= energy / curvature * image
        energy, previous = float(residual.square().sum()), energy
        direction = residual + energy / previous * direction
    return math.sqrt(energy / start) if start else 0.0


def operator_kernels(
    model: nn.Module, image_size: int, say: Callable[[str], None] = lambda _: None
) -> list[OperatorKernel]:
    """The kernels of the first convolution and of every strided one, on what they read of images of one size.

    Args:
        model: takes images ``(N, 3, image_size, image_size)`` in [0, 1].
        image_size: their side.
        say: hears which layer is being looked at.

    Raises:
        ValueError: a model that does not take such images.
    """
    sizes: dict[str, tuple[nn.Conv2d, tuple[int, int]]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...], _output: object) -> None:
            if not sizes or max(layer.stride) > 1:
                sizes.setdefault(name, (layer, (inputs[0].shape[-2], inputs[0].shape[-1])))

        return hook

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(record(name)) for name, module in convolutions]
    parameter = next(model.parameters())
    try:
        image = torch.rand(1, 3, image_size, image_size, generator=_generator(0)).to(parameter)
        with torch.no_grad(), taking_images(type(model).__name__, image):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, (layer, size) in sizes.items():
        say(name)
        found.append(operator_kernel(layer, size, name))
    return found


def kernel_row(model: str, kernel: OperatorKernel) -> dict[str, str]:
    """A row of a table of operators."""
    return {
        "model": model,
        "operator": kernel.name,
        "input": f"{kernel.size[0]}×{kernel.size[1]}",
        "inputs": f"{kernel.inputs:,}",
        "outputs": f"{kernel.outputs:,}",
        "unseen": f"{kernel.unseen:,}",
        "kernel": str(kernel),
    }
