"""The kernel of a convolution as an operator on images of one size: what of an image it cannot see.

A kernel of its weight is one of a window (:mod:`lipsim.analysis.nullity`). Windows overlap, so that what one misses
another sees, and the operator has a smaller kernel, often none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lipsim.analysis.nullity import rank
from lipsim.layers.base import evaluation_mode
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError

# At most so many iterations of conjugate gradients, and the relative residual at which a random vector counts as
# reached. Of n coordinates one that is missed keeps about 1/√n of its norm, thousandths for an image. Float32 is tried
# first. AlexNet's first layer, which the border makes ill-conditioned, takes a thousand.
_SEARCHES = {torch.float32: (100, 1e-5), torch.float64: (3000, 1e-6)}
_PATIENCE = 200  # iterations in which the smallest residual has to halve; what is missed keeps it up
_DENSE = 1024  # coordinates of an input up to which the whole matrix is taken
_ROUNDING = 1e-10  # of the largest entry of an orthonormal row: smaller ones are zeros that rounding filled
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
        layer: the convolution; also one that derives its weight or pads in a way of its own, in evaluation mode.
        size: height and width of its input.
        name: of the layer.
        seed: of the random vectors.

    Raises:
        ValueError: a layer whose output is not that of one convolution of its input, padded.
    """
    kind, (height, width) = type(layer).__name__, size
    shape = (layer.in_channels, height, width)
    inputs = math.prod(shape)
    convolution = _convolution_of(layer, shape)
    weight = convolution.weight
    ranks, basis = _row_spaces(weight, convolution.groups)
    # Where the weight is zero nothing is read: counted without rounding, on weights of 0 and 1.
    _, adjoint, output = _operator(convolution, (weight != 0).float(), shape)
    reads = adjoint(torch.ones(output)) > 0.5
    gives = _operator(convolution, (basis != 0).float(), shape)[0](torch.ones(1, *shape)) > 0.5
    unseen, positions = int((~reads).sum()), output[-2] * output[-1]
    seen, carried = inputs - unseen, int(gives.sum())
    least = unseen + max(0, seen - carried)

    def operator(dtype: torch.dtype) -> _Operator:
        return _operator(convolution, basis.to(dtype), shape)

    if convolution.has_windows_apart:
        covered = positions * layer.in_channels * math.prod(weight.shape[2:])
        least = most = inputs - covered + positions * (covered // positions - sum(ranks))
    elif inputs <= _DENSE:
        unit = torch.eye(inputs, dtype=torch.float64).view(inputs, *shape)
        least = most = inputs - int(torch.linalg.matrix_rank(operator(torch.float64)[0](unit).flatten(1)))
    elif _is_reached(operator, *((reads, True) if seen <= carried else (gives, False)), seed):
        most = least
    else:
        most = unseen + seen - sum(ranks) * _windows_apart(convolution, output[-2:])
    return OperatorKernel(name, kind, size, inputs, len(weight) * positions, unseen, least, most)


@dataclass(frozen=True)
class _Convolution:
    """What a layer computes, but for its bias.

    Attributes:
        weight: float64, as the layer uses it.
        options: stride, padding, dilation and groups.
        pads: in front of it, as ``F.pad`` takes them.
        mode: of these.
    """

    weight: Tensor
    options: dict[str, Any]
    pads: tuple[int, ...]
    mode: str

    @property
    def groups(self) -> int:
        groups: int = self.options["groups"]
        return groups

    @property
    def stride(self) -> tuple[int, int]:
        return _pair(self.options["stride"])

    @property
    def dilation(self) -> tuple[int, int]:
        return _pair(self.options["dilation"])

    @property
    def has_windows_apart(self) -> bool:
        """Whether no two windows overlap and none reaches over the border, as in a patch embedding."""
        unpadded = not any(self.pads) and self.options["padding"] in (0, (0, 0), "valid")
        apart = all(s >= k for s, k in zip(self.stride, self.weight.shape[2:], strict=True))
        return unpadded and apart and self.dilation == (1, 1)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pads, self.mode) if any(self.pads) else x, weight, **self.options)


class _Calls(TorchFunctionMode):
    """Remembers the convolutions that are computed inside: what they are of, and what they give."""

    _NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is F.conv2d:
            given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            self.seen.append((given | dict(zip(self._NAMES, args, strict=False)) | (kwargs or {}), output))
        return output


def _convolution_of(layer: nn.Conv2d, shape: tuple[int, int, int]) -> _Convolution:
    """What a layer computes on inputs ``(C_in, H, W)``, seen while it does: subclasses derive weights and pad.

    Raises:
        ValueError: something else than one convolution of its input, padded.
    """
    calls, parameter = _Calls(), next(layer.parameters())
    ones = torch.ones(1, *shape, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad(), evaluation_mode(layer), calls:
        output = layer(ones)
    found = calls.seen[0] if len(calls.seen) == 1 and output is calls.seen[0][1] else None
    pads = None if found is None else _pads(layer, found[0]["input"], ones)
    if found is None or pads is None:
        raise LipsimError(f"{type(layer).__name__} computes something else than one convolution of its input")
    options = {key: found[0][key] for key in ("stride", "padding", "dilation", "groups")}
    return _Convolution(found[0]["weight"].detach().double().cpu(), options, *pads)


def _pads(layer: nn.Conv2d, padded: Tensor, ones: Tensor) -> tuple[tuple[int, ...], str] | None:
    """How ones were padded, as ``F.pad`` takes it; None where nothing of the kind was done to them."""
    if layer.padding_mode != "zeros":
        pads = tuple(layer._reversed_padding_repeated_twice)
        return (pads, layer.padding_mode) if padded.shape == F.pad(ones, pads).shape else None
    if padded.ndim != 4 or padded.shape[:2] != ones.shape[:2]:
        return None
    lines = [(padded != 0).amax((0, 1, 3 - axis)).nonzero().flatten() for axis in (1, 0)]
    if any(not len(line) for line in lines):
        return None
    pads = tuple(
        int(pad)
        for axis, line in zip((3, 2), lines, strict=True)
        for pad in (line[0], padded.shape[axis] - 1 - line[-1])
    )
    return (pads, "constant") if torch.equal(F.pad(ones, pads), padded) else None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _operator(convolution: _Convolution, weight: Tensor, shape: tuple[int, ...]) -> _Operator:
    """A convolution with another weight, its adjoint, and the shape of its output."""
    with torch.enable_grad():
        primal = torch.zeros(1, *shape, dtype=weight.dtype, requires_grad=True)
        output = convolution(primal, weight)

    def adjoint(y: Tensor) -> Tensor:
        return torch.autograd.grad(output, primal, y, retain_graph=True)[0]

    def forward(v: Tensor) -> Tensor:
        with torch.no_grad():
            return convolution(v, weight)

    return forward, adjoint, output.shape


def _row_spaces(weight: Tensor, groups: int) -> tuple[list[int], Tensor]:
    """Ranks of the groups of a convolution, and orthonormal rows that span what its weight spans, zeros behind them.

    Outputs that depend on each other carry nothing of their own; the kernel is that of the rows. From the eigenvectors
    of the Gram matrix, a tenth of the time of singular vectors.
    """
    ranks, bases = [], []
    for part in weight.chunk(groups):
        matrix = part.flatten(1)
        count = rank(matrix)
        basis = torch.zeros_like(matrix)
        if count:
            wide = len(matrix) <= matrix.shape[1]
            values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
            values, vectors = values[-count:], vectors[:, -count:]
            rows = (vectors / values.sqrt()).T @ matrix if wide else vectors.T
            # A zero that became 1e-17 would be taken for a weight that reads, and conjugate gradients would solve it.
            basis[:count] = rows.where(rows.abs() > _ROUNDING * rows.abs().amax(1, keepdim=True), 0.0)
        ranks.append(count)
        bases.append(basis.view_as(part))
    return ranks, torch.cat(bases)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _windows_apart(convolution: _Convolution, positions: Sequence[int]) -> int:
    """A number of windows that do not overlap, of those that lie inside the input."""
    counts = []
    for i, number in enumerate(positions):
        extent = convolution.dilation[i] * (convolution.weight.shape[2 + i] - 1) + 1
        # At most so many windows on each side reach over the border.
        over = 2 * -(-extent // convolution.stride[i])
        counts.append(max(0, number - over) // -(-extent // convolution.stride[i]))
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
        ValueError: a model that does not take such images, or a layer as in :func:`operator_kernel`.
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
