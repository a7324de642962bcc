"""Samples told apart: random numbers that depend on the seed and the sample alone, and each sample counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lipsim.utils.errors import LipsimError

_SEED_STRIDE = 0x9E3779B97F4A7C15  # golden-ratio increments spread (seed, index) over the 64 bits (Steele et al. 2014)
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64's output function


def sample_normal(like: Tensor, *, seed: int, index: Tensor | Sequence[int] | None = None) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of ``like`` ``(N, …)``.

    Row ``i`` is a function of ``(seed, index[i])`` alone, drawn on the CPU in float32, so that it is the same in any
    batch, on any device and in any precision. ``index`` None counts the rows from 0.
    """
    return _sample(like, lambda row, generator: row.normal_(generator=generator), seed, index)


def sample_uniform(like: Tensor, *, seed: int, index: Tensor | Sequence[int] | None = None) -> Tensor:
    """Numbers uniform in [0, 1), otherwise as :func:`sample_normal`."""
    return _sample(like, lambda row, generator: row.uniform_(generator=generator), seed, index)


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Draw on the CPU from a seed of its own, as weights are; no generator is another one afterwards.

    Not by ``torch.manual_seed``, which seeds all accelerators too, where whoever calls may draw as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def subkey(key: int, number: int) -> int:
    """Output ``number``, at least 0, of the generator SplitMix64 with the seed ``key``.

    There is no state to keep or to skip: the key of (seed, epoch, sample) is ``subkey(subkey(seed, epoch), sample)``,
    whichever process asks for it, and in whatever order. Keys are told apart by their last 64 bits; the result is in
    the range of an int64.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    state = (key + (number + 1) * _SEED_STRIDE) % 2**64
    state = (state ^ (state >> 30)) * _FIRST_FACTOR % 2**64
    state = (state ^ (state >> 27)) * _SECOND_FACTOR % 2**64
    return _signed(state ^ (state >> 31))


def subkeys(keys: Tensor | int, numbers: Tensor | int) -> Tensor:
    """:func:`subkey` of whole tensors, int64, which broadcast; a number for all of them may stand for one."""
    # Products and sums of int64 wrap around, as they should.
    state = torch.as_tensor(_signed(keys) if isinstance(keys, int) else keys)
    state = state + (torch.as_tensor(numbers, device=state.device) + 1) * _signed(_SEED_STRIDE)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST_FACTOR)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND_FACTOR)
    output: Tensor = state ^ _shifted(state, 31)
    return output


def key_uniform(keys: Tensor, count: int) -> Tensor:
    """Numbers uniform in [0, 1) for keys ``(N,)``, ``(N, count)`` float32: the upper 24 bits of ``count`` outputs."""
    outputs = subkeys(keys.unsqueeze(1), torch.arange(count, device=keys.device))
    return _shifted(outputs, 40).float() * 2.0**-24


def _signed(number: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shifted right with zeros coming in; torch's own shift of int64 repeats the sign."""
    shifted: Tensor = (bits >> places) & (2 ** (64 - places) - 1)
    return shifted


def sample_stream(seed: int, index: int) -> np.random.Generator:
    """A generator of the seed and the index of a sample, for as many numbers in float64 as it takes.

    Both go into its state whole, of which torch's generators on the CPU take 32 bits, and what it draws does not depend
    on how many numbers are asked for at once.
    """
    entropy = [seed % 2**64, index % 2**64]
    if entropy[0] >= 2**32:
        # Numbers become one row of words of 32 bits, as many as each has: with five in all it is nobody else's.
        entropy = [entropy[0] % 2**32, entropy[0] >> 32, entropy[1] % 2**32, entropy[1] >> 32, 1]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


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
