"""Certificates whose truth is known: no change shorter than it breaks the answer, and one just beyond it does.

What follows from a Lipschitz constant ``L`` is reached by encoders with orthonormal rows times ``L``: a change ``δ`` of
the image moves their features by up to ``L‖δ‖``, in any direction. So most controls are about features alone, and their
lengths are divided by ``L``. The anchor is the coordinate that no image can move, and the reason why a turn of
``arcsin(Lε/‖e‖)`` is reached in some places only; each control says where it looks.

:data:`TIGHT` is the table of them. Truths use neither :mod:`lipsim.certificates.geometry` nor the formulas that
are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim import certificates
from lipsim.evaluation.verify.cases import (
    BEYOND,
    FEATURES,
    SAMPLES,
    SETTINGS,
    SIDE,
    Case,
    Setting,
    at_angle,
    distance,
    hyperplane,
    in_plane,
    nearest,
    no_images,
    random_features,
    resized,
    unit,
)
from lipsim.evaluation.verify.controls import Control
from lipsim.evaluation.verify.exact import rounding_excess
from lipsim.evaluation.verify.turning import all_turn, all_turn_in_space, from_angles, one_turns
from lipsim.layers import exact_copy
from lipsim.metric import PerceptualMetric


def reference_and_retrieval(setting: Setting, draw: torch.Generator) -> list[Case]:
    """A reference, or a query, straight to the nearest hyperplane that changes the answer.

    Normalising the reference does not matter to the answer and the anchor does not move, so the way to a hyperplane is
    its distance in feature space, and every certificate of this kind is reached everywhere.
    """
    z, gallery = (setting.scale * random_features(draw, rows) for rows in (SAMPLES, 7))
    units = unit(gallery, setting.anchor)
    left, right = gallery[:1].expand_as(z), gallery[1:2].expand_as(z)
    certificate = setting.metric.certify_features(no_images(z), z, left, right)
    gap, normal = hyperplane(z, units[:1].expand(len(z), -1), units[1:2].expand(len(z), -1), setting.anchor)
    moved = z - (1 + BEYOND) * gap[:, None] * normal
    nearer = [distance(t, left, setting.anchor) < distance(t, right, setting.anchor) for t in (z, moved)]
    cases = [
        Case("reference", certificate.radius, gap.abs() / setting.lipschitz, broken=nearer[0] != nearer[1]),
        Case("answer", certificate.prefers_left.double(), nearer[0].double()),
    ]
    for k in (1, 3, 6):
        inside = nearest(z, units, setting.anchor, k)
        gap, normal = hyperplane(z[:, None, None], units[:, None], units[None], setting.anchor)
        swap = inside[:, :, None] & ~inside[:, None, :]
        best = torch.where(swap, gap.abs(), math.inf).flatten(1).argmin(1)
        rows = torch.arange(len(z))
        length = gap.flatten(1)[rows, best]
        moved = z - (1 + BEYOND) * length[:, None] * normal.flatten(0, 1)[best]
        claimed = certificates.retrieval_radius(z, gallery, k=k, **setting.options)
        changed = (nearest(moved, units, setting.anchor, k) != inside).any(1)
        cases.append(Case(f"retrieval, top {k}", claimed, length.abs() / setting.lipschitz, broken=changed))
    return cases


def reference_error(setting: Setting, draw: torch.Generator) -> list[Case]:
    """The error of given features when the reference moves: of all three images, each for the worst.

    Candidates a thousand times as long as the reference do not turn, and the reference comes nearer by the error. In
    the plane and without an anchor, all three: the boundary is the bisector of the candidates, which turns with both.
    """
    anchor, scale, options = setting.anchor, setting.scale, setting.options
    norms = scale * (4 + 2 * torch.rand(3, SAMPLES, dtype=torch.float64, generator=draw))
    error = 0.04 * scale
    reference = torch.zeros(SAMPLES, FEATURES, dtype=torch.float64)
    reference[:, 0] = (norms[0].square() - anchor**2).sqrt()
    angle = torch.full_like(norms[0], 0.6)
    left = at_angle(reference, angle, 1000 * norms[1], anchor, 1)
    right = at_angle(reference, angle + 0.4, 1000 * norms[2], anchor, 2)
    gap, _ = hyperplane(reference, unit(left, anchor), unit(right, anchor), anchor)
    truth = (gap.abs() - error) / setting.lipschitz
    claimed = certificates.reference_radius(reference, left, right, feature_error=error, **options)
    gallery = torch.stack([left[0], right[0]])
    claimed_query = certificates.retrieval_radius(reference[:1], gallery, k=1, feature_error=error, **options)
    cases = [
        Case("reference, η", claimed, truth, slack=0.05),
        Case("retrieval, η", claimed_query, truth[:1], slack=0.05),
    ]
    if not anchor:
        near, far = 1.45, 1.65
        left, right = (in_plane(norm, turn) for norm, turn in ((norms[1], near), (norms[2], -far)))
        turned = (torch.asin(error / norms[1]) + torch.asin(error / norms[2])) / 2
        truth = (norms[0] * torch.sin((far - near) / 2 - turned) - error) / setting.lipschitz
        claimed = certificates.reference_radius(reference, left, right, feature_error=error, **options)
        cases.append(Case("reference, η of all", claimed, truth, slack=0.1))
    return cases


def large_budgets(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Budgets at and beyond the norm, where a vector can pass the origin and take any direction.

    Without an anchor every distance in [0, 2] is reached, and radii end at the norm of what moves. With one, distances
    far beyond those of a quarter turn are.
    """
    anchor, scale, options = setting.anchor, setting.scale, setting.options
    metric = setting.metric
    cases = []
    if not anchor:
        z, y = in_plane(scale * torch.ones(2).double(), 0.0), in_plane(torch.ones(2).double(), 0.7)
        eps = scale / setting.lipschitz * torch.tensor([1.0 + 1e-9, 3.0], dtype=torch.float64)
        passed = 1e-10 * scale * y
        assert ((passed - z).norm(dim=1) < eps * setting.lipschitz).all()
        intervals = [
            certificates.distance_interval(z, y, eps, **options),
            certificates.distance_interval(y, z, 0.0, eps_other=eps, **options),
        ]
        for lower, upper in intervals:
            cases.append(Case("distance ≥", lower, distance(passed, y, 0.0).round()))
            cases.append(Case("distance ≤", upper, distance(-passed, y, 0.0), upper=True))
        # A short candidate, near the reference; the other one is nearly opposite.
        reference, far = (in_plane(10 * scale * torch.ones(1).double(), turn) for turn in (0.0, -2.9))
        near = in_plane(scale * torch.ones(1).double(), 0.5)
        beyond = -BEYOND / 2 * scale * reference / reference.norm()
        broken = distance(beyond, reference, 0.0) > distance(far, reference, 0.0)
        first = metric.certify_features(no_images(near), reference, near, far)
        second = metric.certify_features(no_images(near), reference, far, near)
        truth = near.norm(dim=1) / setting.lipschitz
        for kind, claimed in (
            ("joint", first.joint_radius),
            ("joint", second.joint_radius),
            ("chosen candidate", first.left_radius),
            ("chosen candidate", second.right_radius),
            ("threshold", certificates.threshold_radius(near, reference, 1.9, **options)),
        ):
            cases.append(Case(f"{kind} up to the norm", claimed, truth, broken=broken))
    else:
        z = in_plane(10 * scale * torch.ones(1).double(), 0.0)
        reach = 3 * (z.square().sum(1) + anchor**2).sqrt()
        for turn, most in ((0.3, True), (2.5, False)):
            y = in_plane(10 * scale * torch.ones(1).double(), turn)
            along = y / y.norm(dim=1, keepdim=True)
            moved = z - reach[:, None] * along if most else z + reach[:, None] * along
            reached = distance(moved, y, anchor)
            eps = reach / setting.lipschitz
            for interval in (
                certificates.distance_interval(z, y, eps, **options),
                certificates.distance_interval(y, z, 0.0, eps_other=eps, **options),
            ):
                kind = f"distance {'≤' if most else '≥'}"
                cases.append(Case(kind, interval[1 if most else 0], reached, slack=math.inf, upper=most))
    return cases


def nothing_is_certain(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Ties, features without a direction or not finite, and encoders without a bound: every radius is 0."""
    anchor = setting.anchor
    z, z0 = (setting.scale * random_features(draw, SAMPLES) for _ in range(2))
    mirror = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    unknown = z.clone()
    unknown[:, 0] = math.nan
    triplets = {
        "equal candidates": (z, z0, z0.clone()),
        "equal images": (z, z.clone(), z.clone()),
        "mirrored candidates": (z * (mirror > 0), z0, mirror * z0),
        "NaN in the reference": (unknown, z, z0),
        "NaN in a candidate": (z, unknown, z0),
        "no bound": (z, z0, z0.flip(0)),
    }
    if not anchor:
        triplets["zero reference"] = (torch.zeros_like(z), z, z0)
    cases, zero = [], torch.zeros(SAMPLES, dtype=torch.float64)
    for name, (reference, left, right) in triplets.items():
        bound = math.inf if name == "no bound" else setting.lipschitz
        options = {"anchor": anchor, "lipschitz": bound}
        metric = PerceptualMetric(nn.Identity(), 1, anchor, lipschitz=bound)
        for first, second in ((left, right), (right, left)):
            certificate = metric.certify_features(no_images(z), reference, first, second)
            radii = {
                "reference": certificate.radius,
                "left": certificate.left_radius,
                "right": certificate.right_radius,
                "joint": certificate.joint_radius,
                "pixels": certificate.pixels,
                "ℓ∞": certificates.linf_radius(certificate.radius, 192),
                "ℓ1": certificates.l1_radius(certificate.radius),
            }
            cases += [Case(f"{kind}, {name}", claimed, zero, slack=0.0) for kind, claimed in radii.items()]
        gallery = torch.cat([left[:1], right[:1]])
        query = certificates.retrieval_radius(reference[:1], gallery, k=1, **options)
        cases.append(Case(f"retrieval, {name}", query, zero[:1], slack=0.0))
    for name, options in (("tie", setting.options), ("no bound", {"anchor": anchor, "lipschitz": math.inf})):
        threshold = 0.0 if name == "tie" else 0.5
        claimed = certificates.threshold_radius(z, z.clone(), threshold, **options)
        cases.append(Case(f"threshold, {name}", claimed, zero, slack=0.0))
    for first, second in ((unknown, z), (z, unknown)):
        lower, upper = certificates.distance_interval(first, second, 0.1, **setting.options)
        cases += [Case("distance ≥, NaN", lower, zero, 0.0), Case("distance ≤, NaN", upper, zero + 2, 0.0, upper=True)]
    lower, upper = certificates.distance_interval(z, z0, 0.1, anchor=anchor, lipschitz=math.inf)
    cases += [Case("distance ≥, no bound", lower, zero, 0.0), Case("distance ≤, no bound", upper, zero + 2, 0.0, True)]
    return cases


def other_norms(setting: Setting, draw: torch.Generator) -> list[Case]:
    """One linear feature whose boundary is met first by a change of the kind that each norm is about.

    ℓ∞: weights of one magnitude, all values move by the same. ℓ1: one weight, one value moves. The file's own pixels:
    the weights are the top singular vector of the resize, and the file changes by the one that it comes from.
    """
    anchor = setting.anchor
    count = 3 * SIDE**2
    signs = torch.where(torch.rand(count, dtype=torch.float64, generator=draw) < 0.5, -1.0, 1.0).double()
    scale = setting.scale
    left, right = (in_plane(scale * torch.ones(1).double(), turn)[:, :2] for turn in (1.2, -1.0))
    start = torch.tensor([[0.3 * scale, 0.2 * scale]], dtype=torch.float64)
    gap, normal = hyperplane(start, unit(left, anchor), unit(right, anchor), anchor)
    radius = certificates.reference_radius(start, left, right, **setting.options)

    def crossed(change: Tensor, weight: Tensor) -> Tensor:
        """Whether a change ``(n,)`` of the pixels turns the answer of the feature with these weights."""
        moved = start - torch.sign(gap)[:, None] * normal * (setting.lipschitz * change @ weight)
        answers = [distance(z, left, anchor) < distance(z, right, anchor) for z in (start, moved)]
        return answers[0] != answers[1]

    length = gap.abs() / setting.lipschitz
    even, single = signs / math.sqrt(count), F.one_hot(torch.tensor(7), count).double()
    largest, total = length / math.sqrt(count), length
    cases = [
        Case(
            "ℓ∞",
            certificates.linf_radius(radius, count),
            largest,
            broken=crossed((1 + BEYOND) * largest * signs, even),
        ),
        Case("ℓ1", certificates.l1_radius(radius), total, broken=crossed((1 + BEYOND) * total * single, single)),
    ]
    for size in ((5, 7), (16, 24), (8, 20)):
        pixels = size[0] * size[1]
        basis = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *size)
        resize = resized(basis).flatten(1)
        into, norms, out = torch.linalg.svd(resize)
        truth = length / norms[0]
        change = resized(((1 + 1e-4) * truth * into[:, 0]).view(1, 1, *size)).flatten()
        claimed = radius / certificates.resize_norm(size, SIDE)
        # The slack leaves room for the rounding of a resize in float32.
        name = f"pixels of {size[0]} × {size[1]} files"
        cases.append(Case(name, claimed, truth * (1 + 1e-9), slack=1e-3, broken=crossed(change, out[0])))
        # Pixels are rounded to float32 when they are read, and again when they are resized, clean and changed alike.
        read, made = (2 * 2.0**-25 * math.sqrt(3 * count) for count in (pixels, SIDE**2))
        claimed = torch.tensor([certificates.original_radius(float(radius), size, SIDE)], dtype=torch.float64)
        cases.append(Case(f"rounded {name}", claimed, (length - made) / norms[0] - read, tolerance=1e-9))
    return cases


def what_users_call(setting: Setting, draw: torch.Generator) -> list[Case]:
    """The methods of a metric, against the functions on its features that the other controls are about."""
    metric = PerceptualMetric(nn.Flatten(), 2, setting.anchor, lipschitz=setting.lipschitz)
    x, x0, x1 = torch.rand(3, SAMPLES, 3, 2, 2, dtype=torch.float64, generator=draw)
    z, z0, z1 = (images.flatten(1) for images in (x, x0, x1))
    certificate = metric.certify(x, x0, x1)
    left, right = certificates.candidate_radii(z, z0, z1, **setting.options)
    radius = certificates.reference_radius(z, z0, z1, **setting.options)
    eps = 0.3 / setting.lipschitz
    lower, upper = metric.distance_bounds(x, x0, eps)
    least, most = certificates.distance_interval(z, z0, eps, **setting.options)
    return [
        Case("certify, reference", certificate.radius, radius),
        Case("reference_radius", metric.reference_radius(z, z0, z1), radius),
        Case("certify, left", certificate.left_radius, left),
        Case("certify, right", certificate.right_radius, right),
        Case("certify, joint", certificate.joint_radius, certificates.joint_radius(z, z0, z1, **setting.options)),
        Case("certify, pixels", certificate.pixels.double(), certificates.certified_pixels(x, radius).double()),
        Case("distance_bounds, lower", lower, least),
        Case("distance_bounds, upper", upper, most, upper=True),
    ]


def float32_flips(setting: Setting, draw: torch.Generator) -> list[Case]:
    """A float32 network that rounds its one feature to a grid, up at the clean image and down at the perturbed one.

    Adding a large number and taking it off again rounds in float32, by up to half the spacing there, and does nothing
    in float64. The clean feature is just above the middle between two points of the grid, and the boundary is a quarter
    beside one: the answer turns where the feature has moved by a number of spacings, which is less than what the
    rounded clean feature promises, and less than that minus the error of one embedding.
    """
    linear = nn.Linear(3 * SIDE**2, 1, dtype=torch.float32).requires_grad_(False)
    linear.weight.zero_()[0, 0] = 1.0
    linear.bias.fill_(-0.5)
    network = nn.Sequential(nn.Flatten(), linear, _Grid())
    metric = PerceptualMetric(network, SIDE, anchor=0.0, lipschitz=1.0, feature_error=_Grid.spacing / 2)
    steps = torch.arange(1, 9, dtype=torch.float32) * _Grid.spacing
    images = torch.zeros(len(steps), 3, SIDE, SIDE, dtype=torch.float32)
    left, right, reference, moved = images.clone(), images.clone(), images.clone(), images.clone()
    left[:, 0, 0, 0] = 1.0
    # A 512th of the spacing is four steps of float32 here.
    reference[:, 0, 0, 0] = 0.5 + steps + _Grid.spacing * (0.5 + 1 / 512)
    moved[:, 0, 0, 0] = 0.5 + _Grid.spacing * (0.5 - 1 / 512)
    certificate = metric.certify(reference, left, right)
    length = (reference.double() - moved.double()).flatten(1).norm(dim=1)
    broken = certificate.prefers_left & ~metric.certify(moved, left, right).prefers_left
    error = (network(reference).double() - exact_copy(network)(reference.double())).abs().max()
    return [
        Case("error of an embedding", error[None], torch.full_like(error, _Grid.spacing / 2)[None], slack=0.02),
        Case("reference", certificate.radius, length, slack=0.3, broken=broken),
    ]


class _Grid(nn.Module):
    """Rounds to multiples of :attr:`spacing` in float32 and not at all in float64; then a quarter of it down."""

    _large = 1536.0
    spacing = 2.0**-13  # of float32 numbers in [1024, 2048)

    def forward(self, z: Tensor) -> Tensor:
        return (z + self._large) - self._large - self.spacing / 4


def rounding(setting: Setting, draw: torch.Generator) -> list[Case]:
    """Near-duplicates in float64 and float32, against the same numbers in eighty decimal digits.

    Candidates that differ by 1e-12 leave a radius in float64 four digits; it must be below the true one all the same.
    """
    excesses = rounding_excess(draw, anchor=setting.anchor, lipschitz=1.1 * setting.lipschitz)
    zero = torch.zeros(1, dtype=torch.float64)
    return [
        Case(f"{kind} rounded", torch.tensor([excess], dtype=torch.float64), zero, slack=math.inf, tolerance=0.0)
        for kind, excess in excesses.items()
    ]


TIGHT: tuple[tuple[str, Callable[[Setting, torch.Generator], list[Case]], tuple[Setting, ...]], ...] = (
    ("reference and retrieval, to the hyperplane", reference_and_retrieval, SETTINGS),
    ("one image turns, to the foot of a line", one_turns, SETTINGS),
    ("all images turn, near the foot of a line", all_turn, SETTINGS),
    ("all three in space, back from a tie", all_turn_in_space, SETTINGS[:1]),
    ("features at angles from chosen radii", from_angles, SETTINGS),
    ("error of features, reference", reference_error, SETTINGS),
    ("budgets beyond the norm", large_budgets, SETTINGS),
    ("ties and what is undefined", nothing_is_certain, SETTINGS),
    ("ℓ∞, ℓ1 and pixels of files", other_norms, SETTINGS),
    ("near-duplicates in eighty digits", rounding, SETTINGS),
    ("what users call", what_users_call, SETTINGS),
    ("float32 answers that flip", float32_flips, SETTINGS[:1]),
)


def tight_controls(seed: int = 0) -> list[Control]:
    """All of :data:`TIGHT`; one that does not find what is true counts as not caught."""
    controls = []
    with torch.no_grad():
        for name, control, settings in TIGHT:
            draw = torch.Generator().manual_seed(seed)
            cases = [case for setting in settings for case in control(setting, draw)]
            faults = list(dict.fromkeys(fault for case in cases for fault in case.faults()))
            count = sum(len(case.claimed) for case in cases)
            reached = sum(len(case.claimed) for case in cases if case.broken is not None)
            evidence = f"{count} claims are true" + (f", {reached} of them broken just beyond" if reached else "")
            controls.append(Control(name, not faults, "; ".join(faults) or evidence))
    return controls
