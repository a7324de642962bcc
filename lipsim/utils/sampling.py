"""Samples told apart: random numbers that depend on the seed and the sample alone, and each sample counted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lipsim.utils.errors import LipsimError

_SEED_STRIDE = 0x9E3779B97F4A7C15  # golden-ratio increments spread (seed, index) over the 64 bits (Steele et al. 2014)


def sample_normal(like: Tensor, *, seed: int, index: Tensor | Sequence[int] | None = None) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of ``like`` ``(N, …)``.

    Row ``i`` is a function of ``(seed, index[i])`` alone, drawn on the CPU in float32, so that it is the same in any
    batch, on any device and in any precision. ``index`` None counts the rows from 0.
    """
    return _sample(like, lambda row, generator: row.normal_(generator=generator), seed, index)


def sample_uniform(like: Tensor, *, seed: int, index: Tensor | Sequence[int] | None = None) -> Tensor:
    """Numbers uniform in [0, 1), otherwise as :func:`sample_normal`."""
    return _sample(like, lambda row, generator: row.uniform_(generator=generator), seed, index)


def sample_stream(seed: int, index: int) -> np.random.Generator:
    """A generator of the seed and the index of a sample, for as many numbers in float64 as it takes.

    Both go into its state whole, of which torch's generators on the CPU take 32 bits, and what it draws does not depend
    on how many numbers are asked for at once.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed % 2**64, index % 2**64))))


def unique_first(index: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct values of ``index``, ``(N,)`` or rows ``(N, K)``, and the position at which each occurs first."""
    values, inverse = torch.unique(index, return_inverse=True, dim=0 if index.ndim > 1 else None)
    positions = torch.arange(len(index), device=index.device)
    first = positions.new_full((len(values),), len(index)).scatter_reduce(0, inverse, positions, reduce="amin")
    return values, first


def _sample(
    like: Tensor,
    draw: Callable[[Tensor, torch.Generator], Tensor],
    seed: int,
    index: Tensor | Sequence[int] | None,
) -> Tensor:
    indices = range(len(like)) if index is None else [int(i) for i in index]
    if len(indices) != len(like):
        raise LipsimError(f"expected one index a sample, got {len(indices)} for {len(like)} samples")
    noise = torch.empty(like.shape, dtype=torch.float32)
    for row, i in zip(noise, indices, strict=True):
        generator = torch.Generator().manual_seed((seed * _SEED_STRIDE + i * 0xBF58476D1CE4E5B9) % 2**63)
        draw(row, generator)
    return noise.to(like)
