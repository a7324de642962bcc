"""Several runs that differ in their seed alone: means, and what a mean is uncertain by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lipsim.results.schema import Scores

K = TypeVar("K")
T = TypeVar("T")


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]


def mean_and_error(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean of the values that are there, and its standard error ``s/√n``, of which one value has none.

    Example:
        >>> mean_and_error([0.8, 0.9, None])
        (0.85, 0.05)
        >>> mean_and_error([0.8])
        (0.8, None)
    """
    found = known(values)
    if not found:
        return None, None
    mean = statistics.fmean(found)
    if len(found) == 1:
        return mean, None
    # statistics works in exact fractions; rounded to what a double tells, 0.05 and not 0.04999999999999999.
    return float(f"{mean:.15g}"), float(f"{statistics.stdev(found) / math.sqrt(len(found)):.15g}")


def mean_cell(values: Iterable[float | None], form: str = ".1f", factor: float = 1.0) -> str:
    """``84.3``, or ``84.3 ± 0.4`` of several values; empty where there is none.

    Example:
        >>> mean_cell([0.8, 0.9], factor=100), mean_cell([None])
        ('85.0 ± 5.0', '')
    """
    mean, error = mean_and_error(values)
    if mean is None:
        return ""
    cell = format(factor * mean, form)
    return cell if error is None else f"{cell} ± {format(factor * error, form)}"


def percent_cell(values: Iterable[float | None]) -> str:
    """:func:`mean_cell` of scores in [0, 1], in %."""
    return mean_cell(values, factor=100.0)


def percent_cells(scores: Sequence[Scores], labels: Iterable[str]) -> dict[str, str]:
    """:func:`percent_cell` at each label that some run has; the others are empty."""
    return {label: percent_cell(score.get(label) for score in scores) for label in labels}


def by_name(found: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """What belongs to each name, in the order in which they come first."""
    groups: dict[K, list[T]] = {}
    for name, content in found:
        groups.setdefault(name, []).append(content)
    return groups


def seeds_note(groups: Mapping[str, Sequence[object]]) -> str:
    """What a title says of cells that are means; nothing where each is of one run."""
    counts = sorted({len(group) for group in groups.values()})
    if not counts or counts[-1] == 1:
        return ""
    return f"; mean ± standard error of {counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} runs"
