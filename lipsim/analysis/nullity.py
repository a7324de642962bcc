"""Nullity: how many weights of a network have a kernel, and how large (Ozbulak et al., Exact Feature Collisions).

The published table counts the weights of layers, unfolded to matrices: what one window cannot see. What an image can
lose is the kernel of the operator (:mod:`lipsim.analysis.operator_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.layers.base import FoldedLayer
from lipsim.layers.explicit import FoldedResidualConv2d, FoldedResidualLinear
from lipsim.layers.norms import scaled
from lipsim.utils.errors import LipsimError

_EPS = torch.finfo(torch.float32).eps  # of the dtype that the published table was computed in


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
    layers), and the layers of this package in their place. Norms and transposed convolutions do not count. A layer that
    standardises its weight, as some of timm do, has it here as it is stored.
    """
    inside: set[nn.Module] = set()  # layers that only derive the weight of another one
    for name, module in network.named_modules():
        kind = type(module).__name__
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, kind, module.weight.flatten(1)
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, part)
                if weight is not None:
                    yield f"{name}.{part}", kind, weight
        elif isinstance(module, FoldedResidualLinear | FoldedResidualConv2d):
            weight = module.weight if isinstance(module, FoldedResidualLinear) else module.kernel
            yield name, kind, weight.flatten(1)
        elif isinstance(module, FoldedLayer):
            inside.update(module.modules())
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
    matrix, scale = scaled(matrix)  # squares may neither overflow nor vanish
    if not scale:
        return 0
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


def summary(found: Nullity) -> dict[str, Any]:
    """The same as JSON, with every layer."""
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
    }
