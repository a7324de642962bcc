"""Curves for an HTML page as SVG: where its points, ticks and labels go; ``templates/run.html.jinja`` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]  # (x, y), ascending in x

# Pixels. The legend stands to the right, where each name is beside its line.
_WIDTH, _HEIGHT = 760, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 520, 12, 196
_MOST_POINTS = 400  # of a line: about one a pixel
_MOST_DOTS = 40  # a line of fewer points shows where they are
_LINE_HEIGHT = 18
_LEAST, _MOST = 1e-150, 1e150  # values between, of which differences and parts are floats as well
# Lines are told apart by their dashes as well; the colours differ in brightness.
_STYLES = (
    *(("#0b3c8c", ""), ("#c2410c", "7 3"), ("#15803d", "2 3"), ("#7e22ce", "9 3 2 3")),
    *(("#0e7490", "14 4"), ("#a16207", "4 2 1 2")),
)


@dataclass(frozen=True)
class Tick:
    """A value at an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point of a line, in pixels."""

    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """A curve: its points as SVG has them, its style, and its place in the legend."""

    name: str
    last: str
    points: str
    dots: list[Dot]
    colour: str
    dash: str
    label_at: int


@dataclass(frozen=True)
class Chart:
    """What a template needs to draw some curves over the steps."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    height: int
    width: int = _WIDTH
    left: int = _LEFT
    right: int = _RIGHT
    bottom: int = _BOTTOM


def chart(title: str, curves: Mapping[str, Points], *, percent: bool = False) -> Chart | None:
    """Curves over the steps; of many points, means of neighbours. None where no point can be drawn.

    Args:
        title: what a reader who cannot see it is told.
        curves: name → points.
        percent: y is a share, which the axis has in %, from 0 to 1.
    """
    finite = {name: [(x, y if abs(y) > _LEAST else 0.0) for x, y in p if abs(y) < _MOST] for name, p in curves.items()}
    drawn = {name: thinned(points) for name, points in finite.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_values, y_values = (
        ticks(0.0, max(xs), 6, whole=True),
        ticks(*(0.0, 1.0) if percent else (min(ys), max(ys)), 6),
    )
    x_range = (0.0, max(xs))
    y_range = (min(*y_values, *ys), max(*y_values, *ys))

    def place(x: float, y: float) -> Dot:
        return Dot(_scaled(x, x_range, _LEFT, _RIGHT), _scaled(y, y_range, _BOTTOM, _TOP))

    lines = []
    for number, (name, points) in enumerate(drawn.items()):
        colour, dash = _STYLES[number % len(_STYLES)]
        dots = [place(x, y) for x, y in points]
        last = finite[name][-1][1]
        lines.append(
            Line(
                name,
                f"{100 * last:.1f} %" if percent else f"{last:.4g}",
                " ".join(f"{dot.x:g},{dot.y:g}" for dot in dots),
                dots if len(dots) <= _MOST_DOTS else [],
                colour,
                dash,
                _TOP + 6 + _LINE_HEIGHT * number,
            )
        )
    return Chart(
        title,
        lines,
        [Tick(_scaled(x, x_range, _LEFT, _RIGHT), f"{x:,.0f}") for x in x_values if x_range[0] <= x <= x_range[1]],
        [Tick(_scaled(y, y_range, _BOTTOM, _TOP), f"{100 * y:.0f} %" if percent else f"{y:g}") for y in y_values],
        max(_BOTTOM + 40, _TOP + _LINE_HEIGHT * len(lines) + 6),
    )


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most so many points: means of neighbours, in steps of equal count; the last one stands for itself."""
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 1) / (most - 1))
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About so many round values that span a range: multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.13, 0.92, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:  # a single value
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _scaled(value: float, span: tuple[float, float], start: float, end: float) -> float:
    low, high = span
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)
