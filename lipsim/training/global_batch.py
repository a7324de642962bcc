"""The global batch: losses of it on any number of processes, and what is made of its size.

Every process returns the loss of all samples, with such a gradient that the mean over processes, which distributed
training takes, is the gradient of that loss: as on one process with as large a batch, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed

from lipsim.utils.errors import LipsimError


@dataclass(frozen=True)
class RateScaling:
    """Scales the learning rate by the global batch against the one that it was chosen for.

    Attributes:
        reference_batch: samples in a step that the configured rate is for.
        rule: "linear", times the ratio (Goyal et al. 2017, with plain gradient descent), or "sqrt", times its root
            (Krizhevsky 2014; Malladi et al. 2022 with Adam).

    Raises:
        ValueError: no such rule, or no batch.

    Example:
        >>> RateScaling(64, "sqrt").factor(256)
        2.0
    """

    reference_batch: int
    rule: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        if self.rule not in ("linear", "sqrt") or self.reference_batch < 1:
            raise LipsimError(
                f"expected the rule linear or sqrt and a reference batch of at least 1, got {self.rule!r} and "
                f"{self.reference_batch}"
            )

    def factor(self, global_batch: int) -> float:
        """What the rate is multiplied by."""
        ratio: float = global_batch / self.reference_batch
        return ratio if self.rule == "linear" else ratio**0.5


def num_processes() -> int:
    """Of the run that this process takes part in."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """The mean over all processes of a loss that each has as a mean, by the sum of its weights.

    Costs the sum of two numbers over processes.

    Args:
        loss: scalar, of this process.
        weight: scalar, of this process; no gradient goes through it.
    """
    if num_processes() == 1:
        return loss
    # In one precision on all processes, whatever autocast made of the loss of each.
    weight = weight.detach().to(torch.promote_types(loss.dtype, torch.float32))
    sums = torch.stack([loss.detach() * weight, weight])
    distributed.all_reduce(sums)
    total = sums[1].clamp(min=1e-12)
    own = loss * (num_processes() * weight / total)
    return sums[0] / total + (own - own.detach())


def gathered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows of all processes, ``(ΣN, …)``, for tensors of ``N`` rows each, which may be another number on each process.

    Gradients reach the rows of this process alone: each computes the same loss, and its rows' part in it. What a
    process sends and receives is all of these rows once, in the forward pass.
    """
    if num_processes() == 1:
        return tensors
    own = tensors[0]
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(num_processes())]
    distributed.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    counts = torch.cat(sizes).tolist()
    return tuple(_gathered(tensor, counts) for tensor in tensors)


def shared(loss: Tensor) -> Tensor:
    """A loss of :func:`gathered` rows with the gradient that a mean over processes makes that of the whole loss."""
    if num_processes() == 1:
        return loss
    return loss.detach() + num_processes() * (loss - loss.detach())


def _gathered(tensor: Tensor, counts: list[int]) -> Tensor:
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    parts[distributed.get_rank()] = tensor
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
