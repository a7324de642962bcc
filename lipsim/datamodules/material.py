"""Data module of the Material judgements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lipsim.data.sets.material import (
    ANSWERS,
    MaterialTriplets,
    load_material_answers,
    load_material_images,
    split_material,
)
from lipsim.datamodules.base import TripletData
from lipsim.utils.paths import user_path


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
        self.root, self.image_size, self.seed = user_path(root), image_size, seed
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
