"""Null-space perturbations of the reference: how far it moves where a metric cannot, or will not, tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim.attacks import FirstOperator, first_operator, null_space
from lipsim.attacks.projections import expand, sample_norm
from lipsim.callbacks.base import DRAWN, TripletCallback, drawn_positions, load_others, log_score
from lipsim.certificates.geometry import cosine_distance
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data import Triplet
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule
from lipsim.metric import Distance, PerceptualMetric
from lipsim.results.plots import plot_grid
from lipsim.results.schema import NullSpaceMetric, NullSpaceMoves, NullSpaceReach, NullSpaceSet
from lipsim.utils.sampling import sample_normal

EXACT = 1e-6  # relative change of an embedding below which a collision counts as exact
DIRECTIONS = ("random", "semantic")
_NOISE = 0.25  # standard deviation of the random direction
_BISECTIONS = 6


class NullSpaceRobustness(TripletCallback):
    """How far each reference can move inside the kernel of the encoder's first operator, and what becomes of it.

    A large ``‖δ‖`` with an unchanged embedding is an exact collision. Where the first operator has no kernel, or is
    nonlinear as an SLL block is, no such perturbation exists and the report says so. The reference goes into a random
    direction, and towards the candidate that the metric finds farther: inside the kernel first, then on the straight
    line that leads on from there, as long as the metric says "same" (``same``) and as long as its 2AFC answer stays.
    What is reported has been reached and checked; more may be possible.

    A test run writes results.json and, for the first triplets of each set, a picture ``plots/null-space-SET.png``.

    Args:
        seed: of the noise, which depends on the sample's index, and of the draw of triplets.
        others: name → exported metric, searched in the same way.
        same: largest distance to the clean image that counts as "the same"; None: exact collisions alone.
        max_triplets: of each set, drawn at random; None: all. A triplet costs as much as hundreds of certificates.
        lpips: torchvision's file of AlexNet's weights, or the folder that holds it, to measure changes by LPIPS too.
        num_examples: triplets of the first batch of each set that is searched, at most, whose images a test draws.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`.

    Raises:
        ValueError: a negative threshold or number.
        FileNotFoundError: no weights of LPIPS there.
    """

    files = ("plots/null-space-*.png",)
    differentiates = True

    def __init__(
        self,
        seed: int = 0,
        others: dict[str, Path] | None = None,
        same: float | None = None,
        max_triplets: int | None = 32,
        lpips: Path | None = None,
        num_examples: int = 3,
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.seed = seed
        self.others = load_others(others)
        self.same = None if same is None else check_number("same", same)
        self.max_triplets = None if max_triplets is None else check_count("max_triplets", max_triplets)
        self.num_examples = check_count("num_examples", num_examples, least=0)
        self.searched: dict[str, tuple[PerceptualMetric, FirstOperator | None]] = {}
        self.drawn: dict[str, Tensor | None] = {}  # positions to search, by set; None: all
        self.pictured: set[str] = set()
        self.lpips, self.measures = lpips, _measures(lpips)

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        self.searched, self.drawn, self.pictured = {}, {}, set()
        for i, name in enumerate(module.set_names()):
            self.drawn[name] = drawn_positions(module, i, self.max_triplets, self.seed)
        for name, metric in {"metric": module.metric, **self.others}.items():
            # In float64, so that an exact collision shows as exact.
            exact = metric.frozen_copy(torch.float64, module.device)
            self.searched[name] = exact, first_operator(exact.encoder, exact.image_size)

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        drawn = self.drawn[name]
        wanted = torch.ones(len(batch), dtype=torch.bool) if drawn is None else torch.isin(self.position.cpu(), drawn)
        rows = wanted.nonzero().flatten().to(batch.reference.device)
        nothing = torch.zeros(len(batch), dtype=torch.float64, device=batch.reference.device)
        columns = {"searched": wanted.to(nothing), DRAWN: nothing, **dict.fromkeys(self._columns(), nothing)}
        if not len(rows):
            return columns
        part = batch.select(rows).to(torch.float64)
        noise = _NOISE * sample_normal(part.reference, seed=self.seed, index=part.index)
        pictures: dict[str, Tensor] = {}
        with torch.no_grad():
            for key, (metric, operator) in self.searched.items():
                for column, values in self._search(metric, operator, part, noise, key, pictures).items():
                    columns[f"{key}/{column}"] = nothing.index_copy(0, rows, values)
        draws = self.writes(trainer) and trainer.is_global_zero and bool(self.num_examples)
        if draws and name not in self.pictured:
            self.pictured.add(name)
            self._draw(self._picture(trainer, name), part, pictures)
            columns[DRAWN] = wanted.to(nothing)
        return columns

    def restore(self, name: str, index: Tensor, position: Tensor, columns: dict[str, Tensor]) -> None:
        super().restore(name, index, position, columns)
        if bool(columns[DRAWN].any()):  # the run that was cut short has drawn them, but not for rows of other processes
            self.pictured.add(name)

    def _columns(self) -> list[str]:
        """All that :meth:`_search` finds out about a triplet."""
        names = []
        for key, (_, operator) in self.searched.items():
            names += [f"{key}/{name}" for name in ("length", "change", "distance", "flipped") if operator is not None]
            reaches = [f"{key}/{what}/{direction}" for what in ("same", "answer") for direction in DIRECTIONS]
            names += [f"{reach}/{measure}" for reach in reaches for measure in self.measures]
        return names

    def _search(
        self,
        metric: PerceptualMetric,
        operator: FirstOperator | None,
        batch: Triplet,
        noise: Tensor,
        key: str,
        pictures: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        x = batch.reference
        z, z0, z1 = batch.embed(metric.embed)
        left = metric.margin(z, z0, z1) > 0
        farther = torch.where(expand(left, x), batch.right, batch.left)
        columns: dict[str, Tensor] = {}
        for name, goal in (("random", (x + noise).clamp(0, 1)), ("semantic", farther)):
            moved = x if operator is None else null_space(operator, x, noise if name == "random" else goal - x)
            z_adv = metric.embed(moved)
            distance = cosine_distance(z_adv, z, metric.anchor)
            change = torch.linalg.vector_norm(z_adv - z, dim=-1) / torch.linalg.vector_norm(z, dim=-1)
            flipped = (metric.margin(z_adv, z0, z1) > 0) != left
            if name == "random" and operator is not None:
                columns |= {"length": sample_norm(moved - x), "change": change, "distance": distance}
                columns["flipped"] = flipped.double()
            exact = torch.where(expand(change < EXACT, x), moved, x)

            def is_same(images: Tensor, z: Tensor = z) -> Tensor:
                return cosine_distance(metric.embed(images), z, metric.anchor) <= (self.same or 0.0)

            def stays(images: Tensor) -> Tensor:
                return (metric.margin(metric.embed(images), z0, z1) > 0) == left

            same = exact if self.same is None else _last(is_same, x, moved, goal)
            answer = _last(stays, x, moved, goal)
            for what, images in (("same", same), ("answer", answer)):
                for measure, distance_of in self.measures.items():
                    columns[f"{what}/{name}/{measure}"] = distance_of(x, images)
            pictures[f"{key}/{name}"] = moved
        return columns

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        sets: dict[str, NullSpaceSet] = {}
        gathered = {
            name: {column: values[rows["searched"] > 0] for column, values in rows.items()}
            for name, rows in self.gather(trainer, module).items()
        }
        for name, rows in self.with_parts(module, gathered).items():
            metrics = {key: self._summarise(key, rows) for key in self.searched}
            sets[name] = {"num_triplets": len(rows["searched"]), "metrics": metrics}
            own = metrics["metric"]["moves"]
            stage = "test" if trainer.testing else "val"
            log_score(module, f"{stage}/{name}/null_space_length", own["mean_length"] if own else 0.0)
            log_score(module, f"{stage}/{name}/null_space_flipped", own["flipped"] if own else 0.0)
        drawn = [name for name, rows in gathered.items() if bool(rows[DRAWN].any())]
        self.remove_others(trainer, [self._picture(trainer, name) for name in drawn])
        same, most = self.same, self.max_triplets
        self.write_section(
            trainer,
            lambda source: {
                "null_space": {**source, "seed": self.seed, "same": same, "max_triplets": most, "sets": sets}
            },
        )

    def _summarise(self, key: str, rows: dict[str, Tensor]) -> NullSpaceMetric:
        operator = self.searched[key][1]
        layer = None if operator is None else str(operator)
        reason, moves = None, None
        if operator is None:
            reason = "the first layer is not linear: it passes all of its input on"
        elif not (rows[f"{key}/length"] > 0).any():
            reason = f"nothing moved in the kernel of the first operator ({layer}): it is trivial, or the box is full"
        else:
            moves = NullSpaceMoves(
                mean_length=float(rows[f"{key}/length"].mean()),
                median_change=float(rows[f"{key}/change"].double().quantile(0.5)),
                largest_change=float(rows[f"{key}/change"].max()),
                # One that had no room to move is no collision.
                exact=float(((rows[f"{key}/change"] < EXACT) & (rows[f"{key}/length"] > 0)).double().mean()),
                largest_distance=float(rows[f"{key}/distance"].max()),
                flipped=float(rows[f"{key}/flipped"].mean()),
            )

        def reach(what: str) -> dict[str, NullSpaceReach]:
            return {name: self._reach(f"{key}/{what}/{name}", rows) for name in DIRECTIONS}

        return {"layer": layer, "reason": reason, "moves": moves, "same": reach("same"), "answer": reach("answer")}

    def _reach(self, column: str, rows: dict[str, Tensor]) -> NullSpaceReach:
        lpips = rows.get(f"{column}/lpips")
        return {
            "mean_length": float(rows[f"{column}/length"].mean()),
            "largest_length": float(rows[f"{column}/length"].max()),
            "rmse": float(rows[f"{column}/rmse"].mean()),
            "ssim": float(1 - rows[f"{column}/ssim"].mean()),
            "lpips": None if lpips is None else float(lpips.mean()),
        }

    def _picture(self, trainer: L.Trainer, name: str) -> Path:
        return self.output_directory(trainer) / "plots" / f"null-space-{name}.png"

    def _draw(self, path: Path, batch: Triplet, pictures: dict[str, Tensor]) -> None:
        count = min(self.num_examples, len(batch))
        x = batch.reference[:count]
        columns, labels = [x], [[f"#{i}: reference" for i in batch.index[:count].tolist()]]
        for key, moved in pictures.items():
            metric, _, direction = key.rpartition("/")
            change = moved[:count] - x
            gain = 0.5 / change.flatten(1).abs().amax(1).clamp(min=1e-6)
            columns += [0.5 + change * expand(gain, change), moved[:count]]
            labels.append([f"{direction} × {g:.3g}" if float(d.norm()) else "none" for g, d in zip(gain, change)])  # noqa: B905
            title = "this metric" if metric == "metric" else metric
            labels.append([f"{title}: ‖δ‖₂ = {float(d.norm()):.3g}" for d in change])
        plot_grid(path, columns, labels, title="what the first operator cannot see: pattern and image that collides")


def _measures(lpips: Path | None) -> dict[str, Distance]:
    """How far an image has moved, ``(N,)`` each: ℓ2, root mean square, 1 − SSIM, and LPIPS where there are weights."""
    from lipsim.metric.distances import pixel_l2, ssim  # torchmetrics, which the command line loads only here

    def rmse(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).flatten(1).square().mean(1).sqrt()

    def single(x: Tensor, y: Tensor) -> Tensor:
        return ssim(x.float(), y.float()).to(x)  # whose convolutions take float64 tens of times as long

    measures: dict[str, Distance] = {"length": pixel_l2, "rmse": rmse, "ssim": single}
    if lpips is not None:
        from lipsim.metric.deep_distances import LPIPS  # torchvision's networks

        network = LPIPS("alex", lpips)

        def deep(x: Tensor, y: Tensor) -> Tensor:
            distance: Tensor = network.to(x)(x, y)
            return distance

        measures["lpips"] = deep
    return measures


def _last(holds: Callable[[Tensor], Tensor], x: Tensor, moved: Tensor, goal: Tensor) -> Tensor:
    """The last point found from ``x`` to ``moved`` and on to ``goal`` at which something still holds, by bisection."""
    kept = expand(holds(moved), x)
    start, end = torch.where(kept, moved, x), torch.where(kept, goal, moved)
    low = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    high = torch.ones_like(low)
    low = torch.where(holds(end), high, low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fine = holds(start + expand(middle, x) * (end - start))
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return start + expand(low, x) * (end - start)
