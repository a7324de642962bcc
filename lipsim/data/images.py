"""Where the images of a set come from: files under a folder, or a pack of them; both by relative path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lipsim.data.pack import ImagePack
from lipsim.data.transforms import Preprocess, load_image, missing_files


class ImageSource(Protocol):
    """Images by the path of their file, relative to the folder of a set."""

    def load(self, name: str) -> Tensor:
        """One image as a metric takes it, ``(3, S, S)`` float32 in [0, 1].

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: it cannot be read; the message names it.
        """

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of some images are not there, in their order; none is read."""


class ImageFiles:
    """Image files under a folder, read and transformed when they are asked for.

    Args:
        root: the folder.
        transform: from a decoded image to a tensor.
    """

    def __init__(self, root: Path, transform: Callable[..., Tensor]) -> None:
        self.root, self.transform = root, transform

    def load(self, name: str) -> Tensor:
        return load_image(self.root / name, self.transform)

    def missing(self, names: Iterable[str]) -> list[str]:
        return missing_files(self.root, names)


def image_source(root: Path, preprocess: Preprocess, pack: str | Path | ImagePack | None = None) -> ImageSource:
    """The images under a folder, or those of a pack of that folder.

    Args:
        root: the folder, which need not have the images where there is a pack.
        preprocess: what the images are to be resized with.
        pack: a pack, or its folder.

    Raises:
        FileNotFoundError: there is no such pack.
        ValueError: it cannot be used, or its images were resized in another way.
    """
    if pack is None:
        return ImageFiles(root, preprocess)
    pack = pack if isinstance(pack, ImagePack) else ImagePack(pack)
    pack.check_transform(preprocess)
    return pack
