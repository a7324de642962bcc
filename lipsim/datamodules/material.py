"""Data module of the Material judgements."""

from __future__ import annotations

from pathlib import Path

from lipsim.certificates.numbers import check_count
from lipsim.data.sets.material import ANSWERS, NUM_IMAGES
from lipsim.datamodules.base import TripletData, as_fetched
from lipsim.utils.errors import LipsimError
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
        implied: training triplets besides, of the training's images, with the votes that an ordinal embedding of its
            votes implies, see :func:`lipsim.data.ordinal.implied_votes`; weigh them by agreement.
        seed: of the split, of the sides and of the implied triplets.
        resize: "float" or "pil", as in :class:`TripletData`.

    Raises:
        ValueError: impossible counts.
    """

    def __init__(
        self,
        root: Path = Path("data/material-appearance-similarity"),
        image_size: int = 64,
        batch_size: int = 2048,
        val_triplets: int = 2000,
        held_out_materials: int = 20,
        ties: bool = False,
        implied: int = 0,
        seed: int = 0,
        resize: str | None = None,
    ) -> None:
        super().__init__(batch_size, image_size=image_size, resize=resize)
        check_count("val_triplets", val_triplets)
        self.implied = check_count("implied", implied, least=0)
        if check_count("held_out_materials", held_out_materials, least=0) > NUM_IMAGES:
            raise LipsimError(f"expected at most {NUM_IMAGES} held_out_materials, got {held_out_materials}")
        self.root, self.seed = user_path(root), seed
        self.val_triplets, self.held_out_materials, self.ties = val_triplets, held_out_materials, ties
        self.collate = as_fetched

    def setup(self, stage: str) -> None:
        """Read the images and the answers."""
        if self.train_set is None:
            self._read()
        if stage == "fit":
            self._imply_votes(self.implied, self.seed)

    def _read(self) -> None:
        official = ["official"] if (self.root / ANSWERS.format(part="test")).is_file() else []
        self.test_sets = self._open(
            "material",
            ["train", "triplets", "materials", *official],
            self.root,
            ties=self.ties,
            seed=self.seed,
            num_triplets=self.val_triplets,
            num_materials=self.held_out_materials,
        )
        self.train_set = self.test_sets.pop("train")
        self.val_sets = {name: self.test_sets[name] for name in ("triplets", "materials")}
