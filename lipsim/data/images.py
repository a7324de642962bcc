"""Images of a folder, such as ImageNet, for distillation: no labels, no votes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from lipsim.data.transforms import CentralCrop, load_image
from lipsim.paths import user_path

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

# The views of an image that a student may be shown, functions of ``(…, 3, S, S)``. A teacher's embedding belongs to one
# of them, so each is exact: what is random about a view is which one it is.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda images: images, "flip": F.horizontal_flip}


class FolderImages(Dataset[Tensor]):
    """The images of an ``ImageFolder`` layout, ``{folder}/{class}/{image}``, whose classes are ignored.

    Args:
        folder: folder of class folders.
        image_size: side of the central crop, see :class:`lipsim.data.transforms.CentralCrop`.
        resize: what the short side is resized to before; None: nothing, as published.
        views: names of :data:`VIEWS`, of which each access shows one, by torch's generator.

    Raises:
        FileNotFoundError: there is no image; the message says what is expected where.
        ValueError: no such size or view.
    """

    def __init__(
        self, folder: str | Path, image_size: int, *, resize: int | None = None, views: Sequence[str] = ("plain",)
    ) -> None:
        check_views(views)
        self.folder, self.views = user_path(folder), tuple(views)
        self.transform = CentralCrop(image_size, resize)
        entries = list(self.folder.iterdir()) if self.folder.is_dir() else []
        classes = sorted(entry for entry in entries if entry.is_dir() and not entry.name.startswith("."))
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
        return VIEWS[self.draw_view()](load_image(self.path(index), self.transform))

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / os.fsdecode(bytes(self.names[index]))

    def draw_view(self) -> str:
        """One of the views, each with the same probability."""
        return self.views[int(torch.randint(len(self.views), ()))]


def image_files(folder: Path) -> np.ndarray:
    """Paths of all images under a folder at any depth, relative to it, as sorted bytes ``(N,)``; no hidden ones.

    Raises:
        FileNotFoundError: there are none.
    """
    names = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place).relative_to(folder)
        names += [os.fsencode(here / name) for name in files if _is_image(name)]
    if not names:
        raise FileNotFoundError(f"no images in {folder.absolute()} ({', '.join(ENDINGS)})")
    return np.array(sorted(names))


def check_views(views: Sequence[str]) -> None:
    """Refuse views that are unknown, named twice, or none at all.

    Raises:
        ValueError: they are.
    """
    if not views or len(set(views)) < len(views) or not set(views) <= VIEWS.keys():
        raise ValueError(f"expected some of the views {', '.join(VIEWS)}, each once, got {', '.join(views) or 'none'}")


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")
