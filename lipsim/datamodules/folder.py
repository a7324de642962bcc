"""Data module of an image folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lipsim.data import Preprocess
from lipsim.data.eight_bit import as_float
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.embeddings.folder import EmbeddedFolder, EmbeddedImages
from lipsim.data.order import TrainingLoader
from lipsim.data.sets.folder import FolderImages
from lipsim.datamodules.base import OnError, TripletData, check_names
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

_IMAGES = "images"  # the validation set on which student and teacher are compared


class ImageFolderData(TripletData):
    """Images without labels, for distillation: ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, such as ImageNet.

    All images under train/ and val/ count, at any depth (:func:`lipsim.data.sets.folder.list_images`).

    Validation compares student and teacher on the set ``images``; triplets of another data module are scored besides,
    and a test scores those alone.

    Args:
        root: folder that has train/ and val/; nothing is downloaded. Or a pack of such a folder (``lipsim data pack
            --frame crop``) of this ``image_size`` and ``short_side``.
        image_size: side of the central crop, see :class:`lipsim.data.transforms.CentralCrop`.
        short_side: what the short side is resized to before; None: nothing, as published.
        views: names of :data:`lipsim.data.sets.folder.VIEWS`; training shows one at a time, validation "plain".
        batch_size: images in a batch of one process.
        num_workers: loading processes of each loader.
        triplets: data module whose validation and test sets the student is scored on; its training set is not used.
        eight_bit: as in :class:`TripletData`.
        device_transforms: as in :class:`TripletData`.
        on_error: "fail" or "skip" of training images that cannot be read, as in :class:`TripletData`.
    """

    def __init__(
        self,
        root: Path = Path("data/imagenet"),
        image_size: int = 224,
        short_side: int | None = None,
        views: Sequence[str] = ("plain", "flip"),
        batch_size: int = 32,
        num_workers: int = 8,
        triplets: TripletData | None = None,
        eight_bit: bool = False,
        device_transforms: list[nn.Module] | None = None,
        on_error: OnError = "fail",
    ) -> None:
        super().__init__(
            batch_size, num_workers, eight_bit=eight_bit, device_transforms=device_transforms, on_error=on_error
        )
        self.root = user_path(root)
        self.image_size, self.short_side, self.views = image_size, short_side, tuple(views)
        self.triplets = triplets
        self.preprocess = None if triplets is None else triplets.preprocess  # the crop of the images is no resize
        self.collate = _collate
        self.train_images: FolderImages | EmbeddedFolder | None = None
        self.val_images: FolderImages | EmbeddedFolder | None = None

    @property
    def val_names(self) -> list[str]:
        """The images come first."""
        return [_IMAGES, *super().val_names]

    def follow(self, preprocess: Preprocess) -> None:
        """Have the triplets resized as a metric expects, unless told otherwise when they were made."""
        if self.triplets is not None:
            self.triplets.follow(preprocess)
            self.preprocess = self.triplets.preprocess

    def setup(self, stage: str) -> None:
        """List the folders that the stage needs.

        Raises:
            ValueError: a test without triplets, or triplets to validate on that are called ``images`` as well.
        """
        if stage == "test" and self.triplets is None:
            raise LipsimError("a folder of images has no votes to test on; name a data module of some as data.triplets")
        if self.triplets is not None:
            self.triplets.trainer = self.trainer
            self.triplets.setup("test" if stage == "test" else "validate")
            check_names([_IMAGES], self.triplets.val_sets, "the images of the folder", "data.triplets")
            self.val_sets, self.test_sets = self.triplets.val_sets, self.triplets.test_sets
        if stage in ("fit", "validate") and self.val_images is None:
            self.val_images = self._images("val", ("plain",))
        if stage == "fit" and self.train_images is None:
            self.train_images = self._images("train", self.views)

    def use_embeddings(self, cache: EmbeddingCache | None) -> None:
        """From now on each image comes with its embedding, as :class:`lipsim.data.embeddings.folder.EmbeddedImages`.

        Args:
            cache: where the embeddings are; None: the images come alone again.

        Raises:
            ValueError: the cache is of another transform, or lacks images or views; or training images are transformed
                on the device, of which no cache has embeddings.
        """
        if cache is not None and self.device_transforms is not None:
            raise LipsimError(
                f"the embeddings in {cache.folder} are of images as they are, not as device_transforms show them; "
                "leave one of model.cache and data.device_transforms out"
            )
        if self.train_images is not None:
            self.train_images = _embedded(self.train_images, cache, "train/")
        if self.val_images is not None:
            self.val_images = _embedded(self.val_images, cache, "val/")

    def train_dataloader(self) -> TrainingLoader:
        assert self.train_images is not None
        return self._training_loader(self.train_images, self.batch_size, self.collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        others = [] if self.triplets is None else self.triplets.val_dataloader()
        assert self.val_images is not None
        return [self._loader(self.val_images), *others]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [] if self.triplets is None else self.triplets.test_dataloader()

    def _images(self, part: str, views: Sequence[str]) -> FolderImages:
        images = FolderImages(
            self.root / part, self.image_size, short_side=self.short_side, views=views, eight_bit=self.eight_bit
        )
        if images.skipped:
            rank_zero_info(f"{len(images)} images under {images.folder}; passed over: {images.skipped}")
        return images


def _collate(samples: list[Any]) -> Any:
    """As torch's, but for images of which some are in eight bits."""
    images = [sample[0] if isinstance(sample, EmbeddedImages) else sample for sample in samples]
    if len({image.dtype for image in images}) > 1:
        floats = [as_float(image) for image in images]
        samples = [
            sample._replace(images=image) if isinstance(sample, EmbeddedImages) else image
            for sample, image in zip(samples, floats, strict=True)
        ]
    return default_collate(samples)


def _embedded(
    images: FolderImages | EmbeddedFolder, cache: EmbeddingCache | None, prefix: str
) -> FolderImages | EmbeddedFolder:
    plain = images.images if isinstance(images, EmbeddedFolder) else images
    return plain if cache is None else EmbeddedFolder(plain, cache, prefix)
