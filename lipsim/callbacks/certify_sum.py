"""Certify triplets of an evaluation set by the sum of the evaluated metric and another one, which saturates."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim import certificates
from lipsim.callbacks.answers import Answers, curve_grid
from lipsim.callbacks.base import TripletCallback, check_budgets, log_score
from lipsim.callbacks.certify_radii import EPS
from lipsim.certificates import Term
from lipsim.data import Triplet
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule
from lipsim.layers import freeze
from lipsim.metric import SaturatingSum, load
from lipsim.metric.files import resolve
from lipsim.results.schema import Summation, SummedSet
from lipsim.utils.files import file_sha256

_RADII = ("radius", "left_radius", "right_radius", "joint_radius")


class CertifySum(TripletCallback):
    """Certify the answers of a :class:`lipsim.metric.SaturatingSum`: the evaluated metric, and another of what is near.

    Features of the evaluated metric are those of the evaluation; the other one embeds each triplet besides. Both are
    certified with their own bound and error, that of the evaluated one as :class:`CertifyRadii` finds it, where that
    runs too. A test run writes results.json and summed.csv, on any number of processes, and continues where it stopped.

    Args:
        second: file of the metric ``d₂`` of what is near, or the name of a bundled one.
        weight: ``λ``.
        scale: ``τ``.
        framing: how images come to the second metric, as :func:`lipsim.load` takes it; None: as its file says.
        eps: ℓ2 budgets of the certified score, in input pixels in [0, 1], ascending.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`.

    Attributes:
        second: that metric.
        results: what the last run wrote, or would have, as the section "summed" of results.json; None before one.

    Raises:
        FileNotFoundError: no such metric.
        lipsim.audit.UnboundedModuleError: an encoder has no Lipschitz bound (when validation or test starts).
        ValueError: numbers out of range; when an evaluation starts, metrics that do not see the same images.
    """

    files = ("summed.csv", "summed-*.csv")

    def __init__(
        self,
        second: Path = Path("scattering"),
        weight: float = 8.0,
        scale: float = 0.03,
        framing: str | None = None,
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.weight, self.scale = certificates.sums.check_weight_and_scale(weight, scale)
        self.eps = check_budgets(eps)
        self.file = resolve(second)
        self.framing = framing
        self.second = load(self.file, framing=framing)
        self.others = {self.file.stem: self.second}
        self.results: Summation | None = None

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        freeze(self.second.to(module.device))
        for metric in (module.metric, self.second):
            metric.check_precision()
            if not metric.has_bound:
                metric.audit()
        # Searched for where it runs now, and the same on every process, whatever hardware that is.
        self.second.require_feature_error(self.second.declared_feature_error)
        error = torch.tensor(self.second.feature_error, dtype=torch.float64, device=module.device)
        self.second.feature_error = float(trainer.strategy.reduce(error, reduce_op="max"))
        SaturatingSum(module.metric, self.second, self.weight, self.scale)  # which refuses two that do not go together

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        second = self.second
        with torch.no_grad():
            z, z0, z1 = batch.embed(lambda x: second.embed(x, check_range=False))
        e, e0, e1 = evaluated.projected
        terms = Term(e, e0, e1, **evaluated.options), Term(z, z0, z1, **second.certificate_options)
        found = certificates.certify_sum(batch.reference, *terms, weight=self.weight, scale=self.scale)
        radii = {column: getattr(found, column) for column in _RADII}
        return {"right_vote": batch.right_vote, "margin": found.margin, **radii}

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        gathered = self.gather(trainer, module)
        sets = {name: self._summarise(rows) for name, rows in self.with_parts(module, gathered).items()}
        stage = "test" if trainer.testing else "val"
        for name, summary in sets.items():
            for label, score in summary["certified"].items():
                log_score(module, f"{stage}/{name}/summed_{label}", score)
        self.remove_others(trainer, self.write_rows(trainer, "summed", gathered))
        content: Summation = {
            "second": self.file.stem,
            "second_sha256": file_sha256(self.file),
            "weight": self.weight,
            "scale": self.scale,
            "feature_error": module.metric.feature_error,
            "second_feature_error": self.second.feature_error,
            "eps": self.eps,
            "sets": sets,
        }
        self.results = content
        self.write_section(trainer, lambda source: {"summed": {**source, **content}})

    def _summarise(self, rows: dict[str, Tensor]) -> SummedSet:
        answers = Answers(rows["margin"], rows["right_vote"], rows["position"])
        grid = curve_grid(self.eps)
        return {
            "num_triplets": len(answers.index),
            "num_tied_votes": answers.num_tied_votes,
            "majority": answers.natural("majority"),
            "vote": answers.natural("vote"),
            "certified": answers.certified(rows["radius"], self.eps),
            "joint": answers.certified(rows["joint_radius"], self.eps),
            "radius": answers.radius(rows["radius"]),
            "curve": {
                "eps": grid,
                "certified": answers.curve(rows["radius"], grid),
                "joint": answers.curve(rows["joint_radius"], grid),
            },
        }
