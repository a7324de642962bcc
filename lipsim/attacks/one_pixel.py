"""One-pixel attack (Su et al. 2017): differential evolution over places and colours, batched over images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box
from lipsim.attacks.survivors import Survivors, restart_seed
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_normal, sample_uniform

_SCALE = 0.5  # F, of the difference of two members that is added to a third


def one_pixel(
    objective: Objective,
    x: Tensor,
    *,
    num_pixels: int = 1,
    generations: int = 100,
    population: int = 400,
    restarts: int = 1,
    box: Box = (0.0, 1.0),
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    batch_size: int = 512,
    parts: int = 1,
) -> Tensor:
    """Maximise an objective by changing a few pixels, found by differential evolution without gradients.

    A member of the population is ``(row, column, colour)`` for each pixel. A child is one member plus half the
    difference of two others, brought back to the image and the box, and replaces its parent where it is better. The
    first members have uniform places and colours normal around the middle of the box.

    Costs a sample ``1 + restarts·population·(generations + 1)`` forward passes and no backward pass, fewer once it is
    broken. What is random depends on ``(seed, index of the sample)`` alone.

    Source: Su et al. 2017, "One pixel attack for fooling deep neural networks", with its scale factor 0.5 and a
    population of 400.

    Args:
        objective: per-sample scalar to maximise; needs no gradient.
        x: images ``(N, C, H, W)`` inside the box.
        num_pixels: how many pixels may change.
        generations: how often every member of the population gets a child.
        population: members of each sample.
        restarts: runs.
        box: the range of a colour; this attack needs one.
        seed: of the evolution.
        index: ``(N,)`` sample indices that the evolution depends on.
        batch_size: images that the objective sees at a time.
        parts: the channels are that many images, each with pixels of its own.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where no change is better.

    Raises:
        ValueError: no box, a number of pixels below 1, a population below 4, or channels that the parts do not divide.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=9)  # linear, slope √12
        >>> x_adv = one_pixel(brighter, x, generations=20)
        >>> int((x_adv != x).any(1).sum()), bool((x_adv - x).sum() <= 1.5)  # a white pixel adds 1.5
        (1, True)
    """
    Ball(0, num_pixels, box, parts).check(x)
    if box is None or num_pixels < 1 or population < 4:
        raise LipsimError(
            f"expected at least 1 pixel and a population of at least 4, got {num_pixels} and {population}"
        )
    batch = Survivors(objective, x, index)
    for restart in range(restarts):
        if len(batch):
            # One seed each for places and colours of the first members, and one a generation.
            first_seed = restart_seed(seed, restart) * (generations + 2)
            _evolve(batch, num_pixels, generations, population, box, first_seed, batch_size, parts)
    return batch.best


@torch.no_grad()
def _evolve(
    batch: Survivors,
    num_pixels: int,
    generations: int,
    population: int,
    box: tuple[float, float],
    seed: int,
    batch_size: int,
    parts: int,
) -> None:
    channels = batch.clean.shape[1]
    shape = batch.clean.new_empty(len(batch), population, num_pixels, 2 * parts + channels)
    members = sample_uniform(shape, seed=seed, index=batch.index)
    colours = 0.5 + 0.5 * sample_normal(shape[..., 2 * parts :], seed=seed + 1, index=batch.index)
    members = torch.cat([members[..., : 2 * parts], colours.clamp(0, 1)], -1)  # all in [0, 1]; scaled in _paint
    value = _values(batch, members, box, batch_size, parts)
    members, value = _keep_best(batch, members, value, box, parts)
    for generation in range(generations):
        if not len(batch):
            return
        draws = sample_uniform(value.new_empty(*value.shape, 3), seed=seed + 2 + generation, index=batch.index)
        a, b, c = (_take(members, rows) for rows in _three_others(draws))
        children = (a + _SCALE * (b - c)).clamp(0, 1)
        found = _values(batch, children, box, batch_size, parts)
        better = found > value
        members = torch.where(better[..., None, None], children, members)
        value = torch.where(better, found, value)
        members, value = _keep_best(batch, members, value, box, parts)


def _keep_best(
    batch: Survivors, members: Tensor, value: Tensor, box: tuple[float, float], parts: int
) -> tuple[Tensor, Tensor]:
    top, best = value.max(1)
    x_adv = _paint(batch.clean, _take(members, best[:, None])[:, 0], box, parts)
    members, value = batch.keep(x_adv, top, members, value)
    return members, value


def _values(batch: Survivors, members: Tensor, box: tuple[float, float], batch_size: int, parts: int) -> Tensor:
    """Objective of every member, ``(M, P)``."""
    sample = torch.arange(len(batch), device=members.device).repeat_interleave(members.shape[1])
    found = []
    for rows, some in zip(sample.split(batch_size), members.flatten(0, 1).split(batch_size), strict=True):
        found.append(batch.objective.select(rows)(_paint(batch.clean[rows], some, box, parts)))
    return torch.cat(found).view(members.shape[:2]).nan_to_num(nan=-torch.inf)


def _paint(x: Tensor, members: Tensor, box: tuple[float, float], parts: int) -> Tensor:
    """Images ``(M, C, H, W)`` with the pixels of members ``(M, k, 2·parts + C)``; a later one covers an earlier."""
    size = torch.tensor(x.shape[-2:], device=x.device)
    place = (members[..., : 2 * parts].unflatten(-1, (parts, 2)) * size).long().minimum(size - 1)
    colour = (box[0] + (box[1] - box[0]) * members[..., 2 * parts :]).clamp(*box).unflatten(-1, (parts, -1))
    x = x.clone()
    images, sample = x.unflatten(1, (parts, -1)), torch.arange(len(x), device=x.device)
    for k in range(members.shape[1]):
        for part in range(parts):
            images[sample, part, :, place[:, k, part, 0], place[:, k, part, 1]] = colour[:, k, part]
    return x


def _take(members: Tensor, rows: Tensor) -> Tensor:
    """Members ``(M, P, …)`` at positions ``(M, Q)``."""
    return members[torch.arange(len(members), device=members.device)[:, None], rows]


def _three_others(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three positions for each, different from each other and from its own, from uniform numbers ``(M, P, 3)``."""
    count = draws.shape[1]
    own = torch.arange(count, device=draws.device).expand(draws.shape[:2])
    chosen = [own]
    for k in range(3):
        # Among those that are left, counted past the ones that are taken, smallest first.
        position = (draws[..., k] * (count - 1 - k)).long().clamp(max=count - 2 - k)
        for taken in torch.stack(chosen).sort(0).values:
            position = position + (position >= taken)
        chosen.append(position)
    return chosen[1], chosen[2], chosen[3]
