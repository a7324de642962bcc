"""Width, distillation and attacks, against what is known of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn

from lipsim.analysis.nullity import LayerNullity, Nullity, nullity
from lipsim.analysis.nullity_studies import (
    attack_correlation,
    comparison_rows,
    correlation_rows,
    plot_comparisons,
    plot_correlation,
    plot_widths,
    rank_correlation,
    teacher_against_student,
    width_rows,
    width_sweep,
)


def test_wider_layers_have_larger_kernels() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 4, 3))

    sums = [found.sum_nullity for _, found in width_sweep(build, [2, 4, 8, 16])]
    # Full rank: (27 − w)₊ + 8w + (9w − 4).
    assert sums == [max(0, 27 - w) + 8 * w + 9 * w - 4 for w in (2, 4, 8, 16)]


def network(name: str, cols: int) -> Nullity:
    """One weight of rank 1 with so many columns, another that has no kernel."""
    return Nullity(name, (LayerNullity("0", "Linear", 1, cols, 1), LayerNullity("1", "Linear", 3, 2, 2)), 100)


def test_the_table_and_plot_of_widths(tmp_path: Path) -> None:
    sweeps = {"linear": width_sweep(lambda width: nn.Linear(2 * width, width, bias=False), [2, 4])}
    rows = width_rows(sweeps)
    assert [(row["width"], row["Σ nullity"], row["Σ/parameters"]) for row in rows] == [
        ("2", "2", "0.2500"),
        ("4", "4", "0.1250"),
    ]
    plot_widths(tmp_path / "widths.png", sweeps)
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_a_student_beside_its_teacher(tmp_path: Path) -> None:
    teacher = nullity(nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False)), "teacher")
    student = nullity(nn.Linear(8, 2, bias=False), "student")
    (found,) = teacher_against_student(iter([(teacher, student)]))
    # Σ/parameters: 4/(32 + 16) of the teacher, 6/16 of the student.
    assert found.differences == pytest.approx({"ν/n": 0.5, "μ/n": 0.5, "Σ/parameters": 6 / 16 - 4 / 48})
    difference = comparison_rows([found])[2]
    assert (difference["n"], difference["μ/n"], difference["Σ/parameters"]) == ("-1", "+0.5000", "+0.2917")
    plot_comparisons(tmp_path / "pairs.pdf", [found])
    assert (tmp_path / "pairs.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="at least one pair"):
        teacher_against_student([])


def test_rank_correlation_over_networks(tmp_path: Path) -> None:
    networks = [(network(str(k), k), k**2.0) for k in (1, 3, 4, 6, 9, 12)]
    correlations = attack_correlation(networks, 999)
    found = {each.measure: each for each in correlations}
    assert found["Σ/parameters"].rho == pytest.approx(1)
    assert found["Σ/parameters"].p == pytest.approx(2 / 720)  # of 6! orders, all are tried: this one and its reverse
    row = correlation_rows({"broken": correlations})[2]
    assert (row["rank correlation"], row["p"], row["networks"]) == ("+1.00", "0.003", "6")
    plot_correlation(tmp_path / "attacks.png", networks, "broken", correlations)
    assert (tmp_path / "attacks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least 4 networks"):
        attack_correlation([(network("a", 2), 1.0)])


def test_seeds_of_an_architecture_are_no_further_evidence() -> None:
    once = [(network(str(k), k), 1.0 / k) for k in (3, 4, 6, 9, 12)]
    (first, second) = (attack_correlation(networks)[2] for networks in (once, [*once, *once, *once]))
    assert first == second
    assert first.networks == 5 and first.rho == pytest.approx(-1)


def test_constant_measures_have_no_correlation_and_ties_share_a_rank() -> None:
    assert all(math.isnan(each.rho) for each in attack_correlation([(network(str(k), 3), k) for k in range(5)]))
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5/√(4.5 · 5).
    assert rank_correlation("ties", [1, 5, 5, 7], [1, 2, 3, 4]).rho == pytest.approx(4.5 / 22.5**0.5)
    unknown = rank_correlation("unknown", [1, 2, math.nan, 4, 5], [1, 2, 3, 4, 5])
    assert math.isnan(unknown.rho) and math.isnan(unknown.p)
