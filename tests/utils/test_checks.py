"""Numbers and images are checked where they enter, with the remedy for each mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lipsim.certificates.numbers import check_count, check_number
from lipsim.utils.checks import check_images, check_range


@pytest.mark.parametrize("value", [-1e-300, -1e4, math.nan, math.inf, True, "0.1", None, [1.0], torch.tensor(math.nan)])
def test_numbers_that_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a finite anchor ≥ 0, got"):
        check_number("anchor", value)


def test_numbers_that_are_taken() -> None:
    assert check_number("anchor", np.float32(0.5)) == 0.5 and check_number("anchor", 0) == 0.0
    assert check_number("anchor", torch.tensor(2.0)) == 2.0
    assert check_number("bound", math.inf, above=True, finite=False) == math.inf
    for value, options in ((0.0, {"above": True}), (3, {"most": 2}), (0.01, {"least": 1}), (10**400, {})):
        with pytest.raises(ValueError, match="expected a finite factor"):
            check_number("factor", value, **options)
    assert check_count("image_size", 64) == 64
    for size in (64.0, -64, 0, True, "64"):
        with pytest.raises(ValueError, match="whole number image_size ≥ 1"):
            check_count("image_size", size)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda x: x * 255, "divide 8-bit images by 255"),
        (lambda x: x * 65535, "divide 16-bit images by 65535"),
        (lambda x: x * 2 - 1, r"images in \[-1, 1\] become \(x \+ 1\) / 2"),
        (lambda x: (x - 0.45) / 0.226, r"x \* std \+ mean"),
        (lambda x: x * 1.1, "clamp"),
        (lambda x: x - 0.1, "clamp"),
        (lambda x: x / 0.0, "images .0, 1. of the batch have NaN or infinite pixels"),
        (lambda x: x.log().sqrt(), "NaN or infinite"),
    ],
)
def test_each_range_has_its_remedy(change, remedy: str) -> None:  # type: ignore[no-untyped-def]
    x = torch.linspace(0, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    check_range(x)
    check_range(x * (1 + 5e-7))  # what rounding leaves
    check_range(x[:0])
    with pytest.raises(ValueError, match=remedy):
        check_range(change(x))


@pytest.mark.parametrize(
    ("x", "remedy"),
    [
        (torch.rand(3, 8, 8), r"x\.unsqueeze\(0\)"),
        (torch.rand(8, 8, 3), r"x\.permute\(2, 0, 1\)\.unsqueeze\(0\)"),
        (torch.rand(8, 8), r"x\.expand\(3, -1, -1\)\.unsqueeze\(0\)"),
        (torch.rand(1, 8, 8), r"x\.expand\(3, -1, -1\)\.unsqueeze\(0\)"),
        (torch.rand(5, 8, 8), r"x\.unsqueeze\(1\)\.expand\(-1, 3, -1, -1\)"),
        (torch.rand(2, 8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 1, 8, 8), r"expand\(-1, 3, -1, -1\)"),
        (torch.rand(2, 4, 8, 8), "transparency"),
        (torch.rand(2, 8, 8, 4), "transparency"),
        (torch.rand(2, 9, 9, 3), r"metric\.read"),
        (torch.rand(2, 3, 9, 8), r"metric\.read"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "floating-point"),
        (np.zeros((2, 3, 8, 8)), r"got ndarray; metric\.read"),
        ([torch.rand(3, 8, 8)], r"got list; metric\.read"),
        ("x.png", r"got str; metric\.read makes one of paths"),
    ],
)
def test_each_shape_has_its_remedy(x: torch.Tensor, remedy: str) -> None:
    check_images(torch.rand(2, 3, 8, 8), 8)
    with pytest.raises(ValueError, match=remedy):
        check_images(x, 8)
