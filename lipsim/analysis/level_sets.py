"""The protocol of level sets on any objective (Balasubramanian et al. 2023, "Exploring Geometry of Blind Spots").

From each source image the level set is walked towards several other images. What is measured: how near the outcomes
come to their targets; whether the straight ways to them, and the triangles between them, stay in the level set; and how
wide it is around them. The paper measures confidence; here *loss* is by how much an objective has grown since the
source, which for :class:`lipsim.attacks.ConfidenceObjective` is the confidence lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lipsim.attacks.level_set import Traversal
from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import expand, sample_norm
from lipsim.certificates.triangles import barycentric_grid
from lipsim.metric.distance import Distance
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest, write_safetensors
from lipsim.utils.sampling import sample_normal, subkey
from lipsim.utils.weights import read_safetensors

_SWAPS = 1_000  # rounds of swaps that a derangement is looked for in
_QUANTILES = (0.05, 0.95)  # of the random directions, as in the authors' program
_RTOL, _ATOL = 1e-3, 1e-4  # of the same network on another device
ObjectiveOf = Callable[[Tensor], Objective]


@dataclass(frozen=True)
class LevelSetProtocol:
    """What is measured, by default as published.

    Attributes:
        targets: walks from each source.
        steps: of a walk.
        step_size: of the published rule, and the largest of the other.
        correction: of the published rule.
        newton: walk by the Newton-corrected rule.
        noise: a walk starts at a random point within that of the source, in ℓ∞.
        divisions: of the sides of a triangle; 10 give 66 points. Straight ways have as many.
        losses: that points of a triangle are counted below.
        width_steps: after how many steps of each walk the width is measured; () leaves widths out.
        widths: ℓ2 distances from the walk.
        directions: random ones, orthogonal to the walk.
        seed: of the targets and of all that is random.
    """

    targets: int = 5
    steps: int = 400
    step_size: float = 0.01
    correction: float = 0.002
    newton: bool = False
    noise: float = 2 / 255
    divisions: int = 10
    losses: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    width_steps: tuple[int, ...] = (400,)
    widths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    directions: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.targets, self.steps, self.divisions, self.directions) < 1:
            raise LipsimError("expected at least 1 target, step, division and direction")
        if not all(0 <= step <= self.steps for step in self.width_steps):
            raise LipsimError(f"expected widths after 0 to {self.steps} steps, got {self.width_steps}")


@dataclass(frozen=True)
class LevelSets:
    """What was measured of S sources with T targets, P = T(T − 1)/2 triangles, K places and W widths.

    Attributes:
        index: ``(S,)`` int64, the sources among the images.
        target: ``(S, T)`` int64, their targets.
        start_rmse: ``(S, T)``, root mean square difference of pixels between source and target.
        rmse: ``(S, T)``, between outcome and target; so are the next three.
        linf: ``(S, T)``, the largest difference of a value.
        ssim: ``(S, T)``.
        lpips: ``(S, T)``, NaN where no such distance was given.
        loss: ``(S, T)``, at the outcome.
        target_loss: ``(S, T)``, at the target itself.
        path_loss: ``(S, T)``, the largest on the straight way from the source to the outcome.
        triangle_loss: ``(S, P)``, mean over the triangle of the source and two outcomes.
        triangle_share: ``(S, P, D)``, share of its points that lose less than each of the D losses.
        triangle_accepted: ``(S, P)``, share of its points in the level set.
        width_low: ``(S, T, K, W)``, 5 % quantile of the loss over the directions.
        width_high: ``(S, T, K, W)``, 95 % quantile, which is the confidence that all but 5 % of them keep.
        width_accepted: ``(S, T, K, W)``, share of the directions that stay in the level set.
        outcomes: ``(S, T, 3, H, W)``, or without elements where they were not to be kept.
    """

    index: Tensor
    target: Tensor
    start_rmse: Tensor
    rmse: Tensor
    linf: Tensor
    ssim: Tensor
    lpips: Tensor
    loss: Tensor
    target_loss: Tensor
    path_loss: Tensor
    triangle_loss: Tensor
    triangle_share: Tensor
    triangle_accepted: Tensor
    width_low: Tensor
    width_high: Tensor
    width_accepted: Tensor
    outcomes: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def derangements(num: int, count: int, *, seed: int = 0, labels: Tensor | None = None) -> Tensor:
    """Random permutations ``(count, num)`` that move every image, to one of another label where labels are given.

    Raises:
        ValueError: there is none: fewer than two images, or a label that more than half of them have.
    """
    other = ~torch.eye(num, dtype=torch.bool) if labels is None else labels.cpu().unsqueeze(1) != labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_derangement(other, generator) for _ in range(count)])


def _derangement(allowed: Tensor, generator: torch.Generator) -> Tensor:
    permutation = torch.randperm(len(allowed), generator=generator)
    rows = torch.arange(len(allowed))
    for _ in range(_SWAPS):
        wrong = (~allowed[rows, permutation]).nonzero().flatten().tolist()
        if not wrong and len(allowed) > 1:
            return permutation
        for i in wrong:
            # With whom both are right after a swap; with anybody where there is nobody.
            partners = (allowed[i, permutation] & allowed[:, permutation[i]]).nonzero().flatten()
            partners = partners if len(partners) else rows
            j = int(partners[torch.randint(len(partners), (), generator=generator)])
            permutation[[i, j]] = permutation[[j, i]]
    raise LipsimError(f"expected images of which no label has more than half, at least two; got {len(allowed)} images")


def measure_level_sets(
    objective_of: ObjectiveOf,
    images: Tensor,
    protocol: LevelSetProtocol | None = None,
    *,
    sources: Tensor | None = None,
    labels: Tensor | None = None,
    lpips: Distance | None = None,
    batch_size: int = 32,
    folder: Path | None = None,
    keep_outcomes: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> LevelSets:
    """Run the protocol.

    A walk costs a forward and a backward pass a step, a triangle 66 forward passes and a width 1,024 by default.
    Numbers do not depend on batches but for rounding: what is random depends on the seed and on the sample's index.

    Args:
        objective_of: makes the objective of some of the images, given by their indices ``(M,)``; at most 0 is the level
            set, of which each source has to be.
        images: ``(N, 3, H, W)`` in [0, 1], sources and targets.
        protocol: default :class:`LevelSetProtocol`.
        sources: ``(S,)`` indices of the images to walk from, such as those that a classifier names right; None: all.
        labels: ``(N,)``; targets have another label then.
        lpips: a further distance between outcome and target, such as ``lipsim.metric.deep_distances.LPIPS()``.
        batch_size: sources at a time, and points that are evaluated at a time.
        folder: keeps the results of each batch of sources in a file; files that are there are read instead.
        keep_outcomes: also keep the images.
        say: hears how far it is.

    Raises:
        ValueError: images outside [0, 1], sources outside the level set, targets that there are none of, or files in
            the folder that are of another run.
    """
    protocol = protocol or LevelSetProtocol()
    rows = torch.arange(len(images)) if sources is None else sources.cpu()
    if not len(rows):
        raise LipsimError("expected at least one source")
    targets = derangements(len(images), protocol.targets, seed=protocol.seed, labels=labels)
    parts = []
    for number, part in enumerate(rows.split(batch_size)):

        def tell(text: str, number: int = number) -> None:
            say(f"sources {number * batch_size} to {min((number + 1) * batch_size, len(rows))} of {len(rows)}: {text}")

        run = _Run(objective_of(part), images, part, targets[:, part].T, protocol, batch_size, tell)
        file = None if folder is None else folder / f"{int(part[0]):06d}-{int(part[-1]):06d}.safetensors"
        found = None if file is None or not file.is_file() else read_safetensors(file)[0]
        if found is None:
            found = run.measure(lpips, keep_outcomes).tensors
            if file is not None:
                write_safetensors(file, {**found, **run.identity(lpips, keep_outcomes)})
        elif not run.is_that_of(found, lpips, keep_outcomes):
            raise LipsimError(f"{file} has results of other images, settings or a model; take another folder")
        parts.append(found)
    return LevelSets(**{field.name: torch.cat([part[field.name] for part in parts]) for field in fields(LevelSets)})


class _Run:
    """A batch of M sources."""

    def __init__(
        self,
        objective: Objective,
        images: Tensor,
        rows: Tensor,
        target: Tensor,
        protocol: LevelSetProtocol,
        batch_size: int,
        say: Callable[[str], object],
    ) -> None:
        self.objective, self.images, self.rows, self.target = objective, images, rows, target
        self.protocol, self.batch_size, self.say = protocol, batch_size, say
        self.source = images[rows]
        self.everyone = torch.arange(len(rows))
        self.value = self.evaluate(self.everyone, self.source)
        if not (self.value <= 0).all():
            first = int(rows[~(self.value <= 0)][0])
            raise LipsimError(f"expected sources in the level set (objective ≤ 0), which image {first} is not")

    def measure(self, lpips: Distance | None, keep_outcomes: bool) -> LevelSets:
        from lipsim.metric.distances import ssim  # torchmetrics, seconds

        by_target: dict[str, list[Tensor]] = {}
        outcomes = []
        for k in range(self.protocol.targets):
            goal = self.images[self.target[:, k]]
            outcome, width = self.walk(goal, k)
            outcomes.append(outcome)
            found = {
                "start_rmse": _rmse(self.source, goal),
                "rmse": _rmse(outcome, goal),
                "linf": sample_norm(outcome - goal, "inf"),
                "ssim": 1 - ssim(outcome, goal),
                "loss": self.loss(self.everyone, outcome),
                "target_loss": self.loss(self.everyone, goal),
                "path_loss": self.along([self.source, outcome], self._sides()).amax(1),
                **width,
            }
            with torch.no_grad():
                found["lpips"] = torch.full_like(found["rmse"], torch.nan) if lpips is None else lpips(outcome, goal)
            for name, tensor in found.items():
                by_target.setdefault(name, []).append(tensor.detach().cpu().double())
        kept = torch.stack(outcomes, 1).cpu() if keep_outcomes else torch.empty(len(self.rows), 0)
        stacked = {name: torch.stack(tensors, 1) for name, tensors in by_target.items()}
        return LevelSets(self.rows, self.target, **stacked, **self.triangles(outcomes), outcomes=kept)

    def walk(self, goal: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The outcome ``(M, …)`` and the widths ``(M, K, W)`` on the way there."""
        p = self.protocol
        key = subkey(p.seed, number)  # every walk starts elsewhere, and looks in other directions
        state = Traversal.start(self.objective, self.source, noise=p.noise, seed=subkey(key, 0), index=self.rows)
        places = sorted(set(p.width_steps))
        widths: list[dict[str, Tensor]] = []
        done = 0
        for place in [*places, p.steps]:
            state = state.advance(
                self.objective,
                goal,
                steps=place - done,
                step_size=p.step_size,
                correction=p.correction,
                newton=p.newton,
                say=lambda text: self.say(f"target {number + 1} of {p.targets}, {text}"),
            )
            done = place
            if len(widths) < len(places):
                self.say(f"target {number + 1} of {p.targets}, width after step {place}")
                way = goal - state.x
                gradient = state.gradient / expand(sample_norm(state.gradient).clamp(min=1e-30), way)
                way = way - gradient * expand((way * gradient).flatten(1).sum(1), way)
                widths.append(self.width(state.x, way, subkey(key, 1 + len(widths))))
        names = ("width_low", "width_high", "width_accepted")
        empty = torch.empty(len(self.rows), 0, len(p.widths), dtype=torch.float64)
        return state.x, {name: torch.stack([w[name] for w in widths], 1) if widths else empty for name in names}

    def width(self, x: Tensor, way: Tensor, seed: int) -> dict[str, Tensor]:
        """Losses ``(M, W)`` at distances from points ``(M, …)`` in random directions orthogonal to their ways.

        As in the authors' program, points are clipped to [0, 1].
        """
        p = self.protocol
        low, high, accepted = (torch.empty(len(x), len(p.widths), dtype=torch.float64) for _ in range(3))
        for i in range(len(x)):
            like = x[i].expand(1, p.directions, *x[i].shape)
            noise = sample_normal(like, seed=seed, index=self.rows[i : i + 1])[0].flatten(1)
            unit = way[i].flatten() / way[i].norm().clamp(min=1e-30)
            noise = noise - torch.outer(noise @ unit, unit)
            noise = (noise / noise.norm(dim=1, keepdim=True)).view(p.directions, *x[i].shape)
            for j, distance in enumerate(p.widths):
                value = self.evaluate(torch.full((p.directions,), i), (x[i] + distance * noise).clamp(0, 1))
                loss = value - self.value[i]
                low[i, j], high[i, j] = torch.quantile(loss, torch.tensor(_QUANTILES, dtype=loss.dtype))
                accepted[i, j] = (value <= 0).double().mean()
        return {"width_low": low, "width_high": high, "width_accepted": accepted}

    def triangles(self, outcomes: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the triangles of the source and every two outcomes hold."""
        weights = barycentric_grid(self.protocol.divisions)[0].double() / self.protocol.divisions
        pairs = [(i, j) for j in range(len(outcomes)) for i in range(j)]
        losses = torch.empty(len(self.rows), len(pairs), len(weights), dtype=torch.float64)
        for number, (i, j) in enumerate(pairs):
            self.say(f"triangle {number + 1} of {len(pairs)}")
            losses[:, number] = self.along([self.source, outcomes[i], outcomes[j]], weights)
        accepted = losses + self.value.view(-1, 1, 1) <= 0
        return {
            "triangle_loss": losses.mean(2),
            "triangle_share": torch.stack([(losses < most).double().mean(2) for most in self.protocol.losses], 2),
            "triangle_accepted": accepted.double().mean(2),
        }

    def along(self, corners: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Losses ``(M, G)`` at points with barycentric coordinates ``(G, C)`` between C corners ``(M, …)`` each."""
        losses = []
        for weight in weights:
            point = sum((float(w) * corner for w, corner in zip(weight, corners, strict=True)), torch.zeros(()))
            losses.append(self.loss(self.everyone, torch.as_tensor(point).clamp(0, 1)))  # rounding alone leaves the box
        return torch.stack(losses, 1)

    def _sides(self) -> Tensor:
        share = torch.linspace(0, 1, self.protocol.divisions + 1, dtype=torch.float64)
        return torch.stack([1 - share, share], 1)

    def loss(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.evaluate(rows, x) - self.value[rows]

    def evaluate(self, rows: Tensor, x: Tensor) -> Tensor:
        """The objective ``(R,)`` in float64 of sources ``(R,)`` of the batch at points ``(R, …)``."""
        with torch.no_grad():
            values = [
                self.objective.select(part.to(points.device))(points).double().cpu()
                for part, points in zip(rows.split(self.batch_size), x.split(self.batch_size), strict=True)
            ]
        return torch.cat(values)

    @torch.no_grad()
    def identity(self, lpips: Distance | None, keep_outcomes: bool) -> dict[str, Tensor]:
        """What the results belong to: settings and images by a hash, the model and the distance by their answers."""
        digest = Digest()
        digest.add(f"{asdict(self.protocol)}{keep_outcomes}{lpips is None}")
        for tensor in (self.rows, self.target, self.source, *(self.images[column] for column in self.target.T)):
            digest.add_tensor(tensor)
        first = self.images[self.target[:, 0]]
        answers = [self.value, self.evaluate(self.everyone, first)]
        # Two good classifiers are as sure of the images as each other, but not of what lies between them.
        for column in self.target.T:
            answers.append(self.evaluate(self.everyone, torch.lerp(self.source, self.images[column], 0.5)))
        if lpips is not None:
            answers.append(lpips(self.source, first).double().cpu())
        sha256 = torch.tensor(list(bytes.fromhex(digest.hexdigest())), dtype=torch.uint8)
        return {"sha256": sha256, "answers": torch.stack(answers, 1)}

    def is_that_of(self, found: dict[str, Tensor], lpips: Distance | None, keep_outcomes: bool) -> bool:
        expected = self.identity(lpips, keep_outcomes)
        return (
            torch.equal(found["sha256"], expected["sha256"])
            and found["answers"].shape == expected["answers"].shape
            and torch.allclose(found["answers"], expected["answers"], rtol=_RTOL, atol=_ATOL)
        )


def _rmse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).flatten(1).double().square().mean(1).sqrt()
