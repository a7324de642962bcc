"""Nullity: how much of its input each linear operator cannot see (Ozbulak et al., Exact Feature Collisions).

The published table counts the weights of layers, unfolded to matrices. What an image can lose is the kernel of the
*operator*: the convolution on images of a given size, whose overlapping windows see far more than one window does. Both
are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.layers.base import FoldedLayer
from lipsim.utils.errors import LipsimError

_EPS = torch.finfo(torch.float32).eps  # of the dtype that the published table was computed in
# Iterations of conjugate gradients, and the relative residual at which a random vector counts as reached. Of n
# coordinates one that is missed keeps about 1/√n of its norm, thousandths for an image. Float32 is tried first.
_SEARCHES = {torch.float32: (100, 1e-5), torch.float64: (400, 1e-6)}
_DENSE = 1024  # coordinates of an input up to which the whole matrix is taken
_Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], torch.Size]


@dataclass(frozen=True)
class LayerNullity:
    """A weight as a matrix.

    Attributes:
        name: of the layer in the network.
        kind: its class.
        rows: outputs, ``C_out``.
        cols: inputs of one window, ``C_in/groups · kh · kw``.
        rank: number of singular values above ``max(rows, cols) · ε · σ_max`` with the ε of float32.
    """

    name: str
    kind: str
    rows: int
    cols: int
    rank: int

    @property
    def nullity(self) -> int:
        """Dimension of the kernel, ``cols − rank``."""
        return self.cols - self.rank


@dataclass(frozen=True)
class Nullity:
    """A row of the published table (Ozbulak et al., Table 1), and the layers that it counts.

    Attributes:
        model: name of the network.
        layers: of its weights, in the order of its modules.
        parameters: of the network.
    """

    model: str
    layers: tuple[LayerNullity, ...]
    parameters: int

    @property
    def n(self) -> int:
        """Number of weights."""
        return len(self.layers)

    @property
    def nu(self) -> int:
        """ν, how many of them have a kernel."""
        return sum(layer.nullity > 0 for layer in self.layers)

    @property
    def mu(self) -> int:
        """μ, how many must have one: fewer rows than columns."""
        return sum(layer.rows < layer.cols for layer in self.layers)

    @property
    def sum_nullity(self) -> int:
        """Sum of all nullities."""
        return sum(layer.nullity for layer in self.layers)

    @property
    def first_nullity(self) -> int:
        """Nullity of the first weight."""
        return self.layers[0].nullity

    def percent(self, count: int) -> int:
        """``count`` of the weights in percent, rounded down as in the published table."""
        return 100 * count // self.n


def layer_matrices(network: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and unfolded weight ``(C_out, C_in/groups · kh · kw)`` of every layer that the published table counts.

    These are ``Conv2d`` and ``Linear``, the projections inside ``MultiheadAttention`` (which other libraries have as
    layers), and the layers of this package in their place. Norms and transposed convolutions do not count.
    """
    for name, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, kind, module.weight.flatten(1)
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, part)
                if weight is not None:
                    yield f"{name}.{part}", kind, weight
        elif isinstance(module, FoldedLayer):
            weight = module.weights()[0]
            if weight.ndim in (2, 4):
                yield name, kind, weight.flatten(1)


def rank(matrix: Tensor) -> int:
    """Number of singular values above ``max(rows, cols) · ε · σ_max``, with the ε of float32.

    From the eigenvalues of the smaller Gram matrix in float64: the threshold squared is far above what they round.

    Raises:
        ValueError: entries that are not finite.
    """
    matrix = matrix.detach().double()
    if not torch.isfinite(matrix).all():
        raise LipsimError("a weight is NaN or infinite, and has no rank")
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues = torch.linalg.eigvalsh(gram)
    threshold = (max(matrix.shape) * _EPS) ** 2 * float(eigenvalues[-1])
    return int((eigenvalues > max(threshold, 0.0)).sum())


def nullity(network: nn.Module, name: str = "", say: Callable[[str], None] = lambda _: None) -> Nullity:
    """Count the weights of a network and their kernels, as the published Table 1 does.

    Args:
        network: any torch module.
        name: what the table calls it.
        say: hears which layer is being looked at.

    Raises:
        ValueError: it has no Conv2d or Linear, or weights that are not finite.
    """
    layers = []
    with torch.no_grad():
        for layer, kind, matrix in layer_matrices(network):
            say(layer)
            layers.append(LayerNullity(layer, kind, len(matrix), matrix.shape[1], rank(matrix)))
    if not layers:
        raise LipsimError(f"{name or type(network).__name__} has no Conv2d or Linear, and so no nullity")
    return Nullity(name or type(network).__name__, tuple(layers), sum(p.numel() for p in network.parameters()))


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
    inputs = layer.in_channels * height * width
    ranks, basis = _row_spaces(layer)
    shape = (layer.in_channels, height, width)
    operators = {dtype: _operator(_with_weight(layer, basis.to(dtype)), shape) for dtype in _SEARCHES}
    forward, adjoint, output = operators[torch.float64]
    x = torch.randn(1, layer.in_channels, height, width, dtype=torch.float64, generator=_generator(seed))
    y = torch.randn(output, dtype=torch.float64, generator=_generator(seed + 1))
    reads, gives = adjoint(y) != 0, forward(x) != 0
    unseen, positions = int((~reads).sum()), output[-2] * output[-1]
    seen, carried = inputs - unseen, int(gives.sum())
    least = unseen + max(0, seen - carried)
    if _windows_are_apart(layer):
        covered = positions * layer.in_channels * math.prod(layer.kernel_size)
        least = most = inputs - covered + positions * (covered // positions - sum(ranks))
    elif inputs <= _DENSE:
        unit = torch.eye(inputs, dtype=torch.float64).view(inputs, layer.in_channels, height, width)
        least = most = inputs - int(torch.linalg.matrix_rank(forward(unit).flatten(1)))
    elif _is_reached(operators, x * reads, of_adjoint=True) if seen <= carried else _is_reached(operators, y * gives):
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

    Outputs that depend on each other carry nothing of their own; the kernel is that of the rows.
    """
    ranks, bases = [], []
    for part in layer.weight.detach().double().cpu().chunk(layer.groups):
        matrix = part.flatten(1)
        count = rank(matrix)
        basis = torch.zeros_like(part)
        if count:
            rows = torch.linalg.svd(matrix, full_matrices=False)[2][:count]
            basis[:count] = rows.view(-1, *part.shape[1:])
        ranks.append(count)
        bases.append(basis)
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


def _is_reached(operators: dict[torch.dtype, _Operator], target: Tensor, of_adjoint: bool = False) -> bool:
    """Whether ``target`` lies in the range of the operator, or of its adjoint; float32 may say so, float64 decides."""
    for dtype, (iterations, goal) in _SEARCHES.items():
        forward, adjoint, _ = operators[dtype]
        first, second = (forward, adjoint) if of_adjoint else (adjoint, forward)
        if _residual(lambda u, a=first, b=second: b(a(u)), target.to(dtype), iterations, goal) <= goal:  # type: ignore[misc]
            return True
    return False


def _residual(gram: Callable[[Tensor], Tensor], target: Tensor, iterations: int, goal: float) -> float:
    """How closely conjugate gradients solve ``gram(u) = target``, relative to ``target``; ``gram`` is semidefinite."""
    residual, direction = target.clone(), target.clone()
    start = energy = float(residual.square().sum())
    for _ in range(iterations):
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
        with torch.no_grad():
            model(torch.rand(1, 3, image_size, image_size, generator=_generator(0)).to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, (layer, size) in sizes.items():
        say(name)
        found.append(operator_kernel(layer, size, name))
    return found


def published_row(found: Nullity) -> dict[str, str]:
    """A row as the published Table 1 prints it."""
    return {
        "model": found.model,
        "n": str(found.n),
        "ν": str(found.nu),
        "ν %": str(found.percent(found.nu)),
        "μ": str(found.mu),
        "μ %": str(found.percent(found.mu)),
        "Σ nullity": f"{found.sum_nullity:,}",
        "first": f"{found.first_nullity:,}",
    }


def summary(found: Nullity, operators: Sequence[OperatorKernel] = ()) -> dict[str, Any]:
    """The same as JSON, with every layer and the operators that were looked at."""
    return {
        "model": found.model,
        "n": found.n,
        "nu": found.nu,
        "nu_percent": found.percent(found.nu),
        "mu": found.mu,
        "mu_percent": found.percent(found.mu),
        "sum_nullity": found.sum_nullity,
        "first_nullity": found.first_nullity,
        "parameters": found.parameters,
        "layers": [{**asdict(layer), "nullity": layer.nullity} for layer in found.layers],
        "operators": [{**asdict(operator), "dimension": operator.dimension} for operator in operators],
    }


def width_sweep(
    build: Callable[[int], nn.Module], widths: Sequence[int], say: Callable[[str], None] = lambda _: None
) -> list[tuple[int, Nullity]]:
    """Nullity of one architecture at several widths: wider layers have the larger kernels (their Lemma 2).

    Args:
        build: a width to a network.
        widths: at least one.
        say: hears how far it is.
    """
    found = []
    for width in widths:
        say(f"width {width}")
        found.append((width, nullity(build(width), f"width {width}")))
    return found


@dataclass(frozen=True)
class Correlation:
    """How a measure of nullity goes with the ease of attack over several networks.

    Attributes:
        measure: "ν/n", "μ/n" or "Σ/parameters".
        networks: how many.
        rho: Spearman's rank correlation; NaN where one side is constant.
        p: of a two-sided permutation test.
    """

    measure: str
    networks: int
    rho: float
    p: float


MEASURES: dict[str, Callable[[Nullity], float]] = {
    "ν/n": lambda found: found.nu / found.n,
    "μ/n": lambda found: found.mu / found.n,
    "Σ/parameters": lambda found: found.sum_nullity / found.parameters,
}


def attack_correlation(networks: Sequence[tuple[Nullity, float]], resamples: int = 9999) -> list[Correlation]:
    """Whether nullity predicts how easily networks are attacked, the question that the paper leaves open.

    Args:
        networks: each with its ease of attack, such as the share of images that one budget breaks, or the reciprocal
            of the median length of a minimal perturbation.
        resamples: permutations of the test.

    Raises:
        ValueError: fewer than four networks, of which no order tells anything.
    """
    from scipy import stats  # seconds to import

    if len(networks) < 4:
        raise LipsimError(f"expected at least 4 networks to rank, got {len(networks)}")
    ease = [value for _, value in networks]
    found = []
    for name, measure in MEASURES.items():
        values = [measure(network) for network, _ in networks]
        if len(set(values)) == 1 or len(set(ease)) == 1:
            found.append(Correlation(name, len(networks), math.nan, math.nan))
            continue

        def statistic(order: Any, values: list[float] = values) -> float:
            return float(stats.spearmanr(order, values).statistic)

        test = stats.permutation_test(
            (ease,), statistic, permutation_type="pairings", n_resamples=resamples, rng=0, vectorized=False
        )
        found.append(Correlation(name, len(networks), float(test.statistic), float(test.pvalue)))
    return found
