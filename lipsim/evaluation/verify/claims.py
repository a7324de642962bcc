"""What a metric claims to be certain of, one kind of certificate at a time, and the attacks on each.

A claim comes from a metric and is about *answers*. For an honest check both are of the same metric; the controls of
:mod:`lipsim.evaluation.verify.controls` let them differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipsim import certificates
from lipsim.attacks import minimal_norm
from lipsim.attacks.projections import Box, expand, sample_norm
from lipsim.audit.lower_bounds import jacobian_norm
from lipsim.certificates import TwoAFCCertificate, geometry
from lipsim.metric import PerceptualMetric
from lipsim.utils.sampling import sample_normal

TOLERANCE = 1e-9
STRICT = 1e-14  # a change of a distance counts as one beyond this, two hundred roundings of a distance near 1

# Budgets of the distance intervals, as shares of ‖e‖/L: a wrong distance shows in the small one, a wrong rotation in
# the large one.
_SHARES = (1e-4, 0.25)
_SCALES = (1.0, 1.5, 2.0)
_SWAPS = 3

Features = tuple[Tensor, ...]


@dataclass(frozen=True)
class Answers:
    """Who answers: features of images in float64, and distances ``(N,)`` of features."""

    encoder: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]

    @staticmethod
    def of(metric: PerceptualMetric) -> Answers:
        """Those of a metric."""
        return Answers(metric.encoder, lambda z, y: geometry.cosine_distance(z, y, metric.anchor))


@dataclass(frozen=True)
class Claim:
    """One kind of certificate on N samples.

    Attributes:
        kind: its name.
        images: ``(N·group, 3·parts, H, W)``, what may move.
        radius: ``(N,)``, claimed: nothing that moves each part by less changes the answer.
        value: of the features of the parts, and of ``fixed``; positive where the answer has changed.
        fixed: one row each for the rows of ``images``.
        toward: images to start towards, like ``images``.
        parts: images that move at a time.
        group: rows of ``images`` that are ways to break the same sample.
    """

    kind: str
    images: Tensor
    radius: Tensor
    value: Callable[..., Tensor]
    fixed: Features
    toward: Tensor
    parts: int = 1
    group: int = 1

    def select(self, samples: Tensor) -> Claim:
        """The claim about some of the samples."""
        rows = (samples[:, None] * self.group + torch.arange(self.group)).flatten()
        return replace(
            self,
            images=self.images[rows],
            radius=self.radius[samples],
            fixed=tuple(t[rows] for t in self.fixed),
            toward=self.toward[rows],
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a claim.

    Attributes:
        kind: name of the claim.
        box: whether the images stayed in [0, 1].
        radius: ``(N,)`` claimed; for pixels, the certified number and one more.
        found: ``(N,)`` smallest change that breaks; infinite where none was found.
        points: ``(N, 3, H, W)`` one perturbed image of each sample.
    """

    kind: str
    box: bool
    radius: Tensor
    found: Tensor
    points: Tensor

    @property
    def violations(self) -> Tensor:
        """``(N,)`` bool: the answer changed strictly within the radius."""
        return self.found < self.radius * (1 - TOLERANCE)

    @property
    def ratios(self) -> Tensor:
        """``‖δ‖/R`` of the samples that broke and have a radius."""
        keep = torch.isfinite(self.found) & (self.radius > 0)
        return self.found[keep] / self.radius[keep]


class _ClaimObjective:
    """A claim as an objective of the attacks."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], claim: Claim, fixed: Features) -> None:
        self.encoder, self.claim, self.fixed = encoder, claim, fixed

    def __call__(self, x: Tensor) -> Tensor:
        z = self.encoder(x.unflatten(1, (self.claim.parts, 3)).flatten(0, 1))
        return self.claim.value(z.unflatten(0, (len(x), -1)).unbind(1), *self.fixed) - STRICT

    def select(self, rows: Tensor) -> _ClaimObjective:
        return _ClaimObjective(self.encoder, self.claim, tuple(t[rows] for t in self.fixed))


@torch.no_grad()
def decision_claims(
    metric: PerceptualMetric, reference: Tensor, left: Tensor, right: Tensor, answers: Answers | None = None
) -> list[Claim]:
    """The radii of the reference, of each candidate and of all three, on triplets ``(N, 3, H, W)`` in float64."""
    answers = answers or Answers.of(metric)
    certificate = _certify(metric, reference, left, right)
    sign = torch.where(certificate.prefers_left, 1.0, -1.0).to(reference)
    z, z0, z1 = (answers.encoder(images) for images in (reference, left, right))

    def flipped(z: Tensor, z0: Tensor, z1: Tensor, sign: Tensor) -> Tensor:
        return sign * (answers.distance(z, z0) - answers.distance(z, z1))

    far = torch.where(expand(sign > 0, left), right, left)
    return [
        Claim(
            "reference",
            reference,
            certificate.radius,
            lambda m, z0, z1, s: flipped(m[0], z0, z1, s),
            (z0, z1, sign),
            far,
        ),
        Claim("left", left, certificate.left_radius, lambda m, z, z1, s: flipped(z, m[0], z1, s), (z, z1, sign), right),
        Claim(
            "right", right, certificate.right_radius, lambda m, z, z0, s: flipped(z, z0, m[0], s), (z, z0, sign), left
        ),
        Claim(
            "joint",
            torch.cat([reference, left, right], 1),
            certificate.joint_radius,
            lambda m, s: flipped(m[0], m[1], m[2], s),
            (sign,),
            torch.cat([far, right, left], 1),
            parts=3,
        ),
    ]


@torch.no_grad()
def distance_claims(
    metric: PerceptualMetric, x: Tensor, y: Tensor, answers: Answers | None = None, shares: tuple[float, ...] = _SHARES
) -> list[Claim]:
    """Both ends of the interval of ``d(x, y)``, for one and for two moving images, and thresholds on either side."""
    answers = answers or Answers.of(metric)
    z, zy, fixed = metric.encoder(x), metric.encoder(y), answers.encoder(y)
    distance, theta = geometry.cosine_distance(z, zy, metric.anchor), geometry.angle(z, zy, metric.anchor)
    # A budget that reaches distance 0 claims nothing about the lower end.
    reach, sine = geometry.anchored_norm(z, metric.anchor) / metric.lipschitz, torch.sin(theta / 2)
    away = 2 * x - y

    def above(m: Features, other: Tensor, bound: Tensor) -> Tensor:
        return answers.distance(m[0], other) - bound

    def below(m: Features, other: Tensor, bound: Tensor) -> Tensor:
        return bound - answers.distance(m[0], other)

    claims = []
    for share in shares:
        eps = reach * torch.minimum(sine, torch.full_like(sine, share))
        lower, upper = certificates.distance_interval(z, zy, eps, **metric.certificate_options)
        claims.append(Claim(f"distance ≤, ε {share:g}", x, eps, above, (fixed, upper), away))
        claims.append(Claim(f"distance ≥, ε {share:g}", x, eps, below, (fixed, lower), y))
    eps = reach.minimum(geometry.anchored_norm(zy, metric.anchor) / metric.lipschitz)
    eps = eps * torch.minimum(sine / 2, torch.full_like(sine, shares[-1]))
    lower, upper = certificates.distance_interval(z, zy, eps, eps_other=eps, **metric.certificate_options)
    pair = torch.cat([x, y], 1)
    claims += [
        Claim(
            "distance ≤, both move",
            pair,
            eps,
            lambda m, bound: answers.distance(m[0], m[1]) - bound,
            (upper,),
            torch.cat([away, 2 * y - x], 1),
            2,
        ),
        Claim(
            "distance ≥, both move",
            pair,
            eps,
            lambda m, bound: bound - answers.distance(m[0], m[1]),
            (lower,),
            torch.cat([y, x], 1),
            2,
        ),
    ]
    for name, thresholds, value, toward in (
        ("threshold, same", torch.minimum(1.3 * distance, 1 + distance / 2), above, away),
        ("threshold, different", 0.7 * distance, below, y),
    ):
        options = metric.certificate_options
        radius = torch.cat(
            [
                certificates.threshold_radius(z[i : i + 1], zy[i : i + 1], float(t), **options)
                for i, t in enumerate(thresholds)
            ]
        )
        claims.append(Claim(name, x, radius, value, (fixed, thresholds), toward))
    return claims


@torch.no_grad()
def retrieval_claims(
    metric: PerceptualMetric, query: Tensor, gallery: Tensor, answers: Answers | None = None
) -> list[Claim]:
    """The sets of the nearest and of the three nearest of a gallery ``(M, 3, H, W)``.

    A set has changed where an item of it is farther than one outside. The swaps that are tried are those whose boundary
    is nearest by the metric's own features.
    """
    answers = answers or Answers.of(metric)
    z, zg, fixed = metric.encoder(query), metric.encoder(gallery), answers.encoder(gallery)
    distance = geometry.cosine_distance(z[:, None], zg[None], metric.anchor)
    order = distance.argsort(dim=1, stable=True)
    p, s = geometry.project(zg, metric.anchor)
    claims = []
    for k in (1, 3):
        if k >= len(gallery):
            continue
        inside = order[:, :k].repeat_interleave(len(gallery) - k, dim=1)
        outside = order[:, k:].repeat(1, k)
        gap = distance.gather(1, outside) - distance.gather(1, inside)
        width = torch.hypot((p[inside] - p[outside]).norm(dim=2), s[inside] - s[outside])
        swaps = (gap / width.clamp(min=1e-30)).argsort(dim=1)[:, :_SWAPS]
        group = swaps.shape[1]
        inner, outer = (items.gather(1, swaps).flatten() for items in (inside, outside))
        claims.append(
            Claim(
                f"retrieval, top {k}",
                query.repeat_interleave(group, dim=0),
                certificates.retrieval_radius(z, zg, k=k, **metric.certificate_options),
                lambda m, a, b: answers.distance(m[0], a) - answers.distance(m[0], b),
                (fixed[inner], fixed[outer]),
                gallery[outer],
                group=group,
            )
        )
    return claims


def attack(
    claim: Claim,
    encoder: Callable[[Tensor], Tensor],
    *,
    boxes: Sequence[Box] = (None,),
    steps: int = 20,
    polish: int = 40,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Outcome]:
    """Look for the smallest change that breaks a claim, once within each box.

    Starts: the images themselves, and at 1, 1.5 and 2 radii a random direction, the one towards ``claim.toward`` and
    the top singular vector of the encoder's Jacobian, upwards. Within a further box: the images, what was found within
    the one before, which is close already and gets half the polish, and the three directions at 1.5 radii.

    Args:
        claim: what to break.
        encoder: answers, in float64.
        boxes: ranges of valid images, the widest first; None for all of ℝⁿ.
        steps: gradient steps from each start.
        polish: steps of the polish.
        seed: of the random starts, with the position of the image.
        batch_size: images at a time, each of which is at ten places.
    """
    size = max(1, batch_size // claim.group)
    chunks = torch.arange(len(claim.radius)).split(size)
    parts = [_attack_rows(claim.select(rows), rows, encoder, boxes, steps, polish, seed) for rows in chunks]
    outcomes = []
    for box, within in zip(boxes, zip(*parts, strict=True), strict=True):
        found, points = (torch.cat(tensors) for tensors in zip(*within, strict=True))
        outcomes.append(Outcome(claim.kind, box is not None, claim.radius, found, points))
    return outcomes


def _attack_rows(
    claim: Claim,
    index: Tensor,
    encoder: Callable[[Tensor], Tensor],
    boxes: Sequence[Box],
    steps: int,
    polish: int,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """For each box the smallest change of each sample, and one perturbed image."""
    objective = _ClaimObjective(encoder, claim, claim.fixed)
    x, index = claim.images, index.repeat_interleave(claim.group)
    radius = claim.radius.repeat_interleave(claim.group)
    radius = torch.where(torch.isfinite(radius) & (radius > 0), radius, 1e-3)
    directions = []
    for direction in (
        sample_normal(x, seed=seed, index=index),
        claim.toward - x,
        _singular(encoder, objective, claim, index),
    ):
        by_part = direction.unflatten(1, (claim.parts, 3))
        unit = by_part / by_part.flatten(2).norm(dim=2).clamp(min=1e-30)[..., None, None, None]
        directions.append(expand(radius, x) * unit.flatten(1, 2))
    starts = [x, *(x + scale * direction for direction in directions for scale in _SCALES)]
    results = []
    for box in boxes:
        x_adv = minimal_norm(
            objective,
            x,
            steps=steps,
            box=box,
            polish=polish,
            starts=torch.stack(starts),
            parts=claim.parts,
            seed=seed,
            index=index,
        )
        with torch.no_grad():
            broken = objective(x_adv) > 0
        norms = sample_norm(x_adv - x, parts=claim.parts)
        found = torch.where(broken, norms, math.inf).view(-1, claim.group).amin(1)
        results.append((found, x_adv[:: claim.group, :3].detach()))
        starts = [x, x_adv, *(x + _SCALES[1] * direction for direction in directions)]
        polish = (polish + 1) // 2
    return results


def attack_pixels(
    metric: PerceptualMetric, reference: Tensor, left: Tensor, right: Tensor, answers: Answers | None = None
) -> Outcome:
    """Recolour the certified number of pixels of the reference, and more, until the answer changes.

    Which pixels and colours: those that gain most on the objective linearised at the previous choice, repeatedly.
    """
    answers = answers or Answers.of(metric)
    claim = decision_claims(metric, reference, left, right, answers)[0]
    objective = _ClaimObjective(answers.encoder, claim, claim.fixed)
    certified = _certify(metric, reference, left, right).pixels
    most = reference[0, 0].numel()
    # The certified number itself first; then doubled until it breaks, then halved intervals down to the least.
    low, found, points = torch.full_like(certified, -1), torch.full_like(certified, most + 1), reference.clone()
    count = certified
    while True:
        recoloured, broken = _recolour(objective, reference, count)
        points = torch.where(expand(broken, points), recoloured, points)
        found = torch.where(broken, torch.minimum(found, count), found)
        low = torch.where(broken, low, torch.maximum(low, count))
        middle = torch.where(found > most, (2 * count + 1).clamp(max=most), (low + found) // 2)
        done = (found - low <= 1) | (low >= most)
        if done.all():
            break
        count = torch.where(done, found.clamp(max=most), middle)
    pixels = torch.where(found > most, math.inf, found.double())
    return Outcome("pixels", True, certified.double() + 1, pixels, points)


def _certify(metric: PerceptualMetric, reference: Tensor, left: Tensor, right: Tensor) -> TwoAFCCertificate:
    """Certificates of images of any range, which :meth:`lipsim.PerceptualMetric.certify` need not take."""
    z, z0, z1 = (metric.encoder(images) for images in (reference, left, right))
    return metric.certify_features(reference, z, z0, z1)


def _recolour(objective: _ClaimObjective, x: Tensor, count: Tensor, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """Change ``count`` pixels of each image ``(N, 3, H, W)`` for the worst; the images, and whether each broke."""
    # The pixels that can move furthest, and those where the gradient is largest, are the first choices.
    far = (x < 0.5).to(x)
    best, best_value = x.clone(), torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    for start in (x, far):
        current = x if start is x else _top_pixels(x, far, (far - x).square().sum(1), count)
        for _ in range(iterations):
            current = current.detach().requires_grad_()
            value = objective(current)
            (gradient,) = torch.autograd.grad(value.sum(), current)
            with torch.no_grad():
                better = value > best_value
                best = torch.where(expand(better, x), current.detach(), best)
                best_value = torch.where(better, value.detach(), best_value)
                colour = (gradient > 0).to(x)
                current = _top_pixels(x, colour, (gradient * (colour - x)).sum(1), count)
    return best, best_value > 0


def _top_pixels(x: Tensor, colour: Tensor, gain: Tensor, count: Tensor) -> Tensor:
    """The image with the ``count`` pixels of largest gain ``(N, H, W)`` in their new colour."""
    rank = gain.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view_as(gain)
    return torch.where((rank < count[:, None, None])[:, None], colour, x)


def _singular(encoder: Callable[[Tensor], Tensor], objective: _ClaimObjective, claim: Claim, index: Tensor) -> Tensor:
    """Top singular vectors of the encoder's Jacobian at the images, in the direction in which the objective grows."""
    x = claim.images.unflatten(1, (claim.parts, 3))
    images = index.repeat_interleave(claim.parts)
    direction = jacobian_norm(encoder, x.flatten(0, 1), iterations=10, index=images)[1].unflatten(0, x.shape[:2])
    moving = claim.images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(moving).sum(), moving)
    along = (gradient.view_as(x) * direction).flatten(2).sum(2)
    sign = torch.where(along < 0, -1.0, 1.0).to(x)
    ascent: Tensor = (direction * sign[..., None, None, None]).flatten(1, 2)
    return ascent
