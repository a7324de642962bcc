"""Certificates whose truth is known where images turn, as :mod:`lipsim.evaluation.verify.tight` says."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim import certificates
from lipsim.evaluation.verify.cases import (
    BEYOND,
    FEATURES,
    SAMPLES,
    Case,
    Setting,
    at_angle,
    distance,
    no_images,
    on_line,
    random_features,
    threshold_radii,
    turned_around,
)


def one_turns(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Images on a line, of which one moves to the foot of the perpendicular from the origin.

    All anchored features of one line lie in a plane, and a move along the line that ends at the foot is perpendicular
    to where it ends: it turns by exactly ``arcsin(Lε/‖e‖)``, with any anchor. So candidates, thresholds and both ends
    of the interval are reached at angles that are not small.
    """
    near = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    gap = torch.tensor([0.05, 0.3, 0.6], dtype=torch.float64)
    foot = on_line(setting, torch.zeros_like(gap))
    cases = []
    # The pivot stays; what moves starts on the near side of the foot and turns away, or beyond it and turns back.
    for away in (True, False):
        angle = near + gap if away else near  # between the pivot and the foot
        pivot, moving = on_line(setting, -angle), on_line(setting, -gap if away else gap)
        length = (foot - moving).norm(dim=1) / setting.lipschitz
        beyond = moving + (1 + BEYOND) * (foot - moving)
        still = turned_around(pivot, foot)
        crossed = distance(pivot, beyond, setting.anchor) > distance(pivot, still, setting.anchor)
        crossed = crossed if away else ~crossed
        images = no_images(pivot)
        first = setting.metric.certify_features(images, pivot, moving, still)
        second = setting.metric.certify_features(images, pivot, still, moving)
        name = "chosen candidate" if away else "other candidate"
        cases += [
            Case(f"{name}, left", first.left_radius, length, broken=crossed),
            Case(f"{name}, right", second.right_radius, length, broken=crossed),
            Case(f"{name}, answer", first.prefers_left.double(), torch.full_like(length, float(away))),
        ]
        threshold = 1 - torch.cos(angle)
        radius = threshold_radii(moving, pivot, threshold, setting.options)
        passed = (distance(pivot, beyond, setting.anchor) > threshold) == away
        cases.append(Case(f"threshold, {'same' if away else 'different'}", radius, length, broken=passed))
        ends = certificates.distance_interval(moving, pivot, length, **setting.options)
        other = certificates.distance_interval(pivot, moving, 0.0, eps_other=length, **setting.options)
        for name, interval in (("distance", ends), ("distance, other moves", other)):
            end = interval[1 if away else 0]
            cases.append(Case(f"{name} {'≤' if away else '≥'}", end, distance(pivot, foot, setting.anchor), upper=away))
    return cases


def all_turn(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Images on a line, close to the foot of the perpendicular, where all of them turn as fast as they can.

    To first order in the angles: at most 1e-6 of a radius is out of reach. The reference moves from the chosen
    candidate, which runs away from it, to the other, which comes to meet it.
    """
    small = 1e-3 * torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    step = 0.1 * small
    near, reference, far = (on_line(setting, turn) for turn in (-0.3 * small, 0 * small, 0.7 * small))
    direction = (far - near) / (far - near).norm(dim=1, keepdim=True)
    length = (on_line(setting, step) - reference).norm(dim=1) * (1 + 1e-5)
    along = length[:, None] * direction
    moved = [distance(reference + along, other - along, setting.anchor) for other in (near, far)]
    both = [setting.metric.certify_features(no_images(near), reference, *pair) for pair in ((near, far), (far, near))]
    cases = [
        Case("joint", c.joint_radius, length / setting.lipschitz, slack=3e-5, broken=moved[0] > moved[1]) for c in both
    ]
    eps = length / setting.lipschitz
    for sign, name in ((1.0, "≤"), (-1.0, "≥")):
        reached = distance(near - sign * along, far + sign * along, setting.anchor)
        end = certificates.distance_interval(near, far, eps, eps_other=eps, **setting.options)[1 if sign > 0 else 0]
        cases.append(Case(f"distance {name}, both move", end, reached, slack=1e-5, upper=sign > 0))
    return cases


def all_turn_in_space(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Images in more than a plane, built back from where the answer changes: a reference as near to both candidates.

    There the boundary's normal is the difference of the directions to both. The reference has come along it, the one
    candidate has turned away from where the reference ends, and the other one to it. Without an anchor, as in
    :func:`from_angles`, but no two turns count twice.
    """
    norms = setting.scale * (4 + 2 * torch.rand(3, SAMPLES, dtype=torch.float64, generator=draw))
    length = setting.scale * (0.1 + 0.4 * torch.rand(SAMPLES, dtype=torch.float64, generator=draw))
    end = F.normalize(random_features(draw, SAMPLES), dim=1)
    tangents = torch.stack([random_features(draw, SAMPLES) for _ in range(2)])
    tangents = F.normalize(tangents - (tangents * end).sum(-1, keepdim=True) * end, dim=-1)
    normal = F.normalize(tangents[0] - tangents[1], dim=1)
    turns = torch.asin(length / norms[1:])
    apart = 0.8 + 0.3 * torch.rand(SAMPLES, dtype=torch.float64, generator=draw)

    def at(angle: Tensor, tangent: Tensor, norm: Tensor) -> Tensor:
        return norm[:, None] * (torch.cos(angle)[:, None] * end + torch.sin(angle)[:, None] * tangent)

    reference = norms[0][:, None] * end + length[:, None] * normal
    near, far = at(apart - turns[0], tangents[0], norms[1]), at(apart + turns[1], tangents[1], norms[2])
    ends = (
        norms[0][:, None] * end,
        *(at(apart, t, n * torch.cos(a)) for t, n, a in zip(tangents, norms[1:], turns, strict=True)),
    )
    moved = [z + (1 + BEYOND) * (e - z) for z, e in zip((reference, near, far), ends, strict=True)]
    broken = distance(moved[0], moved[1], 0.0) > distance(moved[0], moved[2], 0.0)
    first = setting.metric.certify_features(no_images(near), reference, near, far)
    second = setting.metric.certify_features(no_images(near), reference, far, near)
    radius = length / setting.lipschitz
    return [Case("joint", found.joint_radius, radius, broken=broken) for found in (first, second)]


def from_angles(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Features placed at the angles at which a radius that was chosen first solves its equation.

    Not reached where there is an anchor, but nothing larger follows from norms and angles; with the error of given
    features, of which what moves has its own beside the budget.
    """
    anchor, scale = setting.anchor, setting.scale
    norms = scale * (4 + 2 * torch.rand(3, SAMPLES, dtype=torch.float64, generator=draw))
    length = scale * (0.1 + torch.rand(SAMPLES, dtype=torch.float64, generator=draw))
    angle = 0.25 + 0.3 * torch.rand(SAMPLES, dtype=torch.float64, generator=draw)
    reference = torch.zeros(SAMPLES, FEATURES, dtype=torch.float64)
    reference[:, 0] = (norms[0].square() - anchor**2).sqrt()
    radius = length / setting.lipschitz
    cases = []
    for error in (0.0, 0.02 * scale):
        options = {**setting.options, "feature_error": error}
        slack, name = (0.05, ", η") if error else (1e-9, "")
        turn, moved = torch.asin(error / norms), torch.asin((length + error) / norms)
        left = at_angle(reference, angle, norms[1], anchor, 1)
        for index, (kind, gap) in enumerate(
            (("chosen", 2 * turn[0] + moved[1] + turn[2]), ("other", 2 * turn[0] + turn[1] + moved[2]))
        ):
            right = at_angle(reference, angle + gap, norms[2], anchor, 2)
            radii = [
                certificates.candidate_radii(reference, left, right, **options)[index],
                certificates.candidate_radii(reference, right, left, **options)[1 - index],
            ]
            cases += [Case(kind + name, claimed, radius, slack) for claimed in radii]
        # On a line and so in a plane, where the reference turns from one candidate as fast as to the other.
        short, start, near = 0.2 * length, 0.1, 0.3
        sines = (short + error) / on_line(setting, torch.zeros(1).double()).square().sum(1).add(anchor**2).sqrt()
        turned = 2 * torch.asin(sines * math.cos(start)) + torch.asin(sines * math.cos(near))
        far = 2 * start + near + turned
        for _ in range(60):  # a contraction
            far = 2 * start + near + turned + torch.asin(sines * torch.cos(far))
        middle, left, right = (on_line(setting, turn) for turn in (start + 0 * far, -near + 0 * far, far))
        for first, second in ((left, right), (right, left)):
            claimed = certificates.joint_radius(middle, first, second, **options)
            cases.append(Case("joint" + name, claimed, short / setting.lipschitz, slack))
        pivot = at_angle(reference, angle, norms[1], anchor, 1)
        for kind, boundary in (("same", angle + moved[0] + turn[1]), ("different", angle - moved[0] - turn[1])):
            inside = (boundary > 0).nonzero().flatten()
            claimed = threshold_radii(reference[inside], pivot[inside], 1 - torch.cos(boundary[inside]), options)
            cases.append(Case(f"threshold, {kind}{name}", claimed, radius[inside], slack))
        for both in (False, True):
            turned = moved[0] + (moved[1] if both else turn[1])
            eps = {"eps_other": radius if both else 0.0}
            lower, upper = certificates.distance_interval(reference, pivot, radius, **eps, **options)  # type: ignore[arg-type]
            truth = 1 - torch.cos((angle - turned).clamp(min=0)), 1 - torch.cos(angle + turned)
            kind = "distance, both move" if both else "distance"
            # 1 − cos of an angle near 0 has the digits of 1.
            cases.append(Case(f"{kind} ≥{name}", lower + 1, truth[0] + 1, slack))
            cases.append(Case(f"{kind} ≤{name}", upper, truth[1], slack, upper=True))
    return cases
