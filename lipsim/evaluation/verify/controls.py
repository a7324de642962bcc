"""Positive controls: problems whose answer is known, and faults planted in the metric under test.

A check that reports no violation says something only if it reports these. :mod:`lipsim.evaluation.verify.tight` has the
problems that need no attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipsim import audit
from lipsim.audit import lower_bounds
from lipsim.certificates.geometry import cosine_distance
from lipsim.evaluation.verify.claims import (
    TOLERANCE,
    Answers,
    Outcome,
    attack,
    attack_pixels,
    decision_claims,
    distance_claims,
    retrieval_claims,
)
from lipsim.layers import exact_copy
from lipsim.layers.base import FoldedLayer, LipschitzLayer
from lipsim.metric import PerceptualMetric
from lipsim.students import OrthogonalProjection
from lipsim.utils.sampling import cpu_seed

INFLATION = 1.02
Images = tuple[Tensor, Tensor, Tensor]

_SIDE = 8  # of the images of the linear controls
_SHARE = 0.25
_FLAT = ("reference", "retrieval, top 1", "retrieval, top 3", "pixels")


@dataclass(frozen=True)
class Control:
    """A fault or a known problem: whether the check saw it, and by what."""

    name: str
    caught: bool
    evidence: str


def linear_controls(seed: int = 0, kinds: Sequence[str] | None = None) -> list[Control]:
    """Encoders with orthonormal rows, where the smallest change is known.

    In the plane and without an anchor every certificate is exact: each ratio must be 1, and each kind must report
    radii that are 2 % too large.

    Args:
        seed: of the problems.
        kinds: of certificates, by name; None: all.
    """
    with cpu_seed(seed):
        anchored = PerceptualMetric(exact_copy(OrthogonalProjection(_SIDE, 24).double()), _SIDE, lipschitz=1.0)
        anywhere = torch.rand(3, 6, 3, _SIDE, _SIDE, dtype=torch.float64)
        plane = PerceptualMetric(exact_copy(OrthogonalProjection(_SIDE, 2).double()), _SIDE, anchor=0.0, lipschitz=1.0)
        in_plane, pixel_problem = _plane_images(plane), _pixel_problem()
    controls = []
    for metric, images, names in (
        (anchored, (anywhere[0], anywhere[1], anywhere[2]), ("reference",)),
        (plane, in_plane, kinds),
    ):
        if kinds is not None and not set(names or ()) & {*kinds} - {"pixels"}:
            continue
        where = f"orthonormal encoder, anchor {metric.anchor:g}"
        controls.append(_exact(where, _attack_all(metric, images, names)))
        metric.lipschitz = 1 / INFLATION
        controls.append(_inflated(where, _attack_all(metric, images, names)))
    if kinds is not None and "pixels" not in kinds:
        return controls
    metric, triplet = pixel_problem
    controls.append(_exact("one linear feature", [attack_pixels(metric, *triplet)]))
    metric.lipschitz = 1 / INFLATION
    controls.append(_inflated("one linear feature", [attack_pixels(metric, *triplet)]))
    return controls


def mutant_controls(metric: PerceptualMetric, images: Images, seed: int = 0) -> list[Control]:
    """Faults planted in the metric under test.

    Args:
        metric: in float64, as :func:`lipsim.layers.exact_copy` makes it; it is not changed.
        images: reference, left and right, ``(N, 3, H, W)`` float64; few suffice.
        seed: of the attacks.
    """
    from torchvision.transforms import Normalize  # seconds to import

    scaled, name = _scaled(metric)
    deviation = Normalize([0.5] * 3, [0.226] * 3)
    # As long as the features: a smaller fault drowns where these are long, and no attack could see it.
    other = metric.anchor + float(metric.encoder(images[0]).norm(dim=1).mean())

    def answers(distance: Callable[[Tensor, Tensor], Tensor]) -> Answers:
        return Answers(metric.encoder, distance)

    return [
        _network_fault(f"{name} × 1.05", metric, scaled, images, seed),
        _network_fault("wrong std", metric, nn.Sequential(deviation, metric.encoder), images, seed),
        _answer_fault(
            f"anchor {other:.3g}, not {metric.anchor:g}",
            metric,
            answers(lambda z, y: cosine_distance(z, y, other)),
            images,
        ),
        _answer_fault("no projection", metric, answers(lambda z, y: (z - y).square().sum(-1) / 2), images),
        _half_precision(metric, images),
    ]


def _attack_all(metric: PerceptualMetric, images: Images, names: Sequence[str] | None) -> list[Outcome]:
    claims = [
        *decision_claims(metric, *images),
        *distance_claims(metric, images[0], images[1], shares=(_SHARE,)),
        *retrieval_claims(metric, images[0], torch.cat(images[1:])),
    ]
    return [
        outcome
        for claim in claims
        if names is None or claim.kind in names
        for outcome in attack(claim, metric.encoder, steps=30)
    ]


def _exact(name: str, outcomes: list[Outcome]) -> Control:
    """Every change found is as long as the radius: to 1e-9 where the boundary is flat, to 1e-6 elsewhere."""
    errors = {outcome.kind: float((outcome.found / outcome.radius - 1).abs().max()) for outcome in outcomes}
    wrong = [kind for kind, error in errors.items() if not error <= TOLERANCE * (1 if kind in _FLAT else 1e3)]
    wrong += [outcome.kind for outcome in outcomes if outcome.violations.any()]
    evidence = f"‖δ‖/R within {max(errors.values()):.1e} of 1 for {', '.join(errors)}"
    return Control(f"{name}: exact", not wrong, f"wrong for {', '.join(wrong)}" if wrong else evidence)


def _inflated(name: str, outcomes: list[Outcome]) -> Control:
    """Every kind reports violations."""
    silent = [outcome.kind for outcome in outcomes if not outcome.violations.any()]
    count = sum(int(outcome.violations.sum()) for outcome in outcomes)
    total = sum(len(outcome.radius) for outcome in outcomes)
    evidence = f"{count} violations of {total} radii of {len(outcomes)} kinds"
    evidence += f", none of {', '.join(silent)}" if silent else ""
    return Control(f"{name}: radii 2 % too large", not silent, evidence)


def _plane_images(metric: PerceptualMetric) -> Images:
    """Six triplets with the candidates on either side of the reference, so that all three can turn at once."""
    draw = torch.rand(3, 6, dtype=torch.float64)
    turns = torch.stack([torch.zeros(6).double(), 0.2 + 0.3 * draw[0], -0.6 - 0.3 * draw[1]])
    turns = turns + 2 * math.pi * draw[2]
    norms = 1 + torch.rand(3, 6, dtype=torch.float64)
    features = torch.stack([turns.cos(), turns.sin()], -1) * norms[..., None]
    base = torch.full((3, 6, 3, _SIDE, _SIDE), 0.5, dtype=torch.float64)
    # The rows are orthonormal: their transpose leads to images with any features.
    _, pull_back = torch.func.vjp(metric.encoder, base.flatten(0, 1))  # type: ignore[misc]
    missing = features.flatten(0, 1) - metric.encoder(base.flatten(0, 1))
    reference, left, right = (base + pull_back(missing)[0].view_as(base)).unbind(0)
    return reference, left, right


def _pixel_problem() -> tuple[PerceptualMetric, Images]:
    """One triplet that five pixels flip and four cannot; a radius that is 2 % too large claims five."""
    x = torch.rand(1, 3, _SIDE, _SIDE, dtype=torch.float64)
    far = (x < 0.5).to(x) - x
    cost = far.square().sum(1).flatten()
    worst = (cost >= cost.sort().values[-5]).view(1, 1, _SIDE, _SIDE)
    direction = torch.where(worst, far, 0.0)
    length = direction.norm()
    linear = nn.Linear(x.numel(), 2).double().requires_grad_(False)
    other = torch.randn(x.numel(), dtype=torch.float64)
    unit = direction.flatten() / length
    other = other - (other @ unit) * unit
    linear.weight.copy_(torch.stack([unit, other / other.norm()]))
    # All five pixels in their farthest colour go a thousandth beyond the boundary, where the first feature vanishes.
    linear.bias.copy_(-linear.weight @ x.flatten() + torch.tensor([-0.999 * length, 1.0]))
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), linear), _SIDE, anchor=0.0, lipschitz=1.0)
    sides = [x + ((turn + 0.999 * length) * unit).view_as(x) for turn in (-1.0, 1.0)]
    return metric, (x, sides[0], sides[1])


def _network_fault(name: str, metric: PerceptualMetric, encoder: nn.Module, images: Images, seed: int) -> Control:
    """Another network behind the Lipschitz bound of this one."""
    bound, caught = metric.lipschitz, []
    mutant = PerceptualMetric(encoder, metric.image_size, metric.anchor, lipschitz=bound)
    (outcome,) = attack(decision_claims(mutant, *images)[0], encoder, steps=20, polish=20, seed=seed)
    if outcome.violations.any():
        caught.append(f"attack, ‖δ‖/R = {float(outcome.ratios.min()):.3f}")
    growth = lower_bounds.attack_lipschitz(encoder, images[0], steps=20)
    if growth > bound * (1 + TOLERANCE):
        caught.append(f"growth {growth:.3f}")
    try:
        audited = audit.lipschitz_bound(encoder, metric.image_size).total
        if audited > bound * (1 + 1e-4):
            caught.append(f"audit, {audited:.3f}")
    except audit.UnboundedModuleError:
        pass  # whose encoder nobody can audit: only an attack can see the fault
    return Control(name, bool(caught), "; ".join(caught) or f"growth {growth:.3f} of {bound:.3f}")


def _answer_fault(name: str, metric: PerceptualMetric, answers: Answers, images: Images) -> Control:
    """Answers by another distance than the certificates are about."""
    claims = [decision_claims(metric, *images, answers)[0], *distance_claims(metric, *images[:2], answers)]
    for claim in claims:
        (outcome,) = attack(claim, answers.encoder, steps=10, polish=5)
        if outcome.violations.any():
            return Control(name, True, f"{claim.kind}, {int(outcome.violations.sum())} of {len(outcome.radius)} broken")
    return Control(name, False, "nothing broke")


def _half_precision(metric: PerceptualMetric, images: Images) -> Control:
    """Weights in bfloat16 must be refused; features that were rounded to it must break what float64 claims."""

    def rounded(x: Tensor) -> Tensor:
        z: Tensor = metric.encoder(x)
        return z + (z.bfloat16().to(z) - z).detach()  # with the gradient of the unrounded features

    control = _answer_fault("half precision", metric, Answers(rounded, Answers.of(metric).distance), images)
    half = PerceptualMetric(exact_copy(metric.encoder, torch.bfloat16), metric.image_size, lipschitz=metric.lipschitz)
    try:
        half.check_precision()
    except ValueError:
        return Control(control.name, True, f"weights refused; rounded features: {control.evidence}")
    refused = next(half.parameters(), None) is None
    return Control(control.name, control.caught and refused, control.evidence)


def _scaled(metric: PerceptualMetric) -> tuple[nn.Module, str]:
    """The encoder with the weights of one layer times 1.05, the one that the audit notices most, and its name."""
    best, name, most = None, "", -math.inf
    for path, layer in metric.encoder.named_modules():
        if not isinstance(layer, FoldedLayer | nn.Linear | nn.Conv2d) and not _fixed_weights(layer):
            continue
        encoder = exact_copy(metric.encoder)
        part = encoder.get_submodule(path) if path else encoder
        if isinstance(part, FoldedLayer):
            part.pin(tuple(1.05 * weight for weight in part.weights()))
        elif fixed := _fixed_weights(part):
            for weight in fixed:
                weight.mul_(1.05)
        else:
            part.weight.mul_(1.05)  # type: ignore[operator]
        try:
            audited = audit.lipschitz_bound(encoder, metric.image_size).total
        except audit.UnboundedModuleError:
            audited = 0.0
        if audited > most:
            best, name, most = encoder, f"{type(part).__name__} {path}".strip(), audited
        if audited >= 1.04 * metric.lipschitz:
            break
    return (metric.encoder, "no layer with weights") if best is None else (best, name)


def _fixed_weights(layer: nn.Module) -> list[Tensor]:
    """What a layer of this package multiplies by and nothing trains, such as wavelets."""
    if not isinstance(layer, LipschitzLayer) or next(layer.parameters(), None) is not None:
        return []
    return [buffer for buffer in layer.buffers(recurse=False) if buffer.is_floating_point()]
