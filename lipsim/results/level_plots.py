"""Plots of level sets: the triangle between three images, and the straight line between two."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from torch import Tensor

from lipsim.results.plots import save

_PLACES = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]])  # of the corners


def plot_triangle(
    path: Path,
    weights: Tensor,
    values: Tensor,
    cells: Tensor,
    corners: Sequence[str],
    images: Tensor,
    inside: Tensor | None,
    outside: Tensor | None,
    title: str,
) -> None:
    """The objective over the triangle of three images, its level set outlined, and the cells that are proved.

    Args:
        path: file to write.
        weights: ``(G, 3)``, barycentric coordinates.
        values: ``(G,)``, the objective, at most 0 inside.
        cells: ``(C, 3)`` grid points at the corners of each cell.
        corners: names of the three.
        images: ``(3, 3, H, W)``.
        inside: ``(C,)``, the share of each cell that is proved to be inside; None: nothing is proved.
        outside: the same for outside.
        title: of the figure.
    """
    points = weights.double().cpu().numpy() @ _PLACES
    heights = values.double().cpu().numpy()
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(4, 1))
    axes = figure.add_subplot(grid[:, 0])
    largest = max(float(np.abs(heights).max()), 1e-12)
    mesh = Triangulation(points[:, 0], points[:, 1], cells.cpu().numpy())
    shown = axes.tripcolor(mesh, heights, cmap="RdYlGn_r", vmin=-largest, vmax=largest, shading="gouraud")
    if heights.min() < 0 < heights.max():
        axes.tricontour(mesh, heights, levels=[0.0], colors="k", linewidths=1.2)
    if inside is not None and outside is not None:
        polygons = points[cells.cpu().numpy()]
        for share, hatch in ((inside, "////"), (outside, "....")):
            whole = (share.cpu().numpy() > 1 - 1e-9).nonzero()[0]
            proved = PolyCollection(polygons[whole], facecolors="none", edgecolors="0.1", linewidths=0.2, alpha=0.5)
            proved.set_hatch(hatch)
            axes.add_collection(proved)
        title += "\n//// proved inside, .... proved outside"
    figure.suptitle(title, fontsize=7)
    for place, name in zip(_PLACES, corners, strict=True):
        above = place[1] > 0
        axes.annotate(name, place, fontsize=7, ha="center", va="bottom" if above else "top")
    axes.set_aspect("equal")
    axes.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, location="left")
    bar.ax.tick_params(labelsize=6)
    bar.set_label("objective (≤ 0: in the level set)", fontsize=6)
    for row, (image, name) in enumerate(zip(images, corners, strict=True)):
        picture = figure.add_subplot(grid[row, 1])
        picture.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().float().numpy(), interpolation="nearest")
        picture.set_title(name, fontsize=6)
        picture.set_axis_off()
    save(figure, path)


def plot_line(path: Path, values: Tensor, title: str) -> None:
    """The objective ``(M,)`` along the straight line from the source to the outcome of a walk."""
    figure = Figure(figsize=(3.3, 2.1), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.linspace(0, 1, len(values)), values.double().cpu().numpy(), lw=1.2)
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set_xlabel("source → outcome", fontsize=7)
    axes.set_ylabel("objective (≤ 0: in the level set)", fontsize=7)
    axes.set_title(title, fontsize=7)
    axes.tick_params(labelsize=7)
    save(figure, path)
