"""Scores against hand counts."""

from __future__ import annotations

import math

import pytest
import torch

from lipsim.metrics import CertifiedScore, RadiusStatistics, TwoAFCScore

MARGIN = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4, 0.2])
VOTES = torch.tensor([0.0, 1.0, 0.8, 0.2, 0.5, 0.4])
INDEX = torch.arange(6)


def test_two_afc_scores() -> None:
    majority, vote = TwoAFCScore("majority"), TwoAFCScore("vote")
    for score in (majority, vote):
        score.update(MARGIN[:4], VOTES[:4], INDEX[:4])
        score.update(MARGIN[2:], VOTES[2:], INDEX[2:])  # two samples again
    # Agrees on 0, 1 and 5; wrong on 2; a tie of the metric on 3; 4 has no majority.
    assert majority.compute().item() == pytest.approx(3 / 5)
    assert vote.compute().item() == pytest.approx((1 + 1 + 0.2 + 0.5 + 0.5 + 0.6) / 6)


def test_certified_score_is_strict() -> None:
    radius = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 0.125])
    score = CertifiedScore([0.0, 0.125, 0.5, 0.9])
    score.update(MARGIN, radius, VOTES, INDEX)
    assert score.compute().tolist() == pytest.approx([3 / 5, 2 / 5, 1 / 5, 1 / 5])


def test_radius_statistics() -> None:
    score = RadiusStatistics()
    score.update(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 1, 2]))
    assert {k: v.item() for k, v in score.compute().items()} == {"mean": 2, "median": 2, "min": 1, "max": 3}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="eps ≥ 0"):
        CertifiedScore([-0.1])
    with pytest.raises(ValueError, match="eps ≥ 0"):
        CertifiedScore([math.nan])
    with pytest.raises(ValueError, match="'majority' or 'vote'"):
        TwoAFCScore("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no triplet was seen"), pytest.warns(UserWarning, match="compute"):
        TwoAFCScore().compute()
