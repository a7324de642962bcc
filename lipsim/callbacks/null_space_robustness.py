"""Null-space perturbations of the reference: changes of the image that the first operator cannot see."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim.attacks import FirstOperator, first_operator, null_space
from lipsim.attacks.projections import sample_norm
from lipsim.callbacks.base import TripletCallback, load_others, log_score
from lipsim.data import Triplet
from lipsim.evaluation.module import EvaluatedBatch, EvaluationModule
from lipsim.metric import PerceptualMetric
from lipsim.results.schema import NullSpaceMetric, NullSpaceMoves, NullSpaceSet
from lipsim.utils.sampling import sample_normal

EXACT = 1e-6  # relative change of an embedding below which a collision counts as exact


class NullSpaceRobustness(TripletCallback):
    """How far each reference can move inside the kernel of the encoder's first operator, and what becomes of it.

    A large ``‖δ‖`` with an unchanged embedding is an exact collision. Where the first operator has no kernel, or is
    nonlinear as an SLL block is, no such perturbation exists and the report says so.

    Args:
        seed: of the noise that is projected onto the kernel; it depends on the sample's index.
        others: name → exported metric, searched in the same way.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`.
    """

    differentiates = True

    def __init__(
        self,
        seed: int = 0,
        others: dict[str, Path] | None = None,
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.seed = seed
        self.others = load_others(others)
        self.searched: dict[str, tuple[PerceptualMetric, FirstOperator | None]] = {}

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        self.searched = {}
        for name, metric in {"metric": module.metric, **self.others}.items():
            # In float64, so that an exact collision shows as exact.
            exact = metric.frozen_copy(torch.float64, module.device)
            self.searched[name] = exact, first_operator(exact.encoder, exact.image_size)

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        batch = batch.to(torch.float64)
        noise = sample_normal(batch.reference, seed=self.seed, index=batch.index)
        columns: dict[str, Tensor] = {"right_vote": batch.right_vote}
        for key, (metric, operator) in self.searched.items():
            if operator is not None:
                found = _search(metric, operator, batch, noise)
                columns |= {f"{key}/{column}": value for column, value in found.items()}
        return columns

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        sets: dict[str, NullSpaceSet] = {}
        gathered = self.gather(trainer, module)
        for name, rows in self.with_parts(module, gathered).items():
            metrics = {key: self._summarise(key, rows) for key in self.searched}
            sets[name] = {"num_triplets": len(rows["right_vote"]), "metrics": metrics}
            own = metrics["metric"]["moves"]
            stage = "test" if trainer.testing else "val"
            log_score(module, f"{stage}/{name}/null_space_length", own["mean_length"] if own else 0.0)
            log_score(module, f"{stage}/{name}/null_space_flipped", own["flipped"] if own else 0.0)
        self.write_section(trainer, lambda source: {"null_space": {**source, "seed": self.seed, "sets": sets}})

    def _summarise(self, key: str, rows: dict[str, Tensor]) -> NullSpaceMetric:
        operator = self.searched[key][1]
        if operator is None:
            reason = "the first layer is not linear: it passes all of its input on"
            return {"layer": None, "reason": reason, "moves": None}
        layer = f"{operator.kind} {operator.name}"
        if not (rows[f"{key}/length"] > 0).any():
            return {"layer": layer, "reason": f"the first operator ({layer}) has a trivial kernel", "moves": None}
        moves: NullSpaceMoves = {
            "mean_length": float(rows[f"{key}/length"].mean()),
            "median_change": float(rows[f"{key}/change"].median()),
            "largest_change": float(rows[f"{key}/change"].max()),
            "exact": float((rows[f"{key}/change"] < EXACT).double().mean()),
            "largest_distance": float(rows[f"{key}/distance"].max()),
            "flipped": float(rows[f"{key}/flipped"].double().mean()),
        }
        return {"layer": layer, "reason": None, "moves": moves}


def _search(metric: PerceptualMetric, operator: FirstOperator, batch: Triplet, noise: Tensor) -> dict[str, Tensor]:
    x_adv = null_space(operator.forward, batch.reference, noise)
    z, z_adv, z0, z1 = metric.embed(torch.cat([batch.reference, x_adv, batch.left, batch.right])).chunk(4)
    length = sample_norm(x_adv - batch.reference)
    change = torch.linalg.vector_norm(z_adv - z, dim=-1) / torch.linalg.vector_norm(z, dim=-1)
    return {
        "length": length,
        "change": change,
        "distance": metric(batch.reference, x_adv),
        "flipped": ((metric.margin(z, z0, z1) > 0) != (metric.margin(z_adv, z0, z1) > 0)).long(),
    }
