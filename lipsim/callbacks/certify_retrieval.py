"""Search a gallery with every query of an evaluation set: recall and votes of neighbours, natural to attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lipsim.attacks import pgd
from lipsim.attacks.projections import sample_norm
from lipsim.attacks.retrieval import GOALS, RetrievalObjective
from lipsim.callbacks.base import TripletCallback, check_budgets, cover_feature_error, drawn_positions, log_score
from lipsim.callbacks.certify_radii import EPS, ERROR_SAMPLE
from lipsim.callbacks.sample_table import gather_objects
from lipsim.certificates.gallery import Gallery
from lipsim.certificates.neighbours import knn_radius, most_frequent, recall_radius
from lipsim.certificates.numbers import check_count
from lipsim.certificates.ranking import nearest
from lipsim.data.labelled import LabelledBatch
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.datamodules.labelled import LabelledFolderData
from lipsim.evaluation.batches import EvaluatedImages
from lipsim.evaluation.module import EvaluationModule, evaluation_loaders
from lipsim.evaluation.resume import RemainingData
from lipsim.metric import PerceptualMetric
from lipsim.results import eps_label
from lipsim.results.schema import Retrieval, RetrievalScores, RetrievalSet
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

KS = (1, 10, 20, 100, 200)
_ROUNDING = 1e-6  # by which changes may leave their ball


class CertifyRetrieval(TripletCallback):
    """Recall@k and k-nearest-neighbour accuracy of :class:`lipsim.datamodules.LabelledFolderData`; in a test alone.

    *Recall@k*: one of the ``k`` nearest images of the gallery has the class of the query. *k-NN accuracy*: it is the
    most frequent class among them; of equally frequent ones that of the nearest image. Both natural, certified at ε
    (:func:`lipsim.certificates.neighbours.recall_radius` and :func:`~lipsim.certificates.neighbours.knn_radius`, lower
    bounds), and under attack: PGD on either goal at each ``k``, and a query counts as broken at ε in every score that
    any of the changed images found within ε breaks. A break inside a certified radius is counted as a violation, which
    must never happen. A test writes results.json and retrieval.csv.

    The embeddings of the gallery are computed when the test starts, shared among processes.

    Args:
        ks: numbers of neighbours, ascending, each below the size of the gallery.
        eps: ℓ2 budgets in input pixels in [0, 1], ascending.
        steps: of PGD at each budget, goal and ``k``; 0: no attack.
        max_attacked: queries that are attacked, drawn at random; None: all. Scores under attack are about these.
        seed: of the draw and the attacks.
        error_sample: images that the search for the float32 error looks at besides its own; 0: no search.
        directory: as in :class:`TripletCallback`.

    Attributes:
        results: what the last run wrote, or would have; None before one.

    Raises:
        ValueError: bad numbers, other data, or a ``k`` that the gallery is too small for.
    """

    files = ("retrieval.csv", "retrieval-*.csv")
    batches = LabelledBatch
    differentiates = True

    def __init__(
        self,
        ks: list[int] = list(KS),  # noqa: B006  (copied below)
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        steps: int = 10,
        max_attacked: int | None = None,
        seed: int = 0,
        error_sample: int = ERROR_SAMPLE,
        directory: Path | None = None,
    ) -> None:
        super().__init__(directory, validate=False)
        if not ks or sorted({check_count("k", k) for k in ks}) != list(ks):
            raise LipsimError(f"expected numbers of neighbours ks in ascending order, each once, got {ks}")
        self.ks, self.eps, self.seed = list(ks), check_budgets(eps), seed
        self.steps, self.max_attacked = check_count("steps", steps, least=0), max_attacked
        self.error_sample = check_count("error_sample", error_sample, least=0)
        self.results: Retrieval | None = None
        self.gallery: Gallery | None = None
        self.labels = torch.empty(0, dtype=torch.int64)
        self._unit = torch.empty(0)
        self._classes = 0
        self._attacked: PerceptualMetric | None = None
        self._drawn: list[Tensor | None] = []

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        metric = module.metric
        metric.check_precision()
        folder = _gallery_of(trainer)
        if self.ks[-1] >= len(folder):
            raise LipsimError(f"expected every k below {len(folder)}, the size of the gallery, got {self.ks[-1]}")
        cover_feature_error(trainer, module, self.error_sample)
        features = self._embed(trainer, module, folder)
        self.gallery = Gallery(features, metric.anchor)
        self.labels, self._classes = folder.labels.to(module.device), len(folder.classes)
        self._unit = self.gallery.unit(torch.arange(len(features), device=features.device)).float()
        self._attacked = metric.frozen_copy()
        count = len(evaluation_loaders(trainer))
        self._drawn = [drawn_positions(module, i, self.max_attacked, self.seed) for i in range(count)]

    def _embed(self, trainer: L.Trainer, module: EvaluationModule, folder: LabelledFolder) -> Tensor:
        """Features of the gallery, ``(M, D)``, on every process; each embeds a share of the batches."""
        size = max(1, int(evaluation_loaders(trainer)[0].batch_size or 32))
        batches = [list(range(start, min(start + size, len(folder)))) for start in range(0, len(folder), size)]
        own: dict[int, Tensor] = {}
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with Progress("embedding the gallery", enabled=shown) as progress:
            advance = progress.counter(len(batches[:: trainer.world_size]), "batches")
            for number in range(trainer.global_rank, len(batches), trainer.world_size):
                images = folder.load(batches[number]).to(module.device, module.metric.dtype)
                own[number] = module.embed_checked(images).cpu()
                advance(1)
        shares: dict[int, Tensor] = {number: z for share in gather_objects(own) for number, z in share.items()}
        return torch.cat([shares[number] for number in range(len(batches))]).to(module.device)

    def see(  # type: ignore[override]  # batches of labelled images
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedImages, batch: LabelledBatch, name: str
    ) -> dict[str, Tensor]:
        assert self.gallery is not None
        options = {key: value for key, value in module.metric.certificate_options.items() if key != "anchor"}
        z, labels, own = evaluated.features, self.labels, batch.label
        right = self._right(z, own)
        _, vote_radius = knn_radius(z, self.gallery, labels, self.ks, **options)
        radii = {"vote": vote_radius, "recall": recall_radius(z, self.gallery, labels, own, self.ks, **options)}
        attacked = self._chosen(module, name)
        broken_at, length = self._attack(batch, right, attacked)
        columns: dict[str, Tensor] = {"label": own, "attacked": attacked.long()}
        for goal in GOALS:
            for i, k in enumerate(self.ks):
                # A wrong answer is certified by nothing.
                columns[f"{goal}@{k}"] = right[goal][:, i].long()
                columns[f"{goal}@{k} radius"] = torch.where(right[goal][:, i], radii[goal][:, i], 0.0)
                columns[f"{goal}@{k} broken at"] = broken_at[goal][:, i]
                columns[f"{goal}@{k} length"] = length[goal][:, i]
        return columns

    def _right(self, z: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Whether recall and vote have the label of each query at each ``k``, ``(N, len(ks))`` each."""
        assert self.gallery is not None
        found = self.labels[nearest(z, self.gallery, self.ks[-1])]
        same = found == own.unsqueeze(1)
        recall = torch.stack([same[:, :k].any(1) for k in self.ks], 1)
        return {"recall": recall, "vote": torch.stack([most_frequent(found[:, :k]) == own for k in self.ks], 1)}

    def _chosen(self, module: EvaluationModule, name: str) -> Tensor:
        """Which queries of the batch are attacked, ``(N,)`` bool."""
        drawn = self._drawn[module.set_names().index(name)]
        if not self.steps:
            return torch.zeros_like(self.position, dtype=torch.bool)
        if drawn is None:
            return torch.ones_like(self.position, dtype=torch.bool)
        return torch.isin(self.position, drawn.to(self.position.device))

    def _attack(
        self, batch: LabelledBatch, right: Mapping[str, Tensor], attacked: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """At which ε each score of each query breaks first, and the length of the change that did it.

        ``(N, len(ks))`` each: 0 where it is wrong as it is, ∞ where nothing broke it or nothing tried.
        """
        assert self._attacked is not None
        broken_at: dict[str, Tensor] = {goal: torch.where(right[goal], math.inf, 0.0).double() for goal in GOALS}
        length: dict[str, Tensor] = {goal: torch.full_like(broken_at[goal], math.inf) for goal in GOALS}
        for eps in self.eps if self.steps else ():
            for i, k in enumerate(self.ks):
                for goal in GOALS:
                    rows = (attacked & (broken_at[goal][:, i] > eps)).nonzero().flatten()
                    if not len(rows) or (goal == "vote" and k == 1):  # which is recall@1
                        continue
                    images, own = batch.images[rows], batch.label[rows]
                    objective = RetrievalObjective(self._attacked, images, self._unit, self.labels, own, k, goal)
                    x_adv = pgd(objective, images, eps=eps, steps=self.steps, seed=self.seed, index=batch.index[rows])
                    moved = sample_norm(x_adv.double() - images.double())
                    within = moved <= eps * (1 + _ROUNDING)  # the attack ends on the sphere
                    still = self._right(self._attacked.embed(x_adv), own)
                    for other in GOALS:
                        # Any change within ε counts against every score.
                        newly = right[other][rows] & ~still[other] & within.unsqueeze(1)
                        shorter = newly & (moved.unsqueeze(1) < length[other][rows])
                        length[other][rows] = torch.where(shorter, moved.unsqueeze(1), length[other][rows])
                        found = broken_at[other][rows]
                        broken_at[other][rows] = torch.where(newly, found.clamp(max=eps), found)
        return broken_at, length

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        assert self.gallery is not None
        gathered = self.gather(trainer, module)
        sets = {name: self._summarise(rows) for name, rows in gathered.items()}
        for name, scores in sets.items():
            for what, of_k in (("recall", scores["recall"]), ("knn", scores["knn"])):
                for k, found in of_k.items():
                    log_score(module, f"test/{name}/{what}_{k}", found["natural"])
        self.remove_others(trainer, self.write_rows(trainer, "retrieval", gathered))
        metric = module.metric
        content: Retrieval = {
            "lipschitz": metric.lipschitz if metric.has_bound else None,
            "feature_error": metric.feature_error,
            "ks": self.ks,
            "eps": self.eps,
            "steps": self.steps,
            "seed": self.seed,
            "sets": sets,
        }
        self.results = content
        self.write_section(trainer, lambda source: {"retrieval": {**source, **content}})

    def _summarise(self, rows: Mapping[str, Tensor]) -> RetrievalSet:
        assert self.gallery is not None
        attacked = rows["attacked"].bool()
        violations = sum(
            int((rows[f"{goal}@{k} length"] < rows[f"{goal}@{k} radius"]).sum()) for goal in GOALS for k in self.ks
        )
        return {
            "num_queries": len(rows["position"]),
            "num_gallery": len(self.gallery),
            "num_classes": self._classes,
            "num_attacked": int(attacked.sum()),
            "violations": violations,
            "recall": {str(k): self._scores(rows, f"recall@{k}", attacked) for k in self.ks},
            "knn": {str(k): self._scores(rows, f"vote@{k}", attacked) for k in self.ks},
        }

    def _scores(self, rows: Mapping[str, Tensor], column: str, attacked: Tensor) -> RetrievalScores:
        radius, broken_at = rows[f"{column} radius"], rows[f"{column} broken at"][attacked]
        scores: RetrievalScores = {
            "natural": float(rows[column].double().mean()),
            "certified": {eps_label(eps): float((radius > eps).double().mean()) for eps in self.eps},
            "attacked": {},
        }
        if len(broken_at):
            scores["attacked"] = {eps_label(eps): float((broken_at > eps).double().mean()) for eps in self.eps}
            scores["natural_of_attacked"] = float(rows[column][attacked].double().mean())
        return scores


def _gallery_of(trainer: L.Trainer) -> LabelledFolder:
    """The gallery of the data module that a test is on.

    Raises:
        ValueError: it has none.
    """
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    data = data.data if isinstance(data, RemainingData) else data
    if not isinstance(data, LabelledFolderData):
        raise LipsimError(
            f"expected the data module lipsim.datamodules.LabelledFolderData to search in, got {type(data).__name__}"
        )
    assert data.gallery is not None
    return data.gallery
