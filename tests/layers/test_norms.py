"""Bounds on operator norms against exact values."""

from __future__ import annotations

import math

import pytest
import torch

from lipsim.layers.norms import conv_norm_bound, gram_iteration_bound, matrix_norm_bound, row_norms


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_gram_iteration_bounds_the_norm_from_above(taps: int, stride: int) -> None:
    for channels in ((3, 5), (5, 3)):
        kernel = torch.randn(*channels, taps, taps, dtype=torch.float64)
        norm = conv_norm_bound(kernel, (stride, stride), num_frequencies=512)
        bounds = [float(gram_iteration_bound(kernel, stride, t)) for t in (2, 3, 4, 5, 6)]
        assert all(norm * (1 - 1e-4) <= bound for bound in bounds)  # 512 samples are good to 2e-4
        assert bounds == sorted(bounds, reverse=True) and bounds[-1] <= 1.05 * norm


def test_norm_bounds_lie_above_the_exact_values() -> None:
    matrix = torch.randn(40, 30, dtype=torch.float64)
    exact = float(torch.linalg.svdvals(matrix)[0])
    assert exact <= matrix_norm_bound(matrix) <= exact * (1 + 1e-11)
    assert matrix_norm_bound(torch.full((2, 2), math.nan)) == math.inf
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    fine = conv_norm_bound(kernel, num_frequencies=1024)
    assert fine <= conv_norm_bound(kernel) <= fine * 1.003
    assert conv_norm_bound(kernel, num_frequencies=32) <= fine * 1.011
    # Two taps have the response 1 + exp(iω), whose largest value 2 lies between the samples for odd counts.
    for count in (7, 9, 11, 64):
        assert conv_norm_bound(torch.ones(1, 1, 1, 2).flip(3) * torch.tensor([1.0, -1.0]), num_frequencies=count) >= 2


@pytest.mark.parametrize("exponent", [-323, -320, -165, 0, 155, 160, 305])
def test_bounds_follow_the_scale_of_the_weight(exponent: int) -> None:
    scale = 10.0**exponent
    eye = scale * torch.eye(3, dtype=torch.float64)
    # Below 1e-307 numbers have fewer digits, and a bound is one of them above.
    for matrix in (eye, 1j * eye, torch.stack([eye, 0 * eye])):
        assert scale <= matrix_norm_bound(matrix) <= scale * (1 + 1e-13) + 5e-324
    kernel = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for function in (conv_norm_bound, gram_iteration_bound, lambda k: conv_norm_bound(k, (2, 2), (1, 1), 2)):
        assert float(function(kernel * scale)) == pytest.approx(float(function(kernel)) * scale, rel=1e-12, abs=1e-322)
        assert float(function(torch.sign(kernel) * scale)) >= scale
    kernel[0, 0, 0, 0] = 1e300  # next to it all others vanish, and it alone is the norm
    assert 1e300 <= conv_norm_bound(kernel) <= 1.01e300


def test_what_no_number_holds_has_an_infinite_bound() -> None:
    assert matrix_norm_bound(torch.full((3, 3), 1.5e308, dtype=torch.float64)) == math.inf
    assert conv_norm_bound(torch.full((1, 3, 3, 3), 1.5e308, dtype=torch.float64)) == math.inf
    assert matrix_norm_bound(torch.zeros(3, 4)) == conv_norm_bound(torch.zeros(3, 4, 1, 1)) == 0


def test_row_norms_neither_vanish_nor_overflow() -> None:
    rows = torch.tensor([[3e-200, 4e-200], [3e200, -4e200], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(row_norms(rows), rows.new_tensor([5e-200, 5e200, 0.0]), rtol=1e-15, atol=0)
    assert row_norms(rows[:, :0]).tolist() == [0.0, 0.0, 0.0]
