"""One run of the check on one metric and some triplets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipsim import audit
from lipsim.attacks.projections import Box
from lipsim.audit import lower_bounds
from lipsim.data.triplet import Triplet
from lipsim.evaluation.verify.claims import (
    TOLERANCE,
    Outcome,
    attack,
    attack_pixels,
    decision_claims,
    distance_claims,
    retrieval_claims,
)
from lipsim.evaluation.verify.controls import Control, linear_controls, mutant_controls
from lipsim.evaluation.verify.tight import tight_controls
from lipsim.layers import exact_copy
from lipsim.layers.encoder import first_weight
from lipsim.metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.terminal import text_table

_BOXES: tuple[Box, ...] = (None, (0.0, 1.0))
_MUTANT_SAMPLES = 2


@dataclass(frozen=True)
class Verification:
    """What a run found.

    Attributes:
        outcomes: one for each kind of certificate, without and with the box.
        controls: the planted faults.
        lipschitz: the bound that the radii divide by.
        audited: the bound that the audit derives; None where it cannot.
        reached: the largest growth found by attacks on the encoder.
        layers: per layer of the audit, its name, bound, and what it reaches.
        failures: one line for each; empty where the metric stands.
    """

    outcomes: tuple[Outcome, ...]
    controls: tuple[Control, ...]
    lipschitz: float
    audited: float | None
    reached: float
    layers: tuple[tuple[str, float, float], ...]
    failures: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether every certificate held and every planted fault was caught."""
        return not self.failures

    @property
    def violations(self) -> int:
        """How many certificates were broken."""
        return sum(int(outcome.violations.sum()) for outcome in self.outcomes)

    def facts(self) -> dict[str, Any]:
        """Everything but the images, for JSON; infinite where nothing broke is None."""
        rows = []
        for outcome in self.outcomes:
            changes = [value if math.isfinite(value) else None for value in outcome.found.tolist()]
            facts = {"kind": outcome.kind, "box": outcome.box, "violations": int(outcome.violations.sum())}
            rows.append({**facts, **_summary(outcome), "radius": outcome.radius.tolist(), "found": changes})
        return {
            "violations": self.violations,
            "lipschitz": self.lipschitz,
            "audited": self.audited,
            "reached": self.reached,
            "certificates": rows,
            "layers": [dict(zip(("name", "bound", "reached"), layer, strict=True)) for layer in self.layers],
            "controls": [asdict(control) for control in self.controls],
            "failures": list(self.failures),
        }

    def __str__(self) -> str:
        rows = []
        for outcome in self.outcomes:
            facts, count = _summary(outcome), len(outcome.radius)
            ratios = ("", "", "")
            if facts["min"] is not None:
                # Seven digits, rounded down: 0.99999999 must not read as 1.
                smallest = math.floor(facts["min"] * 1e7) / 1e7
                ratios = f"{smallest:.7f}", f"{facts['median']:.3g}", f"{facts['max']:.3g}"
            violations = f"{int(outcome.violations.sum())} of {count}"
            rows.append((outcome.kind, "yes" if outcome.box else "no", violations, str(facts["broken"]), *ratios))
        headings = ("certificate", "box", "violations", "broken", "‖δ‖/R min", "median", "max")
        audited = "by declaration alone" if self.audited is None else f"audited {self.audited:.9g}"
        controls = [("caught" if control.caught else "MISSED", control) for control in self.controls]
        return "\n".join(
            [
                text_table(headings, rows),
                f"Lipschitz constant: {self.reached:.9g} reached, {self.lipschitz:.9g} claimed, {audited}",
                *(f"{verdict:<8}{control.name}: {control.evidence}" for verdict, control in controls),
                f"violations: {self.violations}",
            ]
        )


def verify(
    metric: PerceptualMetric,
    triplets: Triplet,
    *,
    steps: int = 20,
    polish: int = 40,
    seed: int = 0,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Attack every certificate of a metric on some triplets, in float64, and plant faults that must be caught.

    The network is that of the stored weights in float64 (:func:`lipsim.layers.exact_copy`), without rounding to
    account for; what the metric itself certifies, in its own dtype and with its ``feature_error``, must hold as well.
    A violation is a change with ``‖δ‖ < R(1 − 1e-9)`` after which the answer is strictly another one.

    Args:
        metric: any metric with a bound; it is not changed.
        triplets: ``(N, 3, H, W)`` in [0, 1], of the metric's size.
        steps: of the minimal-norm attack, from each of ten starts, and of five within the box.
        polish: steps of its polish, half of them within the box.
        seed: of starts and controls.
        batch_size: images attacked at a time, most of them at ten places; less for networks that need much memory.
        threads: of the processor, for the time of the check; more than one pay off on large networks only. None: as
            many as torch uses anyway.
        progress: called with the name of what comes next.

    Raises:
        ValueError: the metric has no Lipschitz bound, weights in half precision, or the images are not of its size.
    """
    say = progress or (lambda _: None)
    metric.check_precision()
    if not math.isfinite(metric.lipschitz):
        raise LipsimError("this metric has no Lipschitz bound, so it certifies nothing and there is nothing to verify")
    encoder = exact_copy(metric.encoder)
    exact = PerceptualMetric(encoder, metric.image_size, metric.anchor, lipschitz=metric.lipschitz)
    images = tuple(t.to(metric.device, torch.float64) for t in (triplets.reference, triplets.left, triplets.right))
    reference, left, right = images
    options = {"steps": steps, "polish": polish, "seed": seed, "batch_size": batch_size}
    outcomes: list[Outcome] = []
    with full_precision(), _processor_threads(threads):
        claims = [
            *decision_claims(exact, reference, left, right),
            *distance_claims(exact, reference, left),
            *retrieval_claims(exact, reference, torch.cat([left, right])),
        ]
        for number, claim in enumerate(claims, start=1):
            say(f"attacking {number} of {len(claims) + 1} kinds of certificates, {claim.kind}")
            outcomes += attack(claim, encoder, boxes=_BOXES, **options)
        say(f"attacking {len(claims) + 1} of {len(claims) + 1} kinds of certificates, pixels")
        outcomes.append(_in_batches(lambda *rows: attack_pixels(exact, *rows), images, batch_size))
        say("attacking the Lipschitz constant")
        points = torch.cat([reference, *(outcome.points for outcome in outcomes if outcome.kind == "reference")])
        batches = points.split(batch_size)
        growth = [lower_bounds.attack_lipschitz(encoder, batch) for batch in batches]
        reached = float(torch.tensor(growth, dtype=torch.float64).max())  # NaN must not be lost between numbers
        audited, layers = _audit(metric, batches)
        say("controls where the truth is known")
        controls = [*tight_controls(seed), *linear_controls(seed)]
        say("controls with planted faults")
        few = tuple(t[:_MUTANT_SAMPLES] for t in images)
        controls += mutant_controls(exact, few, seed)  # type: ignore[arg-type]
    failures = [
        f"{outcome.kind} (box {'on' if outcome.box else 'off'}): answer {i} changed at {outcome.found[i]:.9g}, within "
        f"{outcome.radius[i]:.9g}"
        for outcome in outcomes
        for i in outcome.violations.nonzero().flatten().tolist()
    ]
    failures += _deployed(metric, images, outcomes)
    # Negated, so that NaN fails.
    if not reached <= metric.lipschitz * (1 + TOLERANCE):
        failures.append(f"the encoder grows by {reached:.9g}, more than the claimed {metric.lipschitz:.9g}")
    if audited is not None and not audited <= metric.lipschitz * (1 + TOLERANCE):
        failures.append(f"the claimed bound {metric.lipschitz:.9g} is below the audited one, {audited:.9g}")
    failures += [
        f"{name} grows by {value:.9g}, more than its bound {bound:.9g}"
        for name, bound, value in layers
        if not value <= bound * (1 + TOLERANCE)
    ]
    failures += [f"control not caught: {c.name} ({c.evidence})" for c in controls if not c.caught]
    return Verification(
        tuple(outcomes), tuple(controls), metric.lipschitz, audited, reached, tuple(layers), tuple(failures)
    )


@contextmanager
def _processor_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_batches(attack: Callable[..., Outcome], images: tuple[Tensor, ...], size: int) -> Outcome:
    parts = [attack(*rows) for rows in zip(*(t.split(size) for t in images), strict=True)]
    radius, found, points = (torch.cat([getattr(p, name) for p in parts]) for name in ("radius", "found", "points"))
    return replace(parts[0], radius=radius, found=found, points=points)


def _audit(metric: PerceptualMetric, batches: Sequence[Tensor]) -> tuple[float | None, list[tuple[str, float, float]]]:
    """The audited bound, and per layer the bound and the most that the layer reaches at the points."""
    try:
        report = audit.lipschitz_bound(metric.encoder, metric.image_size)
    except audit.UnboundedModuleError:
        return None, []
    names = [layer.name for layer in report.layers]
    norms = [lower_bounds.layer_norms(metric.encoder, points, names) for points in batches]
    reached = {name: float(torch.tensor([batch[name] for batch in norms], dtype=torch.float64).max()) for name in names}
    return report.total, [(f"{row.kind} at '{row.name}'", row.bound, reached[row.name]) for row in report.layers]


def _deployed(metric: PerceptualMetric, images: tuple[Tensor, ...], outcomes: list[Outcome]) -> list[str]:
    """Where the metric itself, in its own dtype, certifies more than the attacks on the exact network leave.

    Without a ``feature_error`` a metric certifies exact arithmetic only, which the outcomes are about.
    """
    weight = first_weight(metric)
    dtype = torch.float64 if weight is None else weight.dtype
    if not metric.feature_error and dtype != torch.float64:
        return []
    certificate = metric.certify(*(t.to(dtype) for t in images))
    radii = {
        "reference": certificate.radius,
        "left": certificate.left_radius,
        "right": certificate.right_radius,
        "joint": certificate.joint_radius,
    }
    return [
        f"{outcome.kind} as deployed: radius {radii[outcome.kind][i]:.9g}, answer {i} changed at {outcome.found[i]:.9g}"
        for outcome in outcomes
        if outcome.kind in radii
        for i in (outcome.found < radii[outcome.kind] * (1 - TOLERANCE)).nonzero().flatten().tolist()
    ]


def _summary(outcome: Outcome) -> dict[str, Any]:
    """How many broke at all, and the distribution of ``‖δ‖/R`` over those with a radius."""
    ratios = outcome.ratios
    names = ("min", "median", "max")
    values = [float(f(ratios)) for f in (torch.min, torch.median, torch.max)] if len(ratios) else [None] * 3
    return {"broken": int(torch.isfinite(outcome.found).sum()), **dict(zip(names, values, strict=True))}
