"""Certify triplets of an evaluation set by randomized smoothing: also what metrics without a bound answer."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim.callbacks.answers import Answers, curve_grid
from lipsim.callbacks.base import TripletCallback, check_budgets, drawn_positions, load_others, log_score
from lipsim.callbacks.certify_radii import EPS
from lipsim.certificates import smoothed_radius
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data import Triplet
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric
from lipsim.metric.smoothed import Moving, SmoothedMetric, check_alpha, check_moving
from lipsim.results.schema import SmoothedScores, SmoothedSet, Smoothing
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

_SAID = ("said_left", "said_right", "said_neither")  # counts of the draws that certify
_COLUMNS = ("choice", "radius", "p_lower", *_SAID)


class CertifySmoothed(TripletCallback):
    """Smooth metrics by Gaussian noise and certify their answers: see :class:`lipsim.metric.SmoothedMetric`.

    An answer costs ``n + n0`` forward passes where an exact certificate takes one for each image, and its certificate
    is wrong with probability ``alpha``: each, not all of a table together. The certified score at ε counts the triplets
    on which the smoothed metric agrees with the majority and its radius is above ε; where it abstains it is wrong.

    A test run writes results.json and smoothed.csv. Draws depend on the seed and the index of a triplet alone, so that
    results are the same on any number of processes, and a run that was cut short continues.

    Args:
        sigma: standard deviation of the noise on each value of an image in [0, 1].
        n: draws that certify an answer.
        n0: draws that choose it.
        alpha: probability, for each answer, that its certificate is wrong.
        eps: ℓ2 budgets of the certified score, in input pixels in [0, 1], ascending.
        moving: the image that may change: "reference", "left", "right", or "all", each within the budget; of "all",
            which has noise on all images, there are also scores of answers where one of them moves alone.
        others: name → exported metric, smoothed in the same way on the same triplets; a teacher, for example.
        own: whether to smooth the evaluated metric itself.
        max_triplets: of each set, drawn at random; None: all.
        seed: of the noise and of the draw of triplets.
        batch_size: noisy images at once.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`; off by default, as an answer costs a thousand forward passes.

    Attributes:
        results: what the last run wrote, or would have, as the section "smoothed" of results.json; None before one.

    Raises:
        ValueError: numbers out of range, or no metric to smooth.
    """

    files = ("smoothed.csv", "smoothed-*.csv")

    def __init__(
        self,
        sigma: float = 0.25,
        n: int = 1000,
        n0: int = 100,
        alpha: float = 0.001,
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        moving: Moving = "reference",
        others: dict[str, Path] | None = None,
        own: bool = True,
        max_triplets: int | None = None,
        seed: int = 0,
        batch_size: int = 128,
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.sigma, self.alpha = check_number("sigma", sigma, above=True), check_alpha(alpha)
        self.n, self.n0 = check_count("n", n), check_count("n0", n0)
        self.eps = check_budgets(eps)
        self.moving: Moving = check_moving(moving)
        self.others = load_others(others)
        self.own = own
        self.max_triplets = None if max_triplets is None else check_count("max_triplets", max_triplets)
        self.seed, self.batch_size = check_count("seed", seed, least=0), check_count("batch_size", batch_size)
        if not own and not self.others:
            raise LipsimError("expected own=True or others, got no metric to smooth")
        self.smoothed: dict[str, SmoothedMetric] = {}
        self.drawn: dict[str, Tensor | None] = {}  # positions to certify, by set; None: all
        self.results: Smoothing | None = None

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        metrics: dict[str, PerceptualMetric] = {"metric": module.metric} if self.own else {}
        for name, metric in self.others.items():
            freeze(metric.to(module.device))
            metrics[name] = metric
        self.smoothed = {
            name: SmoothedMetric(
                metric, self.sigma, self.n, self.n0, self.alpha, self.seed, self.moving, self.batch_size
            )
            for name, metric in metrics.items()
        }
        names = module.set_names()
        self.drawn = {name: drawn_positions(module, i, self.max_triplets, self.seed) for i, name in enumerate(names)}

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        drawn = self.drawn[name]
        wanted = torch.ones(len(batch), dtype=torch.bool) if drawn is None else torch.isin(self.position.cpu(), drawn)
        rows = wanted.nonzero().flatten().to(batch.right_vote.device)
        columns = {"right_vote": batch.right_vote, "certified": wanted.long().to(rows.device)}
        for key in self.smoothed:
            for column in _COLUMNS:
                dtype = torch.int64 if column in _SAID else torch.float64
                columns[f"{key}/{column}"] = torch.zeros(len(batch), dtype=dtype, device=rows.device)
        if not len(rows):
            return columns
        part = batch.select(rows)
        images = (part.reference, part.left, part.right)
        bar = trainer.progress_bar_callback
        with Progress(f"smoothing {name}", enabled=bar is not None and trainer.is_global_zero) as progress:
            for key, smoothed in self.smoothed.items():
                noisy = smoothed.passes - (0 if self.moving == "all" else 2)
                advance = progress.counter(len(rows) * noisy, f"passes of {key} in this batch")
                found = smoothed.certify(*images, index=part.index, check_range=False, advance=advance)
                said = found.counts.unbind(1)
                values = (found.choice, found.radius, found.p_lower, *said)
                for column, value in zip(_COLUMNS, values, strict=True):
                    columns[f"{key}/{column}"][rows] = value.to(rows.device)
        return columns

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        gathered = {
            name: {column: values[rows["certified"] > 0] for column, values in rows.items() if column != "certified"}
            for name, rows in self.gather(trainer, module).items()
        }
        sets = {name: self._summarise(rows) for name, rows in self.with_parts(module, gathered).items()}
        stage = "test" if trainer.testing else "val"
        for name, summary in sets.items():
            for key, scores in summary["metrics"].items():
                prefix = f"{stage}/{name}/smoothed" if key == "metric" else f"{stage}/{name}/{key}/smoothed"
                for label, score in scores["certified"].items():
                    log_score(module, f"{prefix}_{label}", score)
        self.remove_others(trainer, self.write_rows(trainer, "smoothed", gathered))
        content: Smoothing = {
            "sigma": self.sigma,
            "n": self.n,
            "n0": self.n0,
            "alpha": self.alpha,
            "moving": self.moving,
            "seed": self.seed,
            "max_triplets": self.max_triplets,
            "eps": self.eps,
            "sets": sets,
        }
        self.results = content
        self.write_section(trainer, lambda source: {"smoothed": {**source, **content}})

    def _summarise(self, rows: dict[str, Tensor]) -> SmoothedSet:
        answers = {key: Answers(rows[f"{key}/choice"], rows["right_vote"], rows["position"]) for key in self.smoothed}
        first = next(iter(answers.values()))
        return {
            "num_triplets": len(first.index),
            "num_tied_votes": first.num_tied_votes,
            "metrics": {key: self._scores(key, found, rows) for key, found in answers.items()},
        }

    def _scores(self, key: str, answers: Answers, rows: dict[str, Tensor]) -> SmoothedScores:
        grid, radii = curve_grid(self.eps), rows[f"{key}/radius"]
        abstained, passes = float((answers.choice == 0).double().mean()), self.smoothed[key].passes
        scores: SmoothedScores = {
            "natural": answers.natural("majority"),
            "vote": answers.natural("vote"),
            "abstained": abstained,
            "certified": answers.certified(radii, self.eps),
            "radius": answers.radius(radii),
            "passes": passes,
            "passes_per_certified": None if abstained == 1 else passes / (1 - abstained),
            "curve": {"eps": grid, "certified": answers.curve(radii, grid)},
        }
        if self.moving == "all":
            single = smoothed_radius(rows[f"{key}/p_lower"], self.sigma)
            scores["certified_single"] = answers.certified(single, self.eps)
        return scores
