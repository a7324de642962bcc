"""Data module of triplets made of photographs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader

from lipsim.data import Preprocess, TripletSet
from lipsim.data.order import TrainingLoader
from lipsim.data.sets.mixed import MixedTriplets
from lipsim.data.sets.photo_batches import HumanVotes, PhotoBatches, SharedImages
from lipsim.data.sets.photos import PhotoTriplets
from lipsim.datamodules.base import TripletData, as_fetched, check_names
from lipsim.datamodules.folder import ImageFolderData
from lipsim.datamodules.labelled import LabelledFolderData
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


class PhotoData(TripletData):
    """Triplets of the photographs of an image folder, ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``.

    Their kinds are those of :mod:`lipsim.data.sets.photos`. Training draws all kinds by their shares, and no triplet
    twice in an epoch of any length: nothing is stored, so take one long epoch. Every kind that can be ("teacher" with a
    cache) is a validation set of its own, over the images of val/; a test has other triplets of the same images. Each
    process holds the images in memory.

    Args:
        root: folder that has train/ and val/, see :func:`lipsim.data.sets.labelled_folder.class_names`; nothing is
            downloaded. Or a pack of it (``lipsim data pack --frame square``).
        image_size: side to which the centred square of each image is resized.
        batch_size: triplets in a batch of one process.
        num_train: training triplets.
        num_val: validation triplets of each kind.
        num_test: test triplets of each kind.
        kinds: share of each kind in training; None: equal shares of all that can be.
        cache: folder of a teacher's embeddings of ``root``, which ``lipsim cache-teacher`` writes, for the kind
            "teacher".
        temperature: of the teacher's votes, see :class:`lipsim.data.PhotoTriplets`.
        human: data module of human votes: its training triplets are mixed in, and its validation and test sets are
            scored besides.
        human_share: of the training triplets that are human votes.
        num_images: how many images of each part to draw; None: all.
        shared: have training batches share their images, see :class:`lipsim.data.sets.photo_batches.PhotoBatches`;
            ``batch_size`` and ``num_train`` are of no use then. None: triplets of images of their own.
        seed: of the draws of training.
        eval_seed: of the images and triplets of validation and test, which another training is to be compared on.
        resize: "float" or "pil", as in :class:`TripletData`.
        num_workers: loading processes of each loader, which distort pictures while the student trains.

    Raises:
        ValueError: human votes on images of another size or in eight bits, or other photographs in their place.
    """

    def __init__(
        self,
        root: Path = Path("data/photos"),
        image_size: int = 64,
        batch_size: int = 64,
        num_train: int = 100_000,
        num_val: int = 1000,
        num_test: int = 2000,
        kinds: dict[str, float] | None = None,
        cache: Path | None = None,
        temperature: float = 0.0,
        human: TripletData | None = None,
        human_share: float = 0.25,
        num_images: int | None = None,
        shared: SharedImages | None = None,
        seed: int = 0,
        eval_seed: int = 0,
        resize: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, resize)
        self.root, self.cache = user_path(root), cache
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        self.kinds, self.temperature, self.num_images = kinds, temperature, num_images
        self.seed, self.eval_seed = seed, eval_seed
        self.human, self.human_share, self.shared = human, human_share, shared
        self.train_batches: PhotoBatches | None = None
        self.collate = as_fetched
        if human is not None and human.eight_bit:
            raise LipsimError("human votes are mixed with images in float; leave eight_bit out of data.human")
        if human is not None and (human.device_transforms is not None or human.on_error != "fail"):
            raise LipsimError(
                "triplets of human votes are loaded with those of photographs, by which nothing is transformed or "
                "skipped; leave device_transforms and on_error out of data.human"
            )
        if isinstance(human, PhotoData):
            raise LipsimError("expected votes of people as human, got PhotoData, whose sets have the same names")
        if isinstance(human, ImageFolderData | LabelledFolderData):
            raise LipsimError(f"expected votes of people as human, got {type(human).__name__}, which has no triplets")
        size = None if human is None or human.preprocess is None else human.preprocess.image_size
        if size not in (None, image_size):
            raise LipsimError(
                f"expected human votes on images of {image_size} pixels, got {size}; set image_size alike"
            )

    def follow(self, preprocess: Preprocess) -> None:
        """As of :class:`TripletData`; the human votes follow as well."""
        super().follow(preprocess)
        if self.human is not None:
            self.human.follow(preprocess)

    def setup(self, stage: str) -> None:
        """Read the images that the stage needs.

        Raises:
            ValueError: a set of human votes has the name of a kind of triplets, or there are none to train on.
        """
        if self.human is not None:
            self.human.trainer = self.trainer
            self.human.setup(stage)
            if stage == "fit" and self.human.train_set is None:
                raise LipsimError(f"expected votes of people to train on, and {type(self.human).__name__} has none")
        if stage in ("fit", "validate") and not self.val_sets:
            own = self._by_kind(self.eval_seed, self.num_val)
            self.val_sets = dict(own) if self.human is None else _beside(own, self.human.val_sets)
        if stage == "test" and not self.test_sets:
            own = self._by_kind(self.eval_seed + 1, self.num_test)
            self.test_sets = dict(own) if self.human is None else _beside(own, self.human.test_sets)
        if stage == "fit" and self.train_set is None:
            self.train_set = triplets = self._read("train", self.num_train, self.seed, self.kinds)
            if self.shared is not None:
                human = None
                if self.human is not None:
                    assert self.human.train_set is not None
                    human = HumanVotes(self.human.train_set, self.human_share, self.human.collate)
                self.train_batches = PhotoBatches(triplets, self.shared, human)
            elif self.human is not None:
                assert self.human.train_set is not None
                self.train_set = MixedTriplets(
                    triplets, self.human.train_set, self.human_share, self.human.collate, self.seed
                )

    def train_dataloader(self) -> TrainingLoader:
        if self.train_batches is None:
            return super().train_dataloader()
        return self._training_loader(self.train_batches, None, as_fetched)  # an item is a batch

    def val_dataloader(self) -> list[DataLoader[Any]]:
        own = [self._loader(triplets) for triplets in self.val_sets.values() if isinstance(triplets, PhotoTriplets)]
        return own if self.human is None else [*own, *self.human.val_dataloader()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        own = [self._loader(triplets) for triplets in self.test_sets.values() if isinstance(triplets, PhotoTriplets)]
        return own if self.human is None else [*own, *self.human.test_dataloader()]

    def _by_kind(self, seed: int, num_triplets: int) -> dict[str, PhotoTriplets]:
        triplets = self._read("val", num_triplets, seed, None)
        return {kind: triplets.only(kind, num_triplets) for kind in triplets.kinds}

    def _read(self, part: str, num_triplets: int, seed: int, kinds: dict[str, float] | None) -> PhotoTriplets:
        trainer = self.trainer
        alone = trainer is None or trainer.world_size == 1
        with Progress(f"reading {part} images", sys.stdout, trainer is None or trainer.is_global_zero) as progress:
            options: dict[str, Any] = {
                "num_triplets": num_triplets,
                "kinds": kinds,
                "cache": self.cache,
                "temperature": self.temperature,
                "num_images": self.num_images,
                "seed": seed,
                # A test has other triplets than validation, of the same images.
                "image_seed": self.seed if part == "train" else self.eval_seed,
                "num_workers": min(8, os.cpu_count() or 1) if alone else 0,
                "progress": progress,
            }
            return cast(PhotoTriplets, self._open("photos", [part], self.root, **options)[part])


def _beside(own: Mapping[str, TripletSet], human: Mapping[str, TripletSet]) -> dict[str, TripletSet]:
    """Sets of photographs and of people's votes in one mapping.

    Raises:
        ValueError: a name stands for one of each.
    """
    check_names(own, human, "triplets of photographs", "data.human")
    return {**own, **human}
