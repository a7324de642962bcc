"""An exported metric in a test."""

from __future__ import annotations

from typing import Any

from lipsim.data import Triplet
from lipsim.data.check import check_votes
from lipsim.data.loading import Finished
from lipsim.evaluation.module import Evaluation, EvaluationModule
from lipsim.metric import load
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


class ExportedMetric(EvaluationModule):
    """An exported metric behind the hooks that the callbacks of a test work with; it trains nothing.

    Args:
        checkpoint: a ``.safetensors`` file, a ``.ckpt`` of a stage, or the name of a bundled metric.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(load(checkpoint))
        self.checkpoint = checkpoint

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not isinstance(batch, Finished):
            super().on_test_batch_start(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Features ``{"features": (z, z0, z1)}`` of a batch; None for one that is finished."""
        if isinstance(batch, Finished):
            return None
        if not isinstance(batch, Triplet):
            raise LipsimError(
                f"{self.set_name(dataloader_idx)} serves {type(batch).__name__} and no triplets with votes; "
                "choose a data module of triplets"
            )
        check_votes(batch)
        with full_precision():
            return {"features": batch.embed(self.metric.embed)}
