"""Triangles of images: which part of one is proved to be in a level set, and which part outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.level_sets import SignedRadius, distance_above, radii_between
from lipsim.certificates.numbers import check_count

_TOLERANCE = 1e-6  # of the cover of a cell by three discs, far above what float64 loses there


@dataclass(frozen=True)
class TriangleCertificate:
    """What is proved of N triangles, on a barycentric grid of ``G`` points and ``C`` cells.

    Attributes:
        weights: ``(G, 3)``, barycentric coordinates of the grid points.
        radii: ``(N, G)``, signed radii there.
        cells: ``(C, 3)`` int64, grid points at the corners of each cell.
        inside: ``(N, C)``, the share of each cell that is proved to be inside.
        outside: ``(N, C)``, the share that is proved to be outside.
        evaluations: ``(N,)`` int64, points that were evaluated.
    """

    weights: Tensor
    radii: Tensor
    cells: Tensor
    inside: Tensor
    outside: Tensor
    evaluations: Tensor

    @property
    def area(self) -> tuple[Tensor, Tensor]:
        """Bounds ``(lower, upper)``, ``(N,)`` each, of the share of the triangle's area that the level set holds."""
        return self.inside.mean(1), 1 - self.outside.mean(1)

    @property
    def proved(self) -> Tensor:
        """``(N,)`` bool, the whole triangle is in the level set."""
        return (self.inside == 1).all(1)


@torch.no_grad()
def certify_triangles(
    signed_radius: SignedRadius, corners: Tensor, *, divisions: int = 10, depth: int = 2
) -> TriangleCertificate:
    """Prove which part of triangles is in a level set, and which is not.

    A cell counts where a ball around one corner holds it, ``max_i(g_i − K·(distance to its farthest point)) > 0``, or
    where the three balls cover it together. Cells that are undecided are cut into four, ``depth`` times.

    Args:
        signed_radius: of points ``(M, …)`` of the triangles ``(M,)``.
        corners: images ``(N, 3, …)``.
        divisions: of each side: 10 give the 66 points and 100 cells of Balasubramanian et al. 2023.
        depth: how often an undecided cell is cut into four; the points evaluated are at most
            ``(divisions·2^depth + 1)(divisions·2^depth + 2)/2``.

    Raises:
        ValueError: numbers out of range, or not three corners.
    """
    check_count("divisions", divisions)
    check_count("depth", depth, 0)
    if corners.ndim < 3 or corners.shape[1] != 3:
        raise LipsimError(f"expected three images a triangle, (N, 3, …), got {tuple(corners.shape)}")
    count, device = len(corners), corners.device
    nodes, cells = barycentric_grid(divisions)
    nodes, cells = nodes.to(device), cells.to(device)
    weights = nodes.double() / divisions
    rows = torch.arange(count, device=device)
    radii = radii_between(signed_radius, corners, rows.repeat_interleave(len(nodes)), weights.repeat(count, 1))
    radii = radii.view(count, len(nodes))
    sides = torch.stack([distance_above(corners[:, i], corners[:, j]) for i, j in ((1, 2), (0, 2), (0, 1))], 1)
    inside, outside = (torch.zeros(count, len(cells), dtype=torch.float64, device=device) for _ in range(2))
    evaluations = torch.full_like(rows, len(nodes))

    # What is undecided: the triangle, the cell of the grid, and the corners in steps of the present resolution.
    of = rows.repeat_interleave(len(cells))
    cell = torch.arange(len(cells), device=device).repeat(count)
    corner = nodes[cells].repeat(count, 1, 1)
    found = radii[:, cells].flatten(0, 1)
    scale, area = divisions, 1.0
    for level in range(depth + 1):
        # A corner is opposite the side of the cell that is parallel to one of the triangle.
        lengths = _cell_sides(corner, sides[of]) / scale
        holds, fails = _covered(found, lengths), _covered(-found, lengths)
        inside.index_put_((of[holds], cell[holds]), inside.new_full((1,), area), accumulate=True)
        outside.index_put_((of[fails], cell[fails]), outside.new_full((1,), area), accumulate=True)
        open_ = (~holds & ~fails).nonzero().flatten()
        if level == depth or not len(open_):
            break
        of, cell, corner, found = of[open_], cell[open_], 2 * corner[open_], found[open_]
        scale, area = 2 * scale, area / 4
        middles = torch.stack([(corner[:, i] + corner[:, j]) // 2 for i, j in ((1, 2), (0, 2), (0, 1))], 1)
        # Neighbours share their middles: each point once.
        keys = (of.unsqueeze(1) * (scale + 1) + middles[..., 1]) * (scale + 1) + middles[..., 2]
        unique, position = keys.unique(return_inverse=True)
        where = torch.stack([unique // (scale + 1) % (scale + 1), unique % (scale + 1)], 1).double() / scale
        owner = unique // (scale + 1) ** 2
        new = radii_between(signed_radius, corners, owner, torch.cat([1 - where.sum(1, keepdim=True), where], 1))
        evaluations.index_add_(0, owner, torch.ones_like(owner))
        between = new[position]
        parts = [((i, 3 + j, 3 + k)) for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1))] + [(3, 4, 5)]
        order = torch.tensor(parts, device=device)
        corner = torch.cat([corner, middles], 1)[:, order].flatten(0, 1)
        found = torch.cat([found, between], 1)[:, order].flatten(0, 1)
        of, cell = of.repeat_interleave(4), cell.repeat_interleave(4)
    return TriangleCertificate(weights, radii, cells, inside, outside, evaluations)


def barycentric_grid(divisions: int) -> tuple[Tensor, Tensor]:
    """The points of a triangle's grid, ``(G, 3)`` int64 that add up to ``divisions``, and its cells ``(C, 3)``.

    Example:
        >>> nodes, cells = barycentric_grid(10)
        >>> len(nodes), len(cells)
        (66, 100)
    """
    nodes = [(divisions - i - j, i, j) for i in range(divisions + 1) for j in range(divisions + 1 - i)]
    number = {(i, j): k for k, (_, i, j) in enumerate(nodes)}
    cells = [(number[i, j], number[i + 1, j], number[i, j + 1]) for i, j in number if i + j < divisions]
    cells += [(number[i + 1, j], number[i, j + 1], number[i + 1, j + 1]) for i, j in number if i + j < divisions - 1]
    return torch.tensor(nodes), torch.tensor(cells)


def _cell_sides(corner: Tensor, sides: Tensor) -> Tensor:
    """Lengths ``(M, 3)`` of the sides of cells opposite each corner, in units of the grid's steps.

    Two corners of a cell differ by a step from one corner of the triangle to another, so that the side between them is
    parallel to one of the triangle's, ``(M, 3)``, of which the third corner has no part.
    """
    lengths = []
    for i, j in ((1, 2), (0, 2), (0, 1)):
        apart = (corner[:, i] - corner[:, j]) == 0
        lengths.append(sides.gather(1, apart.long().argmax(1, keepdim=True)).squeeze(1))
    return torch.stack(lengths, 1)


def _covered(radii: Tensor, lengths: Tensor) -> Tensor:
    """Whether balls around the corners of cells cover them, ``(M,)`` bool.

    Args:
        radii: ``(M, 3)``, those of the balls; below 0: there is none.
        lengths: ``(M, 3)``, of the sides opposite each corner.
    """
    farthest = torch.stack([lengths[:, [1, 2]].amax(1), lengths[:, [0, 2]].amax(1), lengths[:, [0, 1]].amax(1)], 1)
    by_one = (radii > farthest).any(1)
    # Three discs cover a triangle if those at its ends cover each side, and the point of equal power, where it lies
    # within: of the part of the triangle where one disc has the least power, power being convex, a corner is worst.
    r = radii.clamp(min=0) * (1 - _TOLERANCE)
    a, b, c = lengths.unbind(1)
    sides = (r[:, 1] + r[:, 2] > a) & (r[:, 0] + r[:, 2] > b) & (r[:, 0] + r[:, 1] > c) & (radii > 0).all(1)
    # The first corner at the origin, the second at (c, 0), the third at (x, y).
    x = (b.square() + c.square() - a.square()) / (2 * c)
    y = (b.square() - x.square()).clamp(min=0).sqrt()
    square = r.square()
    px = (c.square() + square[:, 0] - square[:, 1]) / (2 * c)
    py = (b.square() + square[:, 0] - square[:, 2] - 2 * px * x) / (2 * y)
    third = py / y
    second = (px - third * x) / c
    within = torch.stack([1 - second - third, second, third], 1).amin(1) >= -_TOLERANCE
    power = px.square() + py.square() - square[:, 0]
    longest = lengths.amax(1)
    # Flat triangles, and NaN of those that are points, are left to the single balls.
    solid = y > 1e-3 * longest
    together: Tensor = sides & solid & (~within | (power < -_TOLERANCE * longest.square()))
    return by_one | together
