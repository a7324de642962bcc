"""Data module of an image folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, default_collate

from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.embeddings.folder import EmbeddedFolder
from lipsim.data.sets.folder import FolderImages
from lipsim.datamodules.base import TripletData
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


class ImageFolderData(TripletData):
    """Images without labels, for distillation: ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, such as ImageNet.

    All images under train/ and val/ count, at any depth (:func:`lipsim.data.sets.folder.list_images`).

    Validation compares student and teacher on the set ``images``; triplets of another data module are scored besides,
    and a test scores those alone.

    Args:
        root: folder that has train/ and val/; nothing is downloaded.
        image_size: side of the central crop, see :class:`lipsim.data.transforms.CentralCrop`.
        resize: what the short side is resized to before; None: nothing, as published.
        views: names of :data:`lipsim.data.sets.folder.VIEWS`; training shows one at a time, validation "plain".
        batch_size: images in a batch of one process.
        num_workers: loading processes of each loader.
        triplets: data module whose validation and test sets the student is scored on; its training set is not used.
    """

    def __init__(
        self,
        root: Path = Path("data/imagenet"),
        image_size: int = 224,
        resize: int | None = None,
        views: Sequence[str] = ("plain", "flip"),
        batch_size: int = 32,
        num_workers: int = 8,
        triplets: TripletData | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.image_size, self.resize, self.views = user_path(root), image_size, resize, tuple(views)
        self.triplets = triplets
        self.collate = default_collate

    def setup(self, stage: str) -> None:
        """List the folders that the stage needs.

        Raises:
            ValueError: a test without triplets.
        """
        if stage == "test" and self.triplets is None:
            raise LipsimError("a folder of images has no votes to test on; name a data module of some as data.triplets")
        if self.triplets is not None:
            self.triplets.trainer = self.trainer
            self.triplets.setup("test" if stage == "test" else "validate")
            self.test_sets = self.triplets.test_sets
        if stage in ("fit", "validate") and not self.val_sets:
            self.val_sets = {"images": self._images("val", ("plain",))}
            self.val_sets |= self.triplets.val_sets if self.triplets is not None else {}
        if stage == "fit" and self.train_set is None:
            self.train_set = self._images("train", self.views)

    def use_embeddings(self, cache: EmbeddingCache | None) -> None:
        """From now on each image comes with its embedding, as :class:`lipsim.data.embeddings.folder.EmbeddedImages`.

        Args:
            cache: where the embeddings are; None: the images come alone again.

        Raises:
            ValueError: the cache is of another transform, or lacks images or views.
        """
        if self.train_set is not None:
            self.train_set = _embedded(self.train_set, cache, "train/")
        if "images" in self.val_sets:
            self.val_sets["images"] = _embedded(self.val_sets["images"], cache, "val/")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        others = [] if self.triplets is None else self.triplets.val_dataloader()
        return [self._loader(self.val_sets["images"]), *others]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [] if self.triplets is None else self.triplets.test_dataloader()

    def _images(self, part: str, views: Sequence[str]) -> FolderImages:
        images = FolderImages(self.root / part, self.image_size, resize=self.resize, views=views)
        if images.skipped:
            rank_zero_info(f"{len(images)} images under {images.folder}; passed over: {images.skipped}")
        return images


def _embedded(dataset: Dataset[Any], cache: EmbeddingCache | None, prefix: str) -> Dataset[Any]:
    images = dataset.images if isinstance(dataset, EmbeddedFolder) else dataset
    return images if cache is None else EmbeddedFolder(cast(FolderImages, images), cache, prefix)
