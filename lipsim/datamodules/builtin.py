"""Data module of the built-in triplets."""

from __future__ import annotations

import os
import sys

from lipsim.data import TripletSet
from lipsim.data.registry import open_sets
from lipsim.datamodules.base import TripletData
from lipsim.utils.progress import Progress


class BuiltinData(TripletData):
    """Built-in triplets: procedural scenes and photographs, rendered once a process, nothing downloaded.

    Args:
        num_train: training triplets.
        num_val: validation triplets.
        num_test: test triplets.
        image_size: side of the images.
        photograph_share: expected fraction of photographs.
        batch_size: as in :class:`TripletData`.
        seed: of all the sets.
    """

    def __init__(
        self,
        num_train: int = 4000,
        num_val: int = 500,
        num_test: int = 500,
        image_size: int = 64,
        photograph_share: float = 0.25,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.image_size, self.photograph_share, self.seed = image_size, photograph_share, seed

    def setup(self, stage: str) -> None:
        """Render what the stage needs; equal sets of one process are rendered once."""
        if stage in ("fit", "validate") and not self.val_sets:
            self.val_sets = {"builtin": self._render("val")}
        if stage == "fit" and self.train_set is None:
            self.train_set = self._render("train")
        if stage == "test" and not self.test_sets:
            self.test_sets = {"builtin": self._render("test")}

    def _render(self, split: str) -> TripletSet:
        trainer, count = self.trainer, self.sizes[split]
        alone = trainer is None or trainer.world_size == 1
        with Progress(f"rendering {split} triplets", sys.stdout, trainer is None or trainer.is_global_zero) as progress:
            return open_sets(
                "builtin",
                [split],
                image_size=self.image_size,
                resize="float",  # as good as any: nothing is resized
                num_triplets=count,
                photograph_share=self.photograph_share,
                seed=self.seed,
                num_workers=min(8, os.cpu_count() or 1) if alone else 0,
                progress=progress.counter(count, "triplets"),
            )[split]
