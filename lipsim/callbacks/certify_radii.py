"""Certify every triplet of an evaluation set."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim.audit import LayerBound, LipschitzReport
from lipsim.audit.arithmetic import ERROR_FACTOR
from lipsim.callbacks.answers import Answers, curve_grid
from lipsim.callbacks.base import TripletCallback, check_budgets, first_images, log_score
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data import Triplet
from lipsim.data.check import check_images
from lipsim.data.loading import num_samples
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule, evaluation_loaders
from lipsim.results.schema import Certification, CertifiedSet

EPS = (36 / 255, 72 / 255, 108 / 255, 1.0)
ERROR_SAMPLE = 32  # images of each set


class CertifyRadii(TripletCallback):
    """Audit the encoder, certify every triplet, log certified scores; a test run writes results.json and radii.csv.

    Features come in full precision from the evaluation step, the geometry runs in float64. The error of the float32
    features against float64 is searched for among all images in [0, 1], the first ones of each set included, enlarged,
    and subtracted from every radius; validation searches less.

    Where the data module names parts of a set (``test_groups``), the results have them beside the whole, from the same
    rows: a triplet is embedded and certified once. In radii.csv a column of 0 and 1 says what belongs to a part.

    Args:
        eps: ℓ2 budgets of the certified score, in input pixels in [0, 1], ascending.
        error_sample: images of each set that the search for the float32 error looks at besides its own
            (:func:`lipsim.audit.arithmetic.largest_feature_error`); 0: no search. What the metric declares itself is
            covered in any case.
        error_factor: at least 1, by which the largest error found is enlarged.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`.

    Attributes:
        results: what the last run wrote, or would have, as the section "certified" of results.json; None before one.

    Raises:
        lipsim.audit.UnboundedModuleError: the encoder has no Lipschitz bound (when validation or test starts).
        ValueError: budgets that are negative or not ascending; an ``error_factor`` below 1 or a negative
            ``error_sample``; weights in half precision.
    """

    files = ("radii.csv", "radii-*.csv")

    def __init__(
        self,
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        error_sample: int = ERROR_SAMPLE,
        error_factor: float = ERROR_FACTOR,
        directory: Path | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(directory, validate)
        self.eps = check_budgets(eps)
        self.error_sample = check_count("error_sample", error_sample, least=0)
        self.error_factor = error_factor
        self.report: LipschitzReport | None = None
        self._lipschitz = math.inf  # of the weights that are evaluated: a validation may end with others in their place
        # The error that this callback declared last, and what others have declared: the least, and how it was found.
        self._found_error, self._least_error, self._least_kind = -1.0, 0.0, "none"
        self.results: Certification | None = None

    @property
    def error_factor(self) -> float:
        """At least 1."""
        return self._error_factor

    @error_factor.setter
    def error_factor(self, factor: float) -> None:
        self._error_factor = check_number("error_factor", factor, least=1)

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        metric = module.metric
        metric.check_precision()
        declared = metric.declared_lipschitz
        if declared is None or declared == math.inf:
            self.report = metric.audit()
        else:  # whoever declared it answers for it
            self.report = LipschitzReport(declared, (LayerBound("declared", type(metric.encoder).__name__, declared),))
        self._lipschitz = metric.lipschitz
        # On the first images of the whole sets, not of a process's share: the same for any number of processes.
        loaders = evaluation_loaders(trainer) if self.error_sample else []
        samples = [first_images(loader, self.error_sample) for loader in loaders if num_samples(loader)]
        for images in samples:  # no batch has been checked yet
            metric.check_images(images, check_range=False)
            check_images(images)
        if metric.declared_feature_error != self._found_error:  # somebody else's, which is covered at least
            self._least_error, self._least_kind = metric.declared_feature_error, metric.feature_error_kind
        found = 0.0
        if samples:
            found = metric.measure_feature_error(
                torch.cat(samples), thorough=bool(trainer.testing), factor=self.error_factor
            )
        largest = torch.tensor(max(found, self._least_error), dtype=torch.float64, device=module.device)
        # The same on every process, whatever hardware it runs on.
        self._found_error = metric.feature_error = float(trainer.strategy.reduce(largest, reduce_op="max"))
        searched = bool(samples) and self._found_error > self._least_error
        metric.feature_error_kind = "searched" if searched else self._least_kind

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        certificate = evaluated.certificate
        return {
            "right_vote": batch.right_vote,
            "prefers_left": certificate.prefers_left.long(),
            "margin": certificate.margin,
            "radius": certificate.radius,
            "left_radius": certificate.left_radius,
            "right_radius": certificate.right_radius,
            "joint_radius": certificate.joint_radius,
            "pixels": certificate.pixels,
            "published_radius": evaluated.published_radius,
            "feature_norm": torch.linalg.vector_norm(evaluated.features[0].double(), dim=-1),
        }

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        assert self.report is not None
        gathered = self.gather(trainer, module)
        sets = {name: self._summarise(rows) for name, rows in self.with_parts(module, gathered).items()}
        for name, scores in sets.items():
            self._log(trainer, module, name, scores)
        with_membership = {
            name: {**rows, **{part: mask[rows["position"]].long() for part, mask in module.groups(name).items()}}
            for name, rows in gathered.items()
        }
        self.remove_others(trainer, self.write_rows(trainer, "radii", with_membership))
        metric, dtype = module.metric, str(module.metric.dtype).removeprefix("torch.")
        content: Certification = {
            "lipschitz": self._lipschitz,
            "layers": {layer.name: layer.bound for layer in self.report.layers},
            "anchor": metric.anchor,
            "feature_error": metric.feature_error,
            "feature_error_kind": metric.feature_error_kind,
            "feature_error_sample": self.error_sample,
            "feature_error_factor": self.error_factor,
            "resize": metric.preprocess.label,
            "precision": f"features {dtype} with TF32 and autocast off, geometry float64",
            "eps": self.eps,
            "sets": sets,
        }
        self.results = content
        self.write_section(trainer, lambda source: {"certified": {**source, **content}})

    def _log(self, trainer: L.Trainer, module: EvaluationModule, name: str, scores: CertifiedSet) -> None:
        stage = "test" if trainer.testing else "val"
        for label, score in scores["certified"].items():
            log_score(module, f"{stage}/{name}/certified_{label}", score)
        log_score(module, f"{stage}/{name}/median_radius", scores["radius"]["median"])

    def _summarise(self, rows: dict[str, Tensor]) -> CertifiedSet:
        answers = Answers(rows["margin"], rows["right_vote"], rows["position"])
        grid = curve_grid(self.eps)
        return {
            "num_triplets": len(answers.index),
            "num_tied_votes": answers.num_tied_votes,
            "majority": answers.natural("majority"),
            "vote": answers.natural("vote"),
            "certified": answers.certified(rows["radius"], self.eps),
            "published": answers.certified(rows["published_radius"], self.eps),
            "joint": answers.certified(rows["joint_radius"], self.eps),
            "curve": {
                "eps": grid,
                "certified": answers.curve(rows["radius"], grid),
                "published": answers.curve(rows["published_radius"], grid),
                "joint": answers.curve(rows["joint_radius"], grid),
            },
            "radius": answers.radius(rows["radius"]),
            "one_pixel_immune": float((rows["pixels"] >= 1).double().mean()),
        }
