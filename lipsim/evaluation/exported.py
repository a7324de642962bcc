"""A metric in a test: one in memory, or one from a file."""

from __future__ import annotations

from typing import Any

from lipsim.data import Triplet
from lipsim.data.check import check_votes
from lipsim.data.labelled import LabelledBatch
from lipsim.data.loading import Finished
from lipsim.evaluation.batches import EvaluatedBatch, Evaluation
from lipsim.evaluation.module import EvaluationModule
from lipsim.metric import PerceptualMetric, load
from lipsim.metric.files import resolve
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_sha256
from lipsim.utils.precision import full_precision


class EvaluatedMetric(EvaluationModule):
    """A metric behind the hooks that the callbacks of a test work with; it trains nothing and has no optimizer.

    Args:
        metric: the metric; a test measures the error of its features, so hand over a copy of one that is in use.

    Attributes:
        checkpoint: where the metric is from, as it was given; None: from memory.
        checkpoint_sha256: of that file.
    """

    def __init__(self, metric: PerceptualMetric) -> None:
        super().__init__(metric)
        self.checkpoint: str | None = None
        self.checkpoint_sha256: str | None = None

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not isinstance(batch, Finished):
            super().on_test_batch_start(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """A batch with its features, ``{"evaluated": …}``; None for one that is finished."""
        if isinstance(batch, Finished):
            return None
        if isinstance(batch, LabelledBatch):
            return self.embed_labelled(batch)
        if not isinstance(batch, Triplet):
            raise LipsimError(
                f"{self.set_name(dataloader_idx)} serves {type(batch).__name__} and no triplets with votes; "
                "choose a data module of triplets"
            )
        check_votes(batch)
        with full_precision():
            features = batch.embed(self.embed_checked)
        return {"evaluated": EvaluatedBatch.of(self.metric, batch, features)}


class ExportedMetric(EvaluatedMetric):
    """The metric of a file in a test.

    Args:
        checkpoint: a ``.safetensors`` file, a ``.ckpt`` of a stage, or the name of a bundled metric.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(load(checkpoint))
        self.checkpoint = checkpoint
        self.checkpoint_sha256 = file_sha256(resolve(checkpoint))
