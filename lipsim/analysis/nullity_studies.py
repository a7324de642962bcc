"""Three questions about nullity: does it grow with width, does distillation reduce it, does it predict attacks?

Each is a function, rows for :func:`lipsim.results.formats.write_table`, and a plot. The first is Lemma 2 of Ozbulak et
al. (Exact Feature Collisions), the second its suggestion, the third its open question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lipsim.analysis.nullity import Nullity, nullity
from lipsim.results.tables import Row
from lipsim.utils.errors import LipsimError

_FEWEST = 4  # networks of which an order tells anything
_INCHES = (3.3, 2.5)  # a column of a two-column paper
Measures = Mapping[str, Callable[[Nullity], float]]
MEASURES: Measures = {
    "ν/n": lambda found: found.nu / found.n,
    "μ/n": lambda found: found.mu / found.n,
    "Σ/parameters": lambda found: found.sum_nullity / found.parameters,
}


def width_sweep(
    build: Callable[[int], nn.Module], widths: Sequence[int], say: Callable[[str], None] = lambda _: None
) -> list[tuple[int, Nullity]]:
    """Nullity of one architecture at several widths: wider layers have the larger kernels (their Lemma 2).

    Args:
        build: a width to a network.
        widths: at least one.
        say: hears how far it is.
    """
    found = []
    for width in widths:
        say(f"width {width}")
        found.append((width, nullity(build(width), f"width {width}")))
    return found


def width_rows(sweeps: Mapping[str, Sequence[tuple[int, Nullity]]]) -> list[Row]:
    """A row for each width of each architecture."""
    return [
        {
            "architecture": name,
            "width": str(width),
            "parameters": f"{found.parameters:,}",
            **_cells(found),
            "Σ nullity": f"{found.sum_nullity:,}",
            "largest": f"{max(layer.nullity for layer in found.layers):,}",
        }
        for name, sweep in sweeps.items()
        for width, found in sweep
    ]


def plot_widths(path: Path, sweeps: Mapping[str, Sequence[tuple[int, Nullity]]]) -> None:
    """Σ nullity over the width, and as a part of the parameters.

    Args:
        path: file to write; its suffix says which kind.
        sweeps: architecture to its :func:`width_sweep`.
    """
    figure, panels = _figure(2)
    for name, sweep in sweeps.items():
        widths = [width for width, _ in sweep]
        panels[0].loglog(widths, [found.sum_nullity for _, found in sweep], "o-", ms=3, lw=1, label=name)
        share = [MEASURES["Σ/parameters"](found) for _, found in sweep]
        panels[1].loglog(widths, share, "o-", ms=3, lw=1, label=name)
    for axes, label in zip(panels, ("Σ nullity", "Σ/parameters"), strict=True):
        axes.set_xlabel("width", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


@dataclass(frozen=True)
class Comparison:
    """The nullities of a teacher and of its student."""

    teacher: Nullity
    student: Nullity

    @property
    def differences(self) -> dict[str, float]:
        """Of the measures of :data:`MEASURES`, student minus teacher: negative where the student has the less."""
        return {name: measure(self.student) - measure(self.teacher) for name, measure in MEASURES.items()}


def teacher_against_student(pairs: Iterable[tuple[Nullity, Nullity]]) -> list[Comparison]:
    """Whether students have smaller kernels than their teachers, as the paper expects of compact networks.

    Args:
        pairs: a teacher and its student each; a generator holds no more than one pair of networks in memory.

    Raises:
        ValueError: no pairs.
    """
    found = [Comparison(teacher, student) for teacher, student in pairs]
    if not found:
        raise LipsimError("expected at least one pair of a teacher and a student, got none")
    return found


def comparison_rows(found: Sequence[Comparison]) -> list[Row]:
    """Three rows a pair: teacher, student, and what the student has more."""
    rows: list[Row] = []
    for pair, both in enumerate(found, start=1):
        for role, network in (("teacher", both.teacher), ("student", both.student)):
            rows.append({"pair": str(pair), "role": role, "model": network.model, **_cells(network)})
        differences = {name: f"{value:+.4f}" for name, value in both.differences.items()}
        fewer = f"{both.student.n - both.teacher.n:+d}"
        rows.append({"pair": str(pair), "role": "difference", "model": "", "n": fewer, **differences})
    return rows


def plot_comparisons(path: Path, found: Sequence[Comparison]) -> None:
    """The student's measures over the teacher's; below the diagonal the student has the smaller kernels.

    Args:
        path: file to write; its suffix says which kind.
        found: pairs, at least one.
    """
    figure, panels = _figure(len(MEASURES))
    for (name, measure), axes in zip(MEASURES.items(), panels, strict=True):
        points = [(measure(both.teacher), measure(both.student)) for both in found]
        end = 1.05 * max(max(point) for point in points) or 1.0
        axes.plot((0, end), (0, end), color="0.7", lw=0.8, zorder=0)
        for both, point in zip(found, points, strict=True):
            axes.plot(*point, "o", ms=4, label=f"{both.teacher.model} → {both.student.model}")
        axes.set_xlabel(f"{name} of the teacher", fontsize=8)
        axes.set_ylabel("of the student", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=6, frameon=False)
    figure.set_figheight(_INCHES[1] + 0.14 * len(found))
    _save(figure, path)


@dataclass(frozen=True)
class Correlation:
    """How a measure of several networks goes with the ease of attack.

    Attributes:
        measure: "ν/n", "μ/n", "Σ/parameters" or another.
        networks: how many.
        rho: Spearman's rank correlation; NaN where one side is constant.
        p: of a two-sided permutation test.
    """

    measure: str
    networks: int
    rho: float
    p: float


def attack_correlation(
    networks: Sequence[tuple[Nullity, float]], resamples: int = 9999, measures: Measures = MEASURES
) -> list[Correlation]:
    """Whether nullity predicts how easily networks are attacked, the question that the paper leaves open.

    Networks of one name, an architecture trained from several seeds, count as one with their means: seeds are alike,
    and would make chance look like evidence.

    Args:
        networks: each with its ease of attack, such as the share of images that one budget breaks, or the reciprocal
            of the median length of a minimal perturbation.
        resamples: permutations of the test.
        measures: what to compare with, by name.

    Raises:
        ValueError: fewer than four networks, of which no order tells anything.
    """
    values, ease = _means(networks, measures)
    return [rank_correlation(name, values[name], ease, resamples) for name in measures]


def rank_correlation(
    measure: str, values: Sequence[float], ease: Sequence[float], resamples: int = 9999
) -> Correlation:
    """Spearman's rank correlation over networks, with a two-sided permutation test, seeded.

    Args:
        measure: what the values are.
        values: of the networks.
        ease: of attack, in the same order.
        resamples: permutations of the test.

    Raises:
        ValueError: fewer than four networks, or two lengths.
    """
    import numpy as np
    from scipy import stats  # seconds to import

    if len(values) != len(ease) or len(ease) < _FEWEST:
        raise LipsimError(f"expected at least {_FEWEST} networks to rank, got {len(values)} and {len(ease)} values")
    ranks = [stats.rankdata(side) - (len(ease) + 1) / 2 for side in (values, ease)]
    scale = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    if not scale > 0:  # all alike, or one is NaN
        return Correlation(measure, len(ease), math.nan, math.nan)

    def rho(order: Any, axis: int) -> Any:
        return (order * ranks[0]).sum(axis) / scale

    test = stats.permutation_test(
        (ranks[1],), rho, permutation_type="pairings", n_resamples=resamples, rng=0, vectorized=True
    )
    return Correlation(measure, len(ease), float(test.statistic), float(test.pvalue))


def correlation_rows(found: Mapping[str, Sequence[Correlation]]) -> list[Row]:
    """A row for each ease of attack and each measure."""
    return [
        {
            "ease of attack": ease,
            "measure": each.measure,
            "networks": str(each.networks),
            "rank correlation": "" if math.isnan(each.rho) else f"{each.rho:+.2f}",
            "p": "" if math.isnan(each.p) else f"{each.p:.3f}",
        }
        for ease, correlations in found.items()
        for each in correlations
    ]


def plot_correlation(
    path: Path, networks: Sequence[tuple[Nullity, float]], ease: str, found: Sequence[Correlation]
) -> None:
    """The ease of attack over each measure, a point an architecture.

    Args:
        path: file to write; its suffix says which kind.
        networks: as for :func:`attack_correlation`.
        ease: what the second of each pair is.
        found: what :func:`attack_correlation` says of them, for the titles.
    """
    figure, panels = _figure(len(MEASURES))
    values, heights = _means(networks, MEASURES)
    titles = {each.measure: f"ρ = {each.rho:+.2f}, p = {each.p:.2g}" for each in found}
    for name, axes in zip(MEASURES, panels, strict=True):
        axes.plot(values[name], heights, "o", ms=3)
        axes.set_xlabel(name, fontsize=8)
        axes.set_title(titles.get(name, ""), fontsize=8)
    panels[0].set_ylabel(ease, fontsize=8)
    _save(figure, path)


def _means(networks: Sequence[tuple[Nullity, float]], measures: Measures) -> tuple[dict[str, list[float]], list[float]]:
    """Of each measure and of the ease of attack, means over the networks of one name."""
    groups: dict[str, list[tuple[Nullity, float]]] = {}
    for found, ease in networks:
        groups.setdefault(found.model, []).append((found, ease))
    values = {
        name: [sum(measure(found) for found, _ in group) / len(group) for group in groups.values()]
        for name, measure in measures.items()
    }
    return values, [sum(ease for _, ease in group) / len(group) for group in groups.values()]


def _cells(found: Nullity) -> dict[str, str]:
    return {"n": str(found.n), **{name: f"{measure(found):.4f}" for name, measure in MEASURES.items()}}


def _figure(panels: int) -> tuple[Any, Any]:
    """A figure of panels side by side, with small letters."""
    import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(panels * _INCHES[0] * 0.8, _INCHES[1]), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.tick_params(labelsize=7)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from lipsim.results.plots import save  # imports matplotlib

    save(figure, path, dpi=150)
