"""Scores against hand counts."""

from __future__ import annotations

import math

import pytest
import torch

from lipsim.evaluation.scores import CertifiedCurve, CertifiedScore, RadiusStatistics, TwoAFCScore, triplet_metrics

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
    expected = {"certified_0": 3 / 5, "certified_0.125": 2 / 5, "certified_0.5": 1 / 5, "certified_0.9": 1 / 5}
    assert {name: value.item() for name, value in score.compute().items()} == pytest.approx(expected)
    single = CertifiedScore([0.5])
    single.update(MARGIN, radius, VOTES, INDEX)
    assert single.compute() == {"certified_0.5": pytest.approx(1 / 5)}


def test_certified_curve() -> None:
    curve = CertifiedCurve([0.0, 0.125, 0.5])
    curve.update(MARGIN, torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 0.125]), VOTES, INDEX)
    assert curve.compute().tolist() == [[0.0, 0.125, 0.5], pytest.approx([3 / 5, 2 / 5, 1 / 5])]


def test_radius_statistics() -> None:
    score = RadiusStatistics()
    score.update(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 1, 2]))
    expected = {"radius_mean": 2, "radius_median": 2, "radius_min": 1, "radius_max": 3}
    assert {k: v.item() for k, v in score.compute().items()} == expected
    score.update(torch.tensor([6.0]), torch.tensor([3]))
    assert score.compute()["radius_median"] == 2.5  # between the two in the middle


def test_collection_has_a_name_for_every_number() -> None:
    collection = triplet_metrics([36 / 255, 0.5, 2.0], prefix="test/")
    radius = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 0.125])
    for rows in (slice(0, 4), slice(2, 6)):
        part = {"margin": MARGIN, "radius": radius, "right_vote": VOTES, "index": INDEX}
        collection.update(**{name: column[rows] for name, column in part.items()})
    scores = collection.compute()
    assert {k: v.item() for k, v in scores.items()} == pytest.approx(
        {
            "test/majority_score": 3 / 5,
            "test/vote_score": (1 + 1 + 0.2 + 0.5 + 0.5 + 0.6) / 6,
            "test/certified_36/255": 2 / 5,
            "test/certified_0.5": 1 / 5,
            "test/certified_2": 0,
            "test/radius_mean": radius.mean().item(),
            "test/radius_median": 0.75,
            "test/radius_min": 0,
            "test/radius_max": 3,
        }
    )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="eps ≥ 0"):
        CertifiedScore([-0.1])
    with pytest.raises(ValueError, match="eps ≥ 0"):
        CertifiedScore([math.nan])
    with pytest.raises(ValueError, match="'majority' or 'vote'"):
        TwoAFCScore("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no triplet was seen"), pytest.warns(UserWarning, match="compute"):
        TwoAFCScore().compute()


def test_samples_of_two_sets_with_one_index() -> None:
    """Rows (set, index) tell them apart; the index alone does not."""
    both = [torch.stack([torch.full_like(INDEX, number), INDEX], dim=1) for number in (0, 1)]
    alone, together = TwoAFCScore("majority"), TwoAFCScore("majority")
    for index, sign in zip(both, (1, -1), strict=True):
        alone.update(sign * MARGIN, VOTES, INDEX)
        together.update(sign * MARGIN, VOTES, index)
    together.update(MARGIN[:2], VOTES[:2], both[0][:2])  # repeated, and counted once
    # Of the five untied votes 3 agree as they are (see above), and 1 where every margin is turned around.
    assert alone.compute().item() == pytest.approx(3 / 5)
    assert together.compute().item() == pytest.approx((3 + 1) / 10)
    with pytest.raises(ValueError, match="whole numbers"):
        RadiusStatistics().update(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"for 2 samples, got \(3,\)"):
        RadiusStatistics().update(torch.ones(2), torch.arange(3))
