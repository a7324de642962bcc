"""The figures of docs/theory.md, computed by the library itself: ``python docs/figures/theory.py``."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import lipsim
from lipsim.certificates import (
    candidate_radii,
    distance_interval,
    joint_radius,
    margin,
    published_radius,
    reference_radius,
)
from lipsim.data import BuiltinTriplets

IMAGES = Path(__file__).parents[1] / "images"
LEFT, RIGHT = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[0.6, 2.6]]).double()
BLUE, ORANGE, GREY = "#3f51b5", "#e65100", "#777777"


def save(figure: plt.Figure, name: str) -> None:
    """Write a figure in the width of a page."""
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)
    print(IMAGES / name)


def radii() -> None:
    """The plane of two features: who is nearer, and the balls that the exact and the published radius certify."""
    grid = torch.linspace(-0.5, 4.5, 401).double()
    z = torch.cartesian_prod(grid, grid)
    h = margin(z, LEFT.expand_as(z), RIGHT.expand_as(z), anchor=1.0).reshape(401, 401).T
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    axes.contourf(grid, grid, h, levels=[-9, 0, 9], colors=["#fbe9e0", "#e6e9f7"])
    axes.contour(grid, grid, h, levels=[0], colors=GREY, linewidths=1.5)
    for point in ((3.2, 1.9), (1.3, 2.9), (1.1, 0.7)):
        x = torch.tensor([point]).double()
        exact, published = (f(x, LEFT, RIGHT).item() for f in (reference_radius, published_radius))
        axes.add_patch(plt.Circle(point, exact, fill=False, color=BLUE, linewidth=1.6))
        axes.add_patch(plt.Circle(point, published, fill=False, color=ORANGE, linewidth=1.6, linestyle="--"))
        axes.plot(*point, "k.", markersize=6)
    for candidate, name in ((LEFT, "left"), (RIGHT, "right")):
        axes.plot(*candidate[0], "k^", markersize=8)
        axes.annotate(name, candidate[0].tolist(), xytext=(6, -12), textcoords="offset points")
    axes.plot([], [], color=BLUE, label="exact radius")
    axes.plot([], [], color=ORANGE, linestyle="--", label="published radius")
    axes.set(xlim=(-0.5, 4.5), ylim=(-0.5, 4.5), aspect="equal", xlabel="first feature", ylabel="second feature")
    axes.legend(loc="lower right")
    save(figure, "theory-radii.png")


def interval() -> None:
    """How far a distance can move: the proven interval, and the bound that is linear in the budget."""
    x, y = torch.tensor([[4.0, 1.0]]).double(), torch.tensor([[1.5, 3.0]]).double()
    eps = np.linspace(0, 2, 81)
    bounds = [distance_interval(x, y, float(e)) for e in eps]
    own = [distance_interval(x, x, float(e))[1].item() for e in eps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
    left.fill_between(eps, [b[0].item() for b in bounds], [b[1].item() for b in bounds], color=BLUE, alpha=0.25)
    left.axhline(distance_interval(x, y, 0.0)[0].item(), color="k", linewidth=1)
    left.set(title="d(x + δ, y)", xlabel="ε", ylabel="distance", xlim=(0, 2))
    right.plot(eps, own, color=BLUE, label="proven here")
    right.plot(eps, eps, color=ORANGE, linestyle="--", label="published, ε")
    right.set(title="d(x, x + δ), at most", xlabel="ε", xlim=(0, 2), ylim=(0, 0.6))
    right.legend()
    save(figure, "theory-interval.png")


def moving() -> None:
    """Radii of the bundled metric by which image moves, for built-in triplets."""
    metric = lipsim.load("quickstart")
    triplets = BuiltinTriplets("test", num_triplets=200, image_size=64)
    batch = [torch.stack(images) for images in zip(*(triplets[i].images() for i in range(200)), strict=True)]
    with torch.no_grad():
        z, z0, z1 = (metric.embed(images).double() for images in batch)
    options = metric.certificate_options
    moves = {
        "reference": reference_radius(z, z0, z1, **options),
        "left": candidate_radii(z, z0, z1, **options)[0],
        "right": candidate_radii(z, z0, z1, **options)[1],
        "all three, each by ε": joint_radius(z, z0, z1, **options),
    }
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    for (name, radius), style in zip(moves.items(), ("-", "--", ":", "-."), strict=True):
        ordered = np.sort(radius.numpy())
        axes.step(ordered, 100 * (1 - np.arange(len(ordered)) / len(ordered)), style, label=name)
    axes.set(xlim=(0, 5), ylim=(0, 100), xlabel="ε (ℓ2, pixels in [0, 1])", ylabel="answers that cannot change, %")
    axes.legend(title="what moves")
    save(figure, "theory-moving.png")


def anchor() -> None:
    """What the anchor does: features, lifted by a constant coordinate, and projected onto the sphere."""
    figure, axes = plt.subplots(figsize=(6.0, 2.2))
    angle = np.linspace(0, math.pi, 181)
    axes.plot(np.cos(angle), np.sin(angle), color=GREY)
    for f in (-2.2, 0.35, 1.6):
        length = math.hypot(f, 1)
        axes.plot([0, f], [0, 1], color=BLUE, linewidth=0.8)
        axes.plot(f, 1, "o", color=BLUE)
        axes.plot(f / length, 1 / length, "o", color=ORANGE)
    axes.axhline(1, color=BLUE, linewidth=0.8, linestyle=":")
    _label(axes, (1.6, 1), "e(x) = (f(x), κ)", (6, 6), BLUE)
    _label(axes, (1.6 / math.hypot(1.6, 1), 1 / math.hypot(1.6, 1)), "p(x)", (10, -14), ORANGE)
    axes.set(xlim=(-2.6, 3.0), ylim=(0, 1.4), aspect="equal", xlabel="f(x)", ylabel="anchor")
    save(figure, "theory-anchor.png")


def _label(axes: Axes, point: tuple[float, float], text: str, offset: tuple[int, int], color: str) -> None:
    axes.annotate(text, point, xytext=offset, textcoords="offset points", color=color)


if __name__ == "__main__":
    anchor()
    radii()
    interval()
    moving()
