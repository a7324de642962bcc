"""Faults planted in certificates: each makes a named control fail, and `lipsim verify` with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lipsim import PerceptualMetric, certificates
from lipsim.certificates.geometry import Anchored, project
from lipsim.certificates.rounding import Features
from lipsim.data.registry import sample_triplets
from lipsim.evaluation.verify import verify
from lipsim.evaluation.verify.tight import TIGHT, tight_controls
from lipsim.students import SLLNetwork

Function = Callable[..., Any]
Mutant = Mapping[str, Function]

RADII = ("reference_radius", "candidate_radii", "joint_radius", "threshold_radius", "retrieval_radius")
ERROR = (*RADII, "distance_interval")


def _holders(name: str) -> list[ModuleType]:
    """The room and those of its files that know a name: a fault has to be planted in each."""
    files = [module for module in vars(certificates).values() if isinstance(module, ModuleType)]
    return [module for module in (certificates, *files) if hasattr(module, name)]


ORIGINAL: dict[str, Function] = {
    name: getattr(_holders(name)[0], name)
    for name in (
        *ERROR,
        "certified_pixels",
        "linf_radius",
        "l1_radius",
        "resize_norm",
        "original_radius",
        "rotation",
        "published_radius",
    )
}


def _times(name: str, factor: float, anchored: bool = False, part: int | None = None) -> Mutant:
    """A radius times a factor; only where there is an anchor, or only one of a pair."""

    def changed(*args: Any, **options: Any) -> Any:
        found = ORIGINAL[name](*args, **options)
        if anchored and not options["anchor"]:
            return found
        if isinstance(found, tuple):
            return tuple(r * factor if part in (None, i) else r for i, r in enumerate(found))
        return found * factor

    return {name: changed}


def _ignoring(name: str) -> Mutant:
    return _with((name,), feature_error=lambda error: 0.0)


def _halving(name: str) -> Mutant:
    return _with((name,), feature_error=lambda error: error / 2)


def _with(names: tuple[str, ...], **changes: Callable[[float], float]) -> Mutant:
    """Options of certificates replaced by a function of them."""

    def of(name: str) -> Function:
        def changed(*args: Any, **options: Any) -> Any:
            defaults = {"anchor": 1.0, "lipschitz": 1.0, "feature_error": 0.0, **options}
            wrong = {key: change(defaults[key]) for key, change in changes.items()}
            return ORIGINAL[name](*_unprojected(*args), **{**defaults, **wrong})

        return changed

    return {name: of(name) for name in names}


def _tie_is_infinite(name: str) -> Mutant:
    def changed(*args: Any, **options: Any) -> Any:
        found = ORIGINAL[name](*args, **options)
        if isinstance(found, tuple):
            return tuple(torch.where(r == 0, math.inf, r) for r in found)
        return torch.where(found == 0, math.inf, found)

    return {name: changed}


def _no_pi(norm: Tensor, radius: Tensor | float) -> Tensor:
    return torch.asin((radius / norm).clamp(max=1))


def _published(z: Tensor, z0: Tensor, z1: Tensor, *, feature_error: float = 0.0, **options: float) -> Tensor:
    return ORIGINAL["published_radius"](z, z0, z1, **options)


def _published_without_anchor(z: Tensor, z0: Tensor, z1: Tensor, **options: float) -> Tensor:
    return (ORIGINAL["reference_radius"] if options["anchor"] else _published)(z, z0, z1, **options)


def _ends(lower: float = 0.0, upper: float = 0.0) -> Mutant:
    def changed(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        low, high = ORIGINAL["distance_interval"](*args, **options)
        return low + lower * (high - low), high - upper * (high - low)

    return {"distance_interval": changed}


def _one_budget(*args: Any, eps_other: Any = 0.0, **options: Any) -> Any:
    return ORIGINAL["distance_interval"](*args, **options)


def _swapped(*args: Any, **options: Any) -> Any:
    return ORIGINAL["candidate_radii"](*args, **options)[::-1]


def _unprojected(*features: Any) -> Iterator[Any]:
    """Features as they were before a certificate projected them with the anchor that it has."""
    return (t.z if isinstance(t, Anchored) else t for t in features)


def _signed(z: Features, z0: Features, z1: Features, *, feature_error: float = 0.0, **options: float) -> Tensor:
    return certificates.signed_reference_radius(*_unprojected(z, z0, z1), **options)


def _no_anchor_part(
    z: Features, z0: Features, z1: Features, *, anchor: float, lipschitz: float, feature_error: float = 0.0
) -> Tensor:
    reference, left, right = _unprojected(z, z0, z1)
    w = project(left, anchor)[0] - project(right, anchor)[0]
    return (reference * w).sum(-1).abs() / (lipschitz * w.norm(dim=-1))


def _always_top_1(*args: Any, k: int = 1, **options: Any) -> Any:
    return ORIGINAL["retrieval_radius"](*args, k=1, **options)


def _nearest_float(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


def _about(name: str) -> str:
    """The control that is about a certificate everywhere."""
    return "reference and" if name in ("reference_radius", "retrieval_radius") else "features at angles"


def _error_of(name: str) -> str:
    """The control that is about a certificate with an error of the features."""
    return "error of features" if name in ("reference_radius", "retrieval_radius") else "features at angles"


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "joint × 1.02, anchored": ("all images turn", _times("joint_radius", 1.02, anchored=True)),
    "joint × 1.2, anchored": ("all images turn", _times("joint_radius", 1.2, anchored=True)),
    "candidates × 1.02, anchored": ("one image turns", _times("candidate_radii", 1.02, anchored=True)),
    "threshold × 1.02, anchored": ("one image turns", _times("threshold_radius", 1.02, anchored=True)),
    "ℓ∞ of a third of the values": ("ℓ∞", {"linf_radius": lambda radius, n: radius / math.sqrt(n / 3)}),
    "ℓ1 × 50": ("ℓ∞", {"l1_radius": lambda radius: 50 * radius}),
    "resize of norm 0.1": ("ℓ∞", {"resize_norm": lambda original, image_size: 0.1}),
    "η ignored": ("error", _with(ERROR, feature_error=lambda error: 0.0)),
    "η once": ("float32", _with(ERROR, feature_error=lambda error: error / 2)),
    "no rounding": (
        "near-duplicates",
        {"rounding_error": lambda z: 0.0, "round_down": _nearest_float, "round_up": _nearest_float},
    ),
    "no π beyond the norm": ("budgets", {"rotation": _no_pi}),
    "a tie of radius ∞": ("ties", _tie_is_infinite("reference_radius")),
    "reference × 1.02": ("reference and", _times("reference_radius", 1.02)),
    "reference × 1.02, anchored": ("reference and", _times("reference_radius", 1.02, anchored=True)),
    "reference, signed": ("reference and", {"reference_radius": _signed}),
    "reference, no anchor part": ("reference and", {"reference_radius": _no_anchor_part}),
    "reference, published": ("reference and", {"reference_radius": _published}),
    "reference, published without an anchor": ("reference and", {"reference_radius": _published_without_anchor}),
    "retrieval × 1.02": ("reference and", _times("retrieval_radius", 1.02)),
    "retrieval, top 1 for every k": ("reference and", {"retrieval_radius": _always_top_1}),
    "left × 1.02": ("one image turns", _times("candidate_radii", 1.02, part=0)),
    "right × 1.02": ("one image turns", _times("candidate_radii", 1.02, part=1)),
    "candidates swapped": ("features at angles", {"candidate_radii": _swapped}),
    "joint × 1.02": ("features at angles", _times("joint_radius", 1.02)),
    "joint × 1.001, in space": ("all three in space", _times("joint_radius", 1.001)),
    "joint × 0.999, in space": ("all three in space", _times("joint_radius", 0.999)),
    "threshold × 1.02": ("features at angles", _times("threshold_radius", 1.02)),
    "lower end 1 % too high": ("one image turns", _ends(lower=0.01)),
    "upper end 1 % too low": ("one image turns", _ends(upper=0.01)),
    "second budget ignored": ("all images turn", {"distance_interval": _one_budget}),
    "ℓ∞ × 1.02": ("ℓ∞", _times("linf_radius", 1.02)),
    "ℓ1 × 1.02": ("ℓ∞", _times("l1_radius", 1.02)),
    "resize norm × 0.98": ("ℓ∞", _times("resize_norm", 0.98)),
    "radius of a file × 1.02": ("ℓ∞", _times("original_radius", 1.02)),
    "radius of a file without rounding": (
        "ℓ∞",
        {"original_radius": lambda r, size, side: r / certificates.resize_norm(size, side)},
    ),
    "rounding of angles ignored": ("near-duplicates", {"rounding_error": lambda z: 0.0}),
    "radii to the nearest float": ("near-duplicates", {"round_down": _nearest_float}),
    "upper ends to the nearest float": ("near-duplicates", {"round_up": _nearest_float}),
    **{f"{name}: a tie of ∞": ("ties", _tie_is_infinite(name)) for name in RADII[1:]},
    **{f"{name}: η ignored": (_error_of(name), _ignoring(name)) for name in ERROR},
    **{f"{name}: half of η": (_error_of(name), _halving(name)) for name in ERROR},
    **{f"{name}: L ignored": (_about(name), _with((name,), lipschitz=lambda bound: 1.0)) for name in ERROR},
    **{f"{name}: L²": (_about(name), _with((name,), lipschitz=lambda bound: bound**2)) for name in ERROR},
    **{f"{name}: no anchor": (_about(name), _with((name,), anchor=lambda anchor: 0.0)) for name in ERROR},
    **{f"{name}: anchor 1": (_about(name), _with((name,), anchor=lambda anchor: 1.0)) for name in ERROR},
}


def _plant(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    for name, replacement in mutant.items():
        for module in _holders(name):
            monkeypatch.setattr(module, name, replacement)


def test_sound_certificates_pass() -> None:
    controls = tight_controls()
    assert [control.evidence for control in controls if not control.caught] == []
    assert len(controls) == len(TIGHT) == len({control.name for control in controls})


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_certificate_fails_the_control_about_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start, mutant = MUTANTS[name]
    _plant(monkeypatch, mutant)
    ((control, settings),) = [(control, settings) for title, control, settings in TIGHT if title.startswith(start)]
    draw = torch.Generator().manual_seed(0)
    assert [fault for setting in settings for case in control(setting, draw) for fault in case.faults()]


def _metric() -> PerceptualMetric:
    """A loose network with an anchor: no attack on it comes near its radii."""
    torch.manual_seed(0)
    return PerceptualMetric(SLLNetwork(16, 8, channels=8, depth=1, linear_depth=1, linear_width=8), 16)


# Each control is seeded for itself, so the other mutants fail the same one here as they do above.
@pytest.mark.parametrize("name", [None, "joint × 1.02, anchored", "no π beyond the norm", "a tie of radius ∞"])
def test_verify_reports_a_wrong_certificate_of_a_loose_network(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    for slow in ("attack", "linear_controls", "mutant_controls"):  # which do not see these faults on this network
        monkeypatch.setattr(f"lipsim.evaluation.verify.check.{slow}", lambda *_, **__: [])
    start, mutant = MUTANTS[name] if name else ("", {})
    metric = _metric()
    _plant(monkeypatch, mutant)
    failures = verify(metric, sample_triplets("builtin", 1, 16, resize="float")).failures
    if name:
        assert any(line.startswith(f"control not caught: {start}") for line in failures), failures
    else:
        assert failures == ()


def test_an_error_that_counts_once_fails_on_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a metric passes the error of one embedding on, its float32 answers flip within the radius."""
    options = PerceptualMetric.certificate_options.fget  # type: ignore[attr-defined]
    once = property(lambda metric: {**options(metric), "feature_error": metric.feature_error})
    monkeypatch.setattr(PerceptualMetric, "certificate_options", once)
    (control,) = [control for control in tight_controls() if not control.caught]
    assert control.name.startswith("float32") and "too much" in control.evidence


@pytest.mark.parametrize("name", ["reference_radius", "distance_bounds", "certify_features"])
def test_a_method_that_claims_more_than_its_function_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    method = getattr(PerceptualMetric, name)
    changed = {
        "reference_radius": lambda *args: 1.5 * method(*args),
        "distance_bounds": lambda metric, x, y, eps: method(metric, x, y, eps / 2),
        "certify_features": lambda *args: dataclasses.replace(c := method(*args), joint_radius=1.02 * c.joint_radius),
    }[name]
    monkeypatch.setattr(PerceptualMetric, name, changed)
    assert "what users call" in [control.name for control in tight_controls() if not control.caught]


def test_an_answer_turned_around_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    margin = certificates.margin
    _plant(monkeypatch, {"margin": lambda *args, **options: -margin(*args, **options)})
    missed = [control.evidence for control in tight_controls() if not control.caught]
    assert any("answer" in evidence for evidence in missed)
