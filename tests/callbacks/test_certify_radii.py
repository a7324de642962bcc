"""The settings of the callback; what it writes is tested with the stages (tests/training/test_stages.py)."""

from __future__ import annotations

import math

import pytest

from lipsim.callbacks import CertifyRadii


@pytest.mark.parametrize("factor", [-1e4, 0.01, 0.999, math.nan, math.inf, True, "4", None])
def test_factors_that_do_not_enlarge_are_refused(factor: object) -> None:
    with pytest.raises(ValueError, match="error_factor ≥ 1"):
        CertifyRadii(error_factor=factor)  # type: ignore[arg-type]
    assert CertifyRadii(error_factor=1).error_factor == 1


@pytest.mark.parametrize("sample", [-1, 2.5, True, math.nan])
def test_samples_that_no_set_has_are_refused(sample: object) -> None:
    with pytest.raises(ValueError, match="error_sample ≥ 0"):
        CertifyRadii(error_sample=sample)  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [[math.nan], [-0.1], [math.inf], [True], ["0.1"]])
def test_budgets_that_are_no_numbers_are_refused(eps: list[float]) -> None:
    with pytest.raises(ValueError, match="budget eps ≥ 0"):
        CertifyRadii(eps=eps)
