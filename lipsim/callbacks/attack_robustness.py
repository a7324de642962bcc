"""Attack every triplet of an evaluation set, with the module's metric and with others for comparison."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lipsim.attacks import TwoAFCObjective, pgd
from lipsim.attacks.projections import Norm, sample_norm
from lipsim.callbacks.base import TripletCallback, check_budgets, load_others
from lipsim.callbacks.certify_radii import EPS
from lipsim.callbacks.collect import write_csv
from lipsim.data import Triplet
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric
from lipsim.metrics import agrees
from lipsim.plots import plot_grid
from lipsim.results import eps_label
from lipsim.training.base import Features, MetricModule


class AttackRobustness(TripletCallback):
    """PGD on the reference of each triplet at growing budgets; logs the score that is left.

    A sample is attacked while the metric agrees with its votes; once broken it counts as broken at every larger budget
    and is not attacked again. An answer that flips inside its certified radius is counted as a violation, which must
    never happen. A test run writes results.json and attacks.csv.

    Args:
        eps: budgets, in input pixels in [0, 1], ascending.
        norm: 2 or "inf".
        steps: PGD steps at each budget.
        restarts: PGD runs at each budget.
        seed: of the random starts, which depend on the sample's index and not on batches or processes.
        others: name → exported metric, attacked in the same way on the same triplets.
        num_examples: triplets that a test draws, clean and attacked at the largest budget: plots/attacked-….png.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`; off by default, attacks cost hundreds of forward passes.

    Raises:
        ValueError: budgets that are negative or not ascending.
    """

    def __init__(
        self,
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        norm: Norm = 2,
        steps: int = 50,
        restarts: int = 1,
        seed: int = 0,
        others: dict[str, Path] | None = None,
        num_examples: int = 3,
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.eps = check_budgets(eps)
        self.norm, self.steps, self.restarts, self.seed = norm, steps, restarts, seed
        self.others = load_others(others)
        self.attacked: dict[str, PerceptualMetric] = {}
        self.num_examples = num_examples

    def begin(self, trainer: L.Trainer, module: MetricModule) -> None:
        for metric in self.others.values():
            freeze(metric.to(module.device))
        # A copy without gradients to the weights: attacks differentiate through hundreds of forward passes.
        own = copy.deepcopy(module.metric).requires_grad_(False)
        freeze(own)
        self.attacked = {"metric": own, **self.others}

    def see(
        self, trainer: L.Trainer, module: MetricModule, features: Features, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        # The radius is 0 where the metric has no bound.
        radius = module.metric.reference_radius(*features)
        columns: dict[str, Tensor] = {"right_vote": batch.right_vote, "radius": radius}
        for key, metric in self.attacked.items():
            margin = metric.margin(*(features if key == "metric" else batch.embed(metric.embed)))
            columns |= {f"{key}/{column}": value for column, value in self.attack(metric, batch, margin).items()}
        if trainer.testing and trainer.is_global_zero and name not in self.tables and self.num_examples:
            self._draw_examples(trainer, batch, name)
        return columns

    def attack(self, metric: PerceptualMetric, batch: Triplet, margin: Tensor) -> dict[str, Tensor]:
        """Attack a batch: ``margin``, ``broken_at`` (smallest budget that broke it) and ``length`` (of δ), all (N,).

        Where no budget did, the last two are ∞; where the metric does not agree with the votes to begin with, 0.
        """
        broken_at = torch.full_like(margin, math.inf)
        broken_at[~agrees(margin, batch.right_vote)] = 0.0
        length = broken_at.clone()
        for eps in self.eps:
            rows = torch.isinf(broken_at).nonzero().flatten()
            if not len(rows):
                break
            part = batch.select(rows)
            x_adv, value = self._run(metric, part, margin[rows] > 0, eps)
            broken_at[rows[value > 0]] = eps
            length[rows] = torch.where(value > 0, sample_norm(x_adv - part.reference), length[rows])
        return {"margin": margin, "broken_at": broken_at, "length": length}

    def _run(self, metric: PerceptualMetric, batch: Triplet, chosen_left: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Attacked references and the objective there."""
        objective = TwoAFCObjective(metric, batch.reference, batch.left, batch.right, chosen_left=chosen_left)
        x_adv = pgd(
            objective,
            batch.reference,
            norm=self.norm,
            eps=eps,
            steps=self.steps,
            restarts=self.restarts,
            seed=self.seed,
            index=batch.index,
        )
        return x_adv, objective(x_adv)

    def _draw_examples(self, trainer: L.Trainer, batch: Triplet, name: str) -> None:
        batch = batch.select(torch.arange(min(self.num_examples, len(batch)), device=batch.index.device))
        attacked, titles = [batch.reference], [["reference"] * len(batch)]
        for key, metric in self.attacked.items():
            margin = metric.margin(*batch.embed(metric.embed))
            x_adv, value = self._run(metric, batch, margin > 0, self.eps[-1])
            attacked.append(x_adv)
            titles.append(
                [f"{'this metric' if key == 'metric' else key}: {'flipped' if v > 0 else 'holds'}" for v in value]
            )
        columns = [batch.left, *attacked, batch.right]
        labels = [["left"] * len(batch), *titles, ["right"] * len(batch)]
        path = self.output_directory(trainer) / "plots" / f"attacked-{name}.png"
        plot_grid(path, columns, labels, title=f"PGD on the reference, ε = {eps_label(self.eps[-1])}")

    def finish(self, trainer: L.Trainer, module: MetricModule) -> None:
        gathered = self.gather(trainer, module)
        sets = {name: self._summarise(rows) for name, rows in self.with_parts(module, gathered).items()}
        stage = "test" if trainer.testing else "val"
        for name, summary in sets.items():
            for label, score in summary["metric"]["attacked"].items():
                module.log(f"{stage}/{name}/pgd_{label}", score, sync_dist=True)
        for name, rows in gathered.items():
            self._write_rows(trainer, name, rows)
        settings = {"attack": "pgd", "norm": self.norm, "steps": self.steps, "restarts": self.restarts}
        self.write_section(trainer, "attacked", {**settings, "seed": self.seed, "eps": self.eps, "sets": sets})

    def _summarise(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        untied = rows["right_vote"] != 0.5
        summary: dict[str, Any] = {"num_triplets": len(untied)}
        for name in self.attacked:
            broken_at = rows[f"{name}/broken_at"][untied]
            left = {eps_label(eps): float((broken_at > eps).double().mean()) for eps in self.eps}
            summary[name] = {"natural": float((broken_at > 0).double().mean()), "attacked": left}
        # A certificate R promises the answer for every ‖δ‖₂ < R.
        violated = (rows["metric/broken_at"] > 0) & (rows["metric/length"] < rows["radius"])
        summary["violations"] = int(violated.sum())
        return summary

    @rank_zero_only
    def _write_rows(self, trainer: L.Trainer, name: str, rows: dict[str, Tensor]) -> None:
        if trainer.testing:
            file = "attacks.csv" if len(self.tables) == 1 else f"attacks-{name}.csv"
            write_csv(self.output_directory(trainer) / file, rows)
