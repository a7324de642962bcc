"""Data modules: the sets of lipsim.data behind the loaders that a trainer asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from lipsim.data import BuiltinTriplets, collate_triplets
from lipsim.data.material import (
    ANSWERS,
    MaterialTriplets,
    load_material_answers,
    load_material_images,
    split_material,
)


class TripletData(L.LightningDataModule):
    """Loaders of one training set and of named evaluation sets.

    Args:
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader; the sets of this package are in memory and need none.
    """

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_set: Dataset[Any] | None = None
        self.val_sets: dict[str, Dataset[Any]] = {}
        self.test_sets: dict[str, Dataset[Any]] = {}
        self.collate: Callable[[Any], Any] = collate_triplets

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders."""
        return list(self.val_sets)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of their loaders."""
        return list(self.test_sets)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train_set is not None
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.val_sets.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.test_sets.values()]

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        share = len(dataset) // processes  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and share >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )


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
        self.options = {"image_size": image_size, "photograph_share": photograph_share, "seed": seed}

    def setup(self, stage: str) -> None:
        """Render what the stage needs; equal sets of one process are rendered once."""
        if stage in ("fit", "validate") and not self.val_sets:
            self.val_sets = {"builtin": self._render("val")}
        if stage == "fit" and self.train_set is None:
            self.train_set = self._render("train")
        if stage == "test" and not self.test_sets:
            self.test_sets = {"builtin": self._render("test")}

    def _render(self, split: str) -> BuiltinTriplets:
        trainer = self.trainer
        alone = trainer is None or trainer.world_size == 1
        with Progress(transient=True, disable=trainer is not None and not trainer.is_global_zero) as progress:
            task = progress.add_task(f"rendering {split} triplets", total=self.sizes[split])
            return BuiltinTriplets(
                split,  # type: ignore[arg-type]
                self.sizes[split],
                **self.options,  # type: ignore[arg-type]
                num_workers=min(8, os.cpu_count() or 1) if alone else 0,
                progress=lambda count: progress.advance(task, count),
            )


class MaterialData(TripletData):
    """Human judgements on material appearance (Lagunas et al. 2019), two validation sets held out of the training part.

    ``triplets``: triplets of known images; ``materials``: every triplet with an image of a material that training never
    shows. A test uses both, and the official test answers as ``official`` where the file is there.

    Args:
        root: clone of the public repository mlagunas/material-appearance-similarity.
        image_size: side to which the images are resized.
        batch_size: triplets in a batch; each batch embeds at most 100 distinct images.
        val_triplets: size of the first validation set.
        held_out_materials: materials behind the second one.
        ties: whether to keep triplets with a tied vote: the vote score counts them, the majority score and the losses
            pass them over.
        seed: of the split and of the sides.
    """

    def __init__(
        self,
        root: Path = Path("data/material-appearance-similarity"),
        image_size: int = 64,
        batch_size: int = 2048,
        val_triplets: int = 2000,
        held_out_materials: int = 20,
        ties: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.root, self.image_size, self.seed = Path(root), image_size, seed
        self.val_triplets, self.held_out_materials, self.ties = val_triplets, held_out_materials, ties
        self.collate = _as_fetched

    def setup(self, stage: str) -> None:
        """Read the images and the answers."""
        if self.train_set is not None:
            return
        answers = load_material_answers(self.root, ties=self.ties, seed=self.seed)
        images, _ = load_material_images(self.root, self.image_size)
        split = split_material(
            answers, num_triplets=self.val_triplets, num_materials=self.held_out_materials, seed=self.seed
        )
        self.train_set = MaterialTriplets(images, split.train)
        self.val_sets = {
            "triplets": MaterialTriplets(images, split.triplets),
            "materials": MaterialTriplets(images, split.materials),
        }
        self.test_sets = dict(self.val_sets)
        if (self.root / ANSWERS.format(part="test")).is_file():
            official = load_material_answers(self.root, "test", ties=self.ties, seed=self.seed)
            self.test_sets["official"] = MaterialTriplets(images, official)


def _as_fetched(batch: Any) -> Any:
    """The set returns whole batches already."""
    return batch
