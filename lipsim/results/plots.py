"""Plots of results: curves over ε, pictures of triplets."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_file

_COLUMN, _AXES = 3.3, 2.3  # inches: the width of a column in two-column papers, the height without a legend
_LABEL = 24  # letters of a label that half a column has room for
Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


def plot_scores(
    path: Path, certified: Mapping[str, Mapping[str, Curve]], attacked: Mapping[str, Mapping[str, Curve]], title: str
) -> None:
    """Scores over the ℓ2 budget ε, as wide as a column of a paper: a colour a metric, a line style a kind of radius.

    Certified scores are lines, what an attack left are markers; between the two lies what is neither proven nor broken.
    The legend stands below the axes, first the metrics, then the kinds.

    Args:
        path: file to write.
        certified: metric → kind of radius → (ε, score in [0, 1]).
        attacked: metric → kind of attack → (ε, score in [0, 1]).
        title: of the figure.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not certified and not attacked:
        raise LipsimError("expected scores to draw, got none")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys([*certified, *attacked]))}
    kinds = list(dict.fromkeys(kind for curves in certified.values() for kind in curves))
    styles = dict(zip(kinds, cycle(("-", "--", ":", "-.")), strict=False))
    handles = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color="0.3", ls=style, lw=1.2, label=kind) for kind, style in styles.items()]
    attacks = list(dict.fromkeys(kind for curves in attacked.values() for kind in curves))
    markers = dict(zip(attacks, cycle("osD^"), strict=False))
    handles += [Line2D([], [], color="0.3", marker=m, ls="", ms=3, label=kind) for kind, m in markers.items()]
    columns = 1 if max(len(str(handle.get_label())) for handle in handles) > _LABEL else 2
    height = _AXES + 0.15 * math.ceil(len(handles) / columns)
    figure = Figure(figsize=(_COLUMN, height), layout="constrained")
    axes = figure.subplots()
    for name, curves in certified.items():
        for kind, (eps, score) in curves.items():
            axes.plot(eps, 100 * np.asarray(score), styles[kind], color=colours[name], lw=1.2)
    for name, curves in attacked.items():
        for kind, (eps, score) in curves.items():
            # No lines between: what an attack would leave there is not known.
            axes.plot(eps, 100 * np.asarray(score), markers[kind], color=colours[name], ms=3)
    axes.axhline(50, color="0.7", lw=0.8, zorder=0)
    axes.set_xlabel("ε (ℓ2, pixels in [0, 1])", fontsize=8)
    axes.set_ylabel("2AFC score (%)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_title(title, fontsize=8)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    save(figure, path, dpi=300)


def plot_gallery(
    path: Path,
    images: Tensor,
    radius: Tensor,
    margin: Tensor,
    right_vote: Tensor,
    index: Tensor,
    attacked: tuple[Tensor, Sequence[bool]] | None = None,
) -> None:
    """Triplets one a row: left, reference, right, with the metric's choice, the votes and the certified radius.

    Args:
        path: file to write.
        images: ``(N, 3, 3, H, W)``: reference, left, right.
        radius: ``(N,)`` certified radii of the reference.
        margin: ``(N,)``, positive where left is nearer.
        right_vote: ``(N,)``.
        index: ``(N,)`` sample indices.
        attacked: references under an attack of length R, ``(N, 3, H, W)``, and whether the answer flipped: two more
            columns, with the change amplified around gray.
    """
    choices = ["tie" if h == 0 else "left" if h > 0 else "right" for h in margin.tolist()]
    votes = right_vote.tolist()
    columns = [images[:, 1], images[:, 0], images[:, 2]]
    labels = [
        [f"left: {1 - vote:.0%} of votes" for vote in votes],
        [f"#{i}: {c}, R = {r:.3g}" for i, c, r in zip(index.tolist(), choices, radius.tolist(), strict=True)],
        [f"right: {vote:.0%} of votes" for vote in votes],
    ]
    if attacked is not None:
        change = attacked[0] - images[:, 0]
        gain = 0.5 / change.flatten(1).abs().amax(1).clamp(min=1e-6)
        columns[2:2] = [attacked[0], 0.5 + change * gain.view(-1, 1, 1, 1)]
        labels[2:2] = [
            [f"PGD, ε = R: {'flipped' if flip else 'holds'}" for flip in attacked[1]],
            [f"its change × {g:.3g}" for g in gain.tolist()],
        ]
    plot_grid(path, columns, labels, title="certified best to worst: choice and radius")


def plot_grid(path: Path, columns: Sequence[Tensor], labels: Sequence[Sequence[str]], title: str) -> None:
    """Images in a grid, one sample a row.

    Args:
        path: file to write.
        columns: image batches ``(N, 3, H, W)``, one a column.
        labels: a caption for each image, by column and row.
        title: of the figure.
    """
    rows = len(columns[0])
    figure = Figure(figsize=(2.0 * len(columns), 2.15 * rows + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=9)
    # Without ticks, which are not shown: to place them takes half of the time.
    no_ticks: dict[str, list[float]] = {"xticks": [], "yticks": []}
    for row, axes in enumerate(figure.subplots(rows, len(columns), squeeze=False, subplot_kw=no_ticks)):
        for axis, images, captions in zip(axes, columns, labels, strict=True):
            axis.imshow(images[row].permute(1, 2, 0).clamp(0, 1).cpu().float().numpy(), interpolation="nearest")
            axis.set_title(captions[row], fontsize=7)
            axis.set_axis_off()
    save(figure, path)


def plottable(scores: Sequence[float | None]) -> list[float]:
    """Scores with NaN, which no curve shows, where there is none."""
    return [float("nan") if score is None else score for score in scores]


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as a whole, making its folder."""
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=dpi))
