"""Mean weights of a training that had ended and is given again."""

from __future__ import annotations

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging


class FinishedAverage(Callback):
    """Leaves the mean weights in the module where a training that had ended is resumed, as its end did.

    Lightning's ``WeightAveraging`` puts them there when training ends, and the last weights when it resumes. One that
    has nothing left to do neither begins nor ends, so that what is exported would be those.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ended = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._ended:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_train_end(trainer, pl_module)
