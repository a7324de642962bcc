"""Images of a folder, such as ImageNet, for distillation: no labels, no votes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from lipsim.data.transforms import load_image, to_tensor

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class FolderImages(Dataset[Tensor]):
    """The images of an ``ImageFolder`` layout, ``{folder}/{class}/{image}``, whose classes are ignored.

    The published view (Ghazanfari et al. 2024): the central ``image_size`` pixels of the image as it is, not resized; a
    smaller image gets a black border. In training half of them are flipped.

    Args:
        folder: folder of class folders.
        image_size: side of the crop.
        flip: whether to flip horizontally with probability 1/2, by torch's generator.

    Raises:
        FileNotFoundError: there is no image; the message says what is expected where.
    """

    def __init__(self, folder: str | Path, image_size: int, *, flip: bool = False) -> None:
        self.folder, self.image_size, self.flip = Path(folder), image_size, flip
        classes = sorted(entry for entry in self.folder.iterdir() if entry.is_dir()) if self.folder.is_dir() else []
        names = [f"{part.name}/{name}" for part in classes for name in sorted(os.listdir(part)) if _is_image(name)]
        if not names:
            raise FileNotFoundError(
                f"no images at {self.folder.absolute()}; expected the ImageFolder layout, train/CLASS/IMAGE and "
                "val/CLASS/IMAGE, under the folder that --data.root names"
            )
        # One block of memory: a list of a million strings would be copied into each loading process by and by.
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """One image ``(3, S, S)``, float32 in [0, 1]."""
        image = load_image(self.folder / os.fsdecode(bytes(self.names[index])), to_tensor)
        image = F.center_crop(image, [self.image_size, self.image_size])
        return F.horizontal_flip(image) if self.flip and bool(torch.rand(()) < 0.5) else image


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")
