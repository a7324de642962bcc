"""Where the images of a set come from: files under a folder, or a pack of them; both by relative path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lipsim.data.eight_bit import eight_bit as in_eight_bits
from lipsim.data.pack import ImagePack
from lipsim.data.transforms import Preprocess, load_image, missing_files


class ImageSource(Protocol):
    """Images by the path of their file, relative to the folder of a set."""

    def load(self, name: str) -> Tensor:
        """One image as a metric takes it, ``(3, S, S)`` float32 in [0, 1]; or these numbers in eight bits.

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: it cannot be read; the message names it.
        """

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of some images are not there, in their order; none is read."""

    @property
    def remedy(self) -> str:
        """What is said of those that are not."""


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

    @property
    def remedy(self) -> str:
        return f"paths are relative to {self.root.absolute()}"


class EightBitImages:
    """Images in eight bits where these are all there is of them, a quarter of the bytes.

    Those of a pack are; those of files where nothing is resized in float. Others are served in float.

    Args:
        source: where they come from.
    """

    def __init__(self, source: ImageFiles | ImagePack) -> None:
        self.source = source

    def load(self, name: str) -> Tensor:
        """One image, ``(3, S, S)`` uint8, or float32 in [0, 1]."""
        if isinstance(self.source, ImagePack):
            return torch.from_numpy(self.source.pixels(self.source.row(name)))
        return in_eight_bits(self.source.load(name))

    def missing(self, names: Iterable[str]) -> list[str]:
        return self.source.missing(names)

    @property
    def remedy(self) -> str:
        return self.source.remedy


def image_source(
    root: Path, preprocess: Preprocess, pack: str | Path | ImagePack | None = None, *, eight_bit: bool = False
) -> ImageSource:
    """The images under a folder, or those of a pack of that folder.

    Args:
        root: the folder, which need not have the images where there is a pack.
        preprocess: what the images are to be resized with.
        pack: a pack, or its folder.
        eight_bit: serve them as :class:`EightBitImages`.

    Raises:
        FileNotFoundError: there is no such pack.
        ValueError: it cannot be used, or its images were resized in another way.
    """
    source = ImageFiles(root, preprocess) if pack is None else _pack(pack, preprocess)
    return EightBitImages(source) if eight_bit else source


def _pack(pack: str | Path | ImagePack, preprocess: Preprocess) -> ImagePack:
    pack = pack if isinstance(pack, ImagePack) else ImagePack(pack)
    pack.check_transform(preprocess)
    return pack
