"""One walk on the level set of one image, with all that can be said of it: path, straight line, triangle, proofs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim import certificates
from lipsim.attacks import ConfidenceObjective, DistanceObjective, Objective, Traversal, TwoAFCObjective
from lipsim.attacks.objectives import logits_of
from lipsim.attacks.watch import Passes, WatchedObjective
from lipsim.certificates.level_sets import (
    ClosestApproach,
    SegmentCertificate,
    SignedRadius,
    certify_segments,
    closest_approach,
)
from lipsim.certificates.triangles import TriangleCertificate, barycentric_grid, certify_triangles
from lipsim.layers import evaluation_mode
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_safetensors
from lipsim.utils.precision import full_precision

_LINE = 21  # points of the straight line from source to outcome
_PICTURES = 8  # of the path, with both ends


@dataclass(frozen=True)
class Level:
    """The level set of one image: where an objective of one sample is at most 0.

    Attributes:
        name: what stays there.
        objective: of the image alone, ``(1, 3, H, W)`` to ``(1,)``.
        signed_radius: certified radii of points, negative outside; None where nothing is certified.
    """

    name: str
    objective: Objective
    signed_radius: SignedRadius | None = None

    def values(self, points: Tensor) -> Tensor:
        """The objective ``(M,)`` at points ``(M, 3, H, W)``."""
        found = []
        with torch.no_grad():
            for some in points.split(32):
                found.append(self.objective.select(torch.zeros(len(some), dtype=torch.int64))(some))
        return torch.cat(found)


def names_a_metric(name: str) -> bool:
    """Whether a model's name (:data:`lipsim.analysis.models.NAMES`) is that of a metric and not of a classifier."""
    library, slash, _ = name.partition("/")
    is_function = not name.endswith(".safetensors") and ":" in name
    return not ((slash and library in ("torchvision", "timm")) or name.startswith("efficientnet-") or is_function)


def confidence_level(classifier: nn.Module, source: Tensor, drop: float = 0.2) -> Level:
    """Where a classifier gives an image ``(3, H, W)`` its own class with as much confidence, but for ``drop``.

    Raises:
        ValueError: a model that does not return logits, or a drop outside [0, 1].
    """
    with torch.no_grad(), taking_images(type(classifier).__name__, source[None]):
        label = logits_of(classifier, source[None]).argmax(1)
    objective = ConfidenceObjective(classifier, label, source[None], drop)
    least = float(objective.least)
    if not least > 0:
        raise LipsimError(
            f"expected a drop below the confidence in the source, {least + drop:.3g}, got {drop:g}: every image would "
            "be in the level set"
        )
    return Level(f"confidence in class {int(label)} ≥ {least:.3g}", objective)


def same_level(metric: PerceptualMetric, source: Tensor, threshold: float) -> Level:
    """What a metric finds within ``threshold`` of an image ``(3, H, W)``, with certified radii where it has a bound.

    Raises:
        ValueError: images that the metric refuses, or a threshold outside [0, 2].
    """
    objective = DistanceObjective(metric, source[None], threshold)

    def radius(z: Tensor) -> Tensor:
        return certificates.same_radius(z, objective.other.expand(len(z), -1), threshold, **metric.certificate_options)

    radius(objective.other)  # refuses the threshold now
    return Level(f"d(source, x) ≤ {threshold:g}", objective, _certified(metric, radius))


def answer_level(metric: PerceptualMetric, source: Tensor, than: Tensor) -> Level:
    """Where a metric finds an image nearer to the source than to another, both ``(3, H, W)``.

    Raises:
        ValueError: images that the metric refuses, or that are at one distance.
    """
    objective = TwoAFCObjective(metric, source[None], source[None], than[None])
    z0, z1 = objective.still["left"], objective.still["right"]
    if not bool(metric.margin(z0, z0, z1) > 0):
        raise LipsimError("expected another image than the source, got one at distance 0 from it")

    def radius(z: Tensor) -> Tensor:
        left = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return certificates.answer_radius(z, z0, z1, left, **metric.certificate_options)

    return Level("nearer to the source than to the third image", objective, _certified(metric, radius))


def _certified(metric: PerceptualMetric, radius: Callable[[Tensor], Tensor]) -> SignedRadius | None:
    """Signed radii of images from those of features, in full precision; None of a metric without a bound."""
    if not metric.has_bound:
        return None

    def signed_radius(points: Tensor, _rows: Tensor) -> Tensor:
        metric.check_precision(points)
        with torch.no_grad(), full_precision(), evaluation_mode(metric.encoder):
            return radius(metric.embed(points))

    return signed_radius


class _Inside:
    """An objective of which a level set further inside is walked on."""

    def __init__(self, objective: Objective, shift: float) -> None:
        self.objective, self.shift = objective, shift

    def __call__(self, x: Tensor) -> Tensor:
        return self.objective(x) + self.shift

    def select(self, rows: Tensor) -> _Inside:
        """The objective of some of the samples."""
        return _Inside(self.objective.select(rows), self.shift)


@dataclass(frozen=True)
class Walk:
    """A walk from a source towards a target on a level set. Images are ``(3, H, W)``.

    Attributes:
        level: what stays on the way.
        source: where it is from.
        target: where it is to.
        outcome: the last point.
        path: ``(P, 3, H, W)``, points on the way, the source first and the outcome last.
        path_steps: after how many steps each.
        line: ``(M,)``, the objective on the straight line from source to outcome.
        triangle: ``(3, 3, H, W)``, source, outcome, and the outcome of a second walk or else the target.
        corners: names of the three.
        weights: ``(66, 3)``, barycentric coordinates of the triangle's grid.
        values: ``(66,)``, the objective there.
        proof: of the triangle, of a metric with a bound.
        segment: of the line from source to outcome, of a metric with a bound.
        approach: of the outcome to the target, of a metric with a bound.
        passes: of the walk.
        accepted: steps of it.
    """

    level: str
    source: Tensor
    target: Tensor
    outcome: Tensor
    path: Tensor
    path_steps: list[int]
    line: Tensor
    triangle: Tensor
    corners: tuple[str, str, str]
    weights: Tensor
    values: Tensor
    proof: TriangleCertificate | None
    segment: SegmentCertificate | None
    approach: ClosestApproach | None
    passes: Passes
    accepted: int

    def facts(self) -> dict[str, Any]:
        """What JSON output holds; distances are in pixels in [0, 1]."""
        start, end = (image - self.target for image in (self.source, self.outcome))
        certified: dict[str, Any] | None = None
        if self.proof is not None and self.segment is not None and self.approach is not None:
            lower, upper = self.proof.area
            bound = float(self.approach.level_bound)
            certified = {
                "segment_proved": bool(self.segment.proved),
                "segment_share": float(self.segment.share),
                "segment_radius": float(self.segment.radius),
                "segment_points": int(self.segment.evaluations),
                "triangle_area": [float(lower), float(upper)],
                "triangle_points": int(self.proof.evaluations),
                "approach": float(self.approach.achieved),
                "approach_bound": bound,
                "approach_ratio": float(self.approach.ratio) if bound else None,
            }
        return {
            "level": self.level,
            "rmse": {"source": float(start.square().mean().sqrt()), "outcome": float(end.square().mean().sqrt())},
            "linf": {"source": float(start.abs().max()), "outcome": float(end.abs().max())},
            "objective": {"outcome": float(self.line[-1]), "line_max": float(self.line.max())},
            "line_stays": bool((self.line <= 0).all()),
            "triangle": {"corners": self.corners, "share": float((self.values <= 0).double().mean())},
            "certified": certified,
            "accepted": self.accepted,
            "passes": {"forward": int(self.passes.forward), "backward": int(self.passes.backward)},
        }

    def __str__(self) -> str:
        facts = self.facts()
        lines = [
            f"level set: {self.level}",
            f"RMSE to the target {facts['rmse']['source']:.4f} → {facts['rmse']['outcome']:.4f}, "
            f"ℓ∞ {facts['linf']['source']:.4f} → {facts['linf']['outcome']:.4f}, after {self.accepted} accepted steps",
            f"straight line to the outcome: {'stays' if facts['line_stays'] else 'leaves'} (largest objective "
            f"{facts['objective']['line_max']:.4g}); triangle with {self.corners[2]}: "
            f"{100 * facts['triangle']['share']:.0f} % of 66 points inside",
        ]
        if certified := facts["certified"]:
            lower, upper = certified["triangle_area"]
            proved = "proved" if certified["segment_proved"] else f"proved on {100 * certified['segment_share']:.1f} %"
            lines.append(
                f"certified: line {proved} ({certified['segment_points']} points); {100 * lower:.1f} to "
                f"{100 * upper:.1f} % of the triangle's area"
            )
            ratio = certified["approach_ratio"]
            lines.append(
                f"closest approach ‖x − target‖₂ = {certified['approach']:.4g}"
                + (f", at least {certified['approach_bound']:.4g} for any: ratio {ratio:.2f}" if ratio else "")
            )
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``strip.png``, ``triangle.png``, ``curve.png`` and the exact tensors, ``walk.safetensors``."""
        from lipsim.results.level_plots import plot_line, plot_triangle  # matplotlib
        from lipsim.results.plots import plot_grid

        tensors = {"path": self.path, "line": self.line, "triangle": self.triangle, "values": self.values}
        write_safetensors(folder / "walk.safetensors", {**tensors, "target": self.target})
        pictures = [*self.path, self.target]
        captions = ["source", *(f"{step} steps" for step in self.path_steps[1:-1]), "outcome", "target"]
        columns = [picture[None] for picture in pictures]
        plot_grid(folder / "strip.png", columns, [[caption] for caption in captions], title=self.level)
        inside = None if self.proof is None else self.proof.inside[0]
        outside = None if self.proof is None else self.proof.outside[0]
        cells = barycentric_grid(10)[1]
        path = folder / "triangle.png"
        plot_triangle(path, self.weights, self.values, cells, self.corners, self.triangle, inside, outside, self.level)
        plot_line(folder / "curve.png", self.line, self.level)


def traverse(
    level: Level,
    source: Tensor,
    target: Tensor,
    *,
    second: Tensor | None = None,
    steps: int = 400,
    step_size: float = 0.01,
    correction: float = 0.002,
    newton: bool = False,
    noise: float = 2 / 255,
    seed: int = 0,
    inside: float = 0.01,
    depth: int = 2,
    say: Callable[[str], object] | None = None,
) -> Walk:
    """Walk from a source towards a target, and look at the line and the triangle that lead there.

    Costs a forward and a backward pass a step (twice with ``second``), 87 forward passes for line and triangle, and,
    of a metric with a bound, up to some 2,000 more for the proofs.

    Args:
        level: the level set of the source.
        source: ``(3, H, W)`` in [0, 1].
        target: the same.
        second: a second target, whose outcome is the third corner of the triangle; None: the target itself is.
        steps: of each walk.
        step_size: as in :func:`lipsim.attacks.level_set`.
        correction: the same.
        newton: the same.
        noise: the same.
        seed: of the random start.
        inside: how far within the level set the walk of a metric with a bound stays, as a share of the objective at
            the source: no proof reaches the boundary itself.
        depth: of the proof of the triangle.
        say: told what is going on.

    Raises:
        ValueError: images or numbers that :func:`lipsim.attacks.level_set` refuses.
    """

    def tell(message: str) -> None:
        if say is not None:
            say(message)

    def walk(end: Tensor, seed: int) -> tuple[list[Tensor], list[int], Passes, int]:
        objective = WatchedObjective(walked, source[None])
        state = Traversal.start(objective, source[None], noise=noise, seed=seed)
        path, marks = [source], [0]
        for part in range(1, _PICTURES):
            after = round(steps * part / (_PICTURES - 1))
            state = state.advance(
                objective,
                end[None],
                steps=after - marks[-1],
                step_size=step_size,
                correction=correction,
                newton=newton,
                say=say,
            )
            path.append(state.x[0])
            marks.append(after)
        return path, marks, objective.passes, int(state.accepted)

    walked = level.objective
    if level.signed_radius is not None:
        walked = _Inside(level.objective, -inside * float(level.values(source[None])))
    path, marks, passes, accepted = walk(target, seed)
    outcome, corners = path[-1], ("source", "outcome", "target")
    third = target
    if second is not None:
        tell("the second target")
        third, corners = walk(second, seed + 1)[0][-1], ("source", "outcome", "second outcome")
    tell("the straight line and the triangle")
    places = torch.linspace(0, 1, _LINE, dtype=source.dtype, device=source.device).view(-1, 1, 1, 1)
    line = level.values(torch.lerp(source, outcome, places))
    triangle = torch.stack([source, outcome, third])
    weights = barycentric_grid(10)[0].to(source) / 10
    values = level.values(torch.einsum("mk,kchw->mchw", weights, triangle).clamp(0, 1))
    proof = segment = approach = None
    if level.signed_radius is not None:
        tell("proving the line")
        segment = certify_segments(level.signed_radius, source[None], outcome[None])
        tell("proving the triangle")
        proof = certify_triangles(level.signed_radius, triangle[None], depth=depth)
        radii = [level.signed_radius(image[None], torch.zeros(1, dtype=torch.int64)) for image in (outcome, target)]
        approach = closest_approach(outcome[None], target[None], *radii)
    return Walk(
        level.name, source, target, outcome, torch.stack(path), marks, line, triangle, corners, weights, values, proof,
        segment, approach, passes, accepted,
    )  # fmt: skip
