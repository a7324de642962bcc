"""Axes of appearance: steps, ranges, moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lipsim.data.builtin.factors import Factor, move, move_size, sample_values


@dataclass(frozen=True)
class Point:
    a: float
    b: float
    c: float = 7.0


FACTORS = (Factor("a", -2.0, 2.0, step=0.5), Factor("b", 1.0, 16.0, step=np.log(2), log=True, start=(2.0, 4.0)))


def test_steps() -> None:
    assert move_size(Point(0, 1), Point(1.5, 16), FACTORS) == pytest.approx(5)  # 3 steps of a, 4 doublings of b
    assert FACTORS[1].from_steps(FACTORS[1].to_steps(3.0)) == pytest.approx(3.0)


@pytest.mark.parametrize("num_moved", [1, 2])
def test_moves_have_their_size_where_there_is_room(num_moved: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = move(Point(0, 4), FACTORS, 1.7, rng, num_moved=num_moved)
        assert move_size(Point(0, 4), moved, FACTORS) == pytest.approx(1.7)
        assert moved.c == 7.0
        assert (moved.a != 0) + (moved.b != 4) == num_moved


def test_moves_stay_in_range_and_turn_round() -> None:
    factor = FACTORS[0]
    assert factor.shift(1.5, 2) == pytest.approx(0.5)
    assert factor.shift(0.0, 9) == pytest.approx(-2.0)
    assert factor.shift(-2.0, -3) == pytest.approx(-0.5)


def test_samples_cover_the_starting_range() -> None:
    rng = np.random.default_rng(0)
    values = np.array([list(sample_values(FACTORS, rng).values()) for _ in range(500)])
    assert (values.min(axis=0) >= (-2, 2)).all() and (values.max(axis=0) <= (2, 4)).all()
    assert np.median(values[:, 1]) == pytest.approx(8**0.5, rel=0.05)  # even in the logarithm
