"""Images with labels, in batches: what a search is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.data.transforms import Preprocess


class LabelledBatch:
    """N images with labels.

    Args:
        images: ``(N, 3, H, W)``, float in [0, 1].
        label: ``(N,)`` int64.
        index: ``(N,)`` int64, the number by which the data set knows each image.
    """

    def __init__(self, images: Tensor, label: Tensor, index: Tensor) -> None:
        self.images, self.label, self.index = images, label, index

    def __len__(self) -> int:
        return len(self.index)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor, as ``Tensor.to`` does with a device."""
        return type(self)(*(tensor.to(*args, **kwargs) for tensor in (self.images, self.label, self.index)))

    def clone(self) -> Self:
        """A copy of every tensor."""
        return type(self)(self.images.clone(), self.label.clone(), self.index.clone())

    def pin_memory(self) -> Self:
        """Copies in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return type(self)(self.images.pin_memory(), self.label.pin_memory(), self.index.pin_memory())


class LabelledImages(Dataset[LabelledBatch]):
    """The images of a folder of classes, each a batch of one.

    Args:
        folder: of the images.
        preprocess: how files become images.
        gallery: what these are searched for in, on which what is found rests as well.
    """

    def __init__(self, folder: LabelledFolder, preprocess: Preprocess, gallery: LabelledFolder | None = None) -> None:
        self.folder, self.preprocess, self.gallery = folder, preprocess, gallery

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> LabelledBatch:
        return LabelledBatch(self.folder.load([index]), self.folder.labels[[index]], torch.tensor([index]))

    def manifest(self) -> Sequence[str]:
        """Names, sizes and classes of the files, and of those of the gallery."""
        return [*_listed(self.folder), *([] if self.gallery is None else ["in", *_listed(self.gallery)])]


def _listed(folder: LabelledFolder) -> Sequence[str]:
    classes = (folder.classes[label] for label in folder.labels.tolist())
    named = zip(folder.names, classes, strict=True)
    return [f"{name} {(folder.folder / str(name)).stat().st_size} {label}" for name, label in named]


def collate_labelled(samples: Sequence[LabelledBatch]) -> LabelledBatch:
    """One batch of several (a ``collate_fn``)."""
    return LabelledBatch(
        torch.cat([sample.images for sample in samples]),
        torch.cat([sample.label for sample in samples]),
        torch.cat([sample.index for sample in samples]),
    )
