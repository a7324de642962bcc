"""Sections of results.json for tests, with chosen scores."""

from __future__ import annotations

from typing import Any

from lipsim.results import eps_label
from lipsim.results.schema import AttackedSection, CertifiedSection, Scores, SmoothedSection

SOURCE = {"weights_sha256": "w", "data_sha256": {"builtin": "d"}}


def certified_section(sets: dict[str, list[float]], eps: list[float], **changed: Any) -> CertifiedSection:
    """Scores at each ε by set; the published radius has half of them, the joint one a quarter.

    ``changed`` are fields of each set, and ``source`` of the section.
    """
    source = changed.pop("source", SOURCE)
    labels = list(map(eps_label, eps))
    found = {}
    for name, scores in sets.items():
        kinds: dict[str, list[float | None]] = {
            kind: [score / by for score in scores] for kind, by in (("certified", 1), ("published", 2), ("joint", 4))
        }
        found[name] = {
            "num_triplets": 200,
            "num_tied_votes": 0,
            "majority": 0.9,
            "vote": changed.get("majority", 0.9),
            **{kind: dict(zip(labels, values, strict=True)) for kind, values in kinds.items()},
            "radius": {"mean": 1.0, "median": 1.0, "min": 0.0, "max": 2.0},
            "one_pixel_immune": 0.5,
            "curve": {"eps": eps, **kinds},
            **changed,
        }
    return {  # type: ignore[typeddict-item]
        **source,
        "lipschitz": 1.00001,
        "layers": {"first": 1.00001},
        "anchor": 1.0,
        "feature_error": 1e-6,
        "feature_error_kind": "searched",
        "feature_error_sample": 32,
        "feature_error_factor": 2.0,
        "resize": "float",
        "precision": "full",
        "eps": eps,
        "sets": found,
    }


def attacked_section(metrics: dict[str, tuple[float, Scores]], eps: list[float], **changed: Any) -> AttackedSection:
    """What attacks leave of each metric on the set "builtin"; ``changed`` are fields of the section."""
    found = {
        name: {"natural": natural, "no_gradient": 0, "attacked": left, "after": {"apgd": left, "square": left}}
        for name, (natural, left) in metrics.items()
    }
    return {  # type: ignore[typeddict-item]
        **SOURCE,
        "suite": False,
        "attacks": ["apgd", "square"],
        "norm": 2,
        "target": "reference",
        "steps": 20,
        "restarts": 1,
        "queries": 100,
        "seed": 0,
        "eps": eps,
        "sets": {"builtin": {"num_triplets": 200, "num_tied_votes": 0, "violations": 0, "metrics": found}},
        **changed,
    }


def smoothed_section(metrics: dict[str, tuple[float, Scores]], eps: list[float], **changed: Any) -> SmoothedSection:
    """Natural and certified scores of smoothed metrics on the set "builtin"; ``changed`` are fields of the section."""
    found = {
        name: {
            "natural": natural,
            "vote": natural,
            "abstained": 0.2,
            "certified": scores,
            "radius": {"mean": 0.3, "median": 0.3, "min": 0.0, "max": 0.6},
            "passes": 1102,
            "passes_per_certified": 1377.5,
            "curve": {"eps": [0.0, *eps], "certified": [natural, *scores.values()]},
        }
        for name, (natural, scores) in metrics.items()
    }
    return {  # type: ignore[typeddict-item]
        **SOURCE,
        "sigma": 0.25,
        "n": 1000,
        "n0": 100,
        "alpha": 0.001,
        "moving": "reference",
        "seed": 0,
        "max_triplets": 200,
        "eps": eps,
        "sets": {"builtin": {"num_triplets": 200, "num_tied_votes": 0, "metrics": found}},
        **changed,
    }
