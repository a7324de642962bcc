"""Bounds on operator norms against exact values."""

from __future__ import annotations

import math

import pytest
import torch

from lipsim.layers.norms import conv_norm_bound, gram_iteration_bound, matrix_norm_bound


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
