"""Square attack (Andriushchenko et al. 2020): random search that needs no gradients and so finds masked ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box, Norm, expand, sample_norm
from lipsim.attacks.survivors import Survivors, restart_seed
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_uniform

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the squares' area, at these shares of a run
_CORNERS = 4  # random numbers of a step for its two corners; then how a bump lies and signs of channels, 8 at least


def square(
    objective: Objective,
    x: Tensor,
    *,
    norm: Norm = 2,
    eps: float,
    steps: int = 1000,
    restarts: int = 1,
    box: Box = (0.0, 1.0),
    parts: int = 1,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    area: float = 0.8,
) -> Tensor:
    """Maximise an objective within a ball by random squares; a change is kept where it helps.

    In ℓ∞ a square takes one of the two extreme values in each channel. In ℓ2 one square gives its share of the budget
    to another, which gets a bump of two opposite pyramids.

    As the authors' code, but that squares reach the last row and column of the image, that each sample has squares of
    its own, and that several ``parts`` take turns.

    A step is a query here: no gradients are asked for. Costs a sample ``1 + restarts·steps`` forward passes and no
    backward pass, fewer once it is broken. What is random depends on ``(seed, index of the sample)`` alone.

    Source: Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random
    search".

    Args:
        objective: per-sample scalar to maximise; needs no gradient.
        x: images ``(N, C, H, W)`` inside the box.
        norm: 2 or "inf".
        eps: budget, the largest norm of ``x_adv − x``.
        steps: queries of a run, each a forward pass.
        restarts: runs.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of the squares.
        index: ``(N,)`` sample indices that the squares depend on.
        area: share of the image that the first squares cover, halved nine times during a run.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where ``eps`` is 0.

    Raises:
        ValueError: a bad norm, budget or box.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=9)  # linear, slope √12
        >>> x_adv = square(brighter, x, norm="inf", eps=0.1, steps=200)
        >>> print(f"{(x_adv - x).abs().max():.3f} {(x_adv - x).sum():.3f}")  # every value by 0.1
        0.100 1.200
    """
    ball = Ball(norm, eps, box, parts)
    if norm == 0:
        raise LipsimError("expected norm 2 or 'inf', got 0; one_pixel attacks pixels without gradients")
    ball.check(x)
    if eps == 0 or steps < 1:
        return x.detach().clone()
    batch = Survivors(objective, x, index)
    for restart in range(restarts):
        if not len(batch):
            break
        _run(batch, ball, steps, restart_seed(seed, restart), area)
    return batch.best


@torch.no_grad()
def _run(batch: Survivors, ball: Ball, steps: int, seed: int, area: float) -> None:
    height, width = batch.clean.shape[-2:]
    count = _CORNERS + max(8, 1 + batch.clean.shape[1] // ball.parts)
    draws = sample_uniform(batch.clean.new_empty(len(batch), steps, count), seed=seed, index=batch.index)
    stripes = sample_uniform(batch.clean, seed=-1 - seed, index=batch.index)
    begin = _stripes if ball.norm == "inf" else _tiles
    current = ball.project(batch.clean + begin(ball.split(stripes), ball.eps).view_as(batch.clean), batch.clean)
    value = batch.objective(current)
    current, value, draws = batch.keep(current, value, current, value, draws)
    for step in range(1, steps):
        if not len(batch):
            return
        share = area / 2 ** sum(step > at * steps for at in _HALVINGS)
        side = min(max(round((share * height * width) ** 0.5), 1), max(min(height, width) - 1, 1))
        delta = (current - batch.clean).unflatten(1, (ball.parts, -1))
        # One image a step, where several move.
        moved, numbers = delta[:, step % ball.parts], draws[:, step]
        if ball.norm == "inf":
            moved = _square_linf(moved, side, ball.eps, numbers)
        else:
            moved = _square_l2(moved, max(side, 3) | 1, ball.eps, numbers)
        delta[:, step % ball.parts] = moved
        trial = ball.project(batch.clean + delta.flatten(1, 2), batch.clean)
        trial_value = batch.objective(trial)
        better = trial_value > value
        current, value = torch.where(expand(better, current), trial, current), torch.where(better, trial_value, value)
        current, value, draws = batch.keep(current, value, current, value, draws)


def _stripes(uniform: Tensor, eps: float) -> Tensor:
    """Vertical stripes of ±eps, the start in ℓ∞."""
    return (eps * torch.sign(uniform[:, :, :1] - 0.5)).expand_as(uniform)


def _tiles(uniform: Tensor, eps: float) -> Tensor:
    """Bumps in the middle five by five tiles, signs and directions at random: the start in ℓ2."""
    height, width = uniform.shape[-2:]
    side = max(min(height, width) // 5, 1)
    rows, columns = min(height // side, 5), min(width // side, 5)
    bump = _bump(side, uniform)
    signs = F.interpolate(torch.sign(uniform[:, :, :rows, :columns] - 0.5), scale_factor=side)
    turned = F.interpolate(uniform[:, :1, -rows:, -columns:], scale_factor=side) < 0.5
    tiled = signs * torch.where(turned, bump.T.repeat(rows, columns), bump.repeat(rows, columns))
    delta = torch.zeros_like(uniform)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiled
    return eps * delta / expand(sample_norm(delta).clamp(min=1e-30), delta)


def _square_linf(delta: Tensor, side: int, eps: float, numbers: Tensor) -> Tensor:
    """One square at ±eps, a sign for each channel."""
    row, column = _corners(numbers[:, :2], side, delta)
    signs = torch.sign(numbers[:, 4 : 4 + delta.shape[1]] - 0.5)
    delta = delta.clone()
    _put(delta, row, column, side, eps * signs[:, :, None, None].expand(-1, -1, side, side))
    return delta


def _square_l2(delta: Tensor, side: int, eps: float, numbers: Tensor) -> Tensor:
    """The budget of one window moves to another, in the form of a bump added to what is there."""
    side = min(side, *delta.shape[-2:])
    to, source = _corners(numbers[:, :2], side, delta), _corners(numbers[:, 2:4], side, delta)
    channels = delta.shape[1]
    bump = _bump(side, delta)
    turned = expand(numbers[:, 4], delta) < 0.5
    bump = torch.where(turned, bump.T, bump) * torch.sign(numbers[:, 5 : 5 + channels] - 0.5)[:, :, None, None]
    window = _get(delta, *to, side)
    norms = window.flatten(2).norm(dim=2)
    shape = bump + window / norms.clamp(min=1e-30)[:, :, None, None]
    # What both windows hold, counted once where they overlap, and what the budget leaves.
    emptied = delta.clone()
    for corner in (to, source):
        _put(emptied, *corner, side, torch.zeros_like(window))
    spare = (eps**2 - delta.flatten(1).square().sum(1)).clamp(min=0)
    held = (delta.square() - emptied.square()).flatten(2).sum(2).clamp(min=0)
    available = (held + spare[:, None] / channels).sqrt()
    shape = shape * (available / shape.flatten(2).norm(dim=2).clamp(min=1e-30))[:, :, None, None]
    _put(emptied, *to, side, shape)
    return emptied


def _bump(side: int, like: Tensor) -> Tensor:
    """The paper's η, ``(side, side)``: two pyramids of opposite sign, one above the other, of norm 1."""
    upper = side // 2
    halves = [sign * _pyramid(rows, side, like) for rows, sign in ((upper, 1.0), (side - upper, -1.0)) if rows]
    bump = torch.cat(halves)
    unit: Tensor = bump / bump.norm()
    return unit


def _pyramid(rows: int, columns: int, like: Tensor) -> Tensor:
    """Half of η, ``(rows, columns)``, of norm 1: ``Σ_{k ≥ d} 1/(k + 1)²`` at the distance ``d`` (ℓ∞) of the middle."""
    i = (torch.arange(rows, device=like.device) - rows // 2).abs()[:, None]
    j = (torch.arange(columns, device=like.device) - columns // 2).abs()[None, :]
    furthest = max(rows, columns) // 2
    terms = torch.arange(1, furthest + 2, dtype=like.dtype, device=like.device).square().reciprocal()
    pyramid = terms.flip(0).cumsum(0).flip(0)[torch.maximum(i, j)]
    unit: Tensor = pyramid / pyramid.norm()
    return unit


def _corners(numbers: Tensor, side: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left corners of windows inside the image, from uniform numbers ``(N, 2)``."""
    height, width = image.shape[-2:]
    room = torch.tensor([height - side + 1, width - side + 1], device=image.device)
    row, column = (numbers * room).long().minimum(room - 1).unbind(1)
    return row, column


def _window(row: Tensor, column: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(side, device=row.device)
    sample = torch.arange(len(row), device=row.device)[:, None, None]
    return sample, (row[:, None] + offsets)[:, :, None], (column[:, None] + offsets)[:, None, :]


def _get(image: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Windows ``(N, C, side, side)``, one an image."""
    sample, i, j = _window(row, column, side)
    return image.permute(0, 2, 3, 1)[sample, i, j].permute(0, 3, 1, 2)


def _put(image: Tensor, row: Tensor, column: Tensor, side: int, values: Tensor) -> None:
    """Write windows in place."""
    sample, i, j = _window(row, column, side)
    image.permute(0, 2, 3, 1)[sample, i, j] = values.permute(0, 2, 3, 1)
