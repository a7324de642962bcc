"""Image folders with a folder for each class, as torchvision's ``ImageFolder`` reads them, or as tiny-imagenet is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipsim.data.pack import KEPT_ANNOTATIONS, find_pack
from lipsim.data.sets.folder import list_images
from lipsim.data.transforms import load_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest
from lipsim.utils.paths import user_path

ANNOTATIONS = "val_annotations.txt"  # of tiny-imagenet: lines of an image of images/, its class, and a box

PARTS = {"train", "val", "valid", "validation", "test"}


class LabelledFolder:
    """The images of a folder ``{folder}/{class}/…/{image}``, numbered in the order of their names.

    Images in images/ beside a file :data:`ANNOTATIONS`, as in val/ of tiny-imagenet, have their classes from there.

    Args:
        folder: their folder.
        preprocess: from a decoded image to a tensor.
        classes: the classes in the order of their numbers; None: the names of the folders, sorted, as torchvision's
            ``ImageFolder`` has them.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: images outside a folder of a class, of a class that is none of ``classes``, or that the annotations
            do not name; a folder of train/, val/ and the like, which have the classes.
    """

    def __init__(
        self, folder: str | Path, preprocess: Callable[..., Tensor], classes: Sequence[str] | None = None
    ) -> None:
        self.folder, self.preprocess = user_path(folder), preprocess
        names = [os.fsdecode(bytes(name)) for name in list_images(self.folder).names]
        self.names = np.array(names)
        own = class_names(self.folder, names)
        if "" in own:
            raise LipsimError(
                f"expected images in folders of their classes, CLASS/IMAGE, got {names[own.index('')]} in {folder}"
            )
        if set(own) <= PARTS and all(name.count("/") > 1 for name in names):
            raise LipsimError(
                f"{folder} has the parts {', '.join(sorted(set(own)))} of a data set where folders of classes were "
                f"expected; name one of them, such as {self.folder / own[0]}"
            )
        self.classes = sorted(set(own)) if classes is None else list(classes)
        number = {name: i for i, name in enumerate(self.classes)}
        if others := sorted(set(own) - set(self.classes)):
            raise LipsimError(f"expected the classes {', '.join(self.classes)}, got {', '.join(others)} in {folder}")
        self.labels = torch.tensor([number[name] for name in own])

    def __len__(self) -> int:
        return len(self.names)

    def load(self, numbers: Sequence[int]) -> Tensor:
        """Images ``(N, 3, S, S)``, float32 in [0, 1]."""
        return load_images((self.folder / str(self.names[i]) for i in numbers), self.preprocess)

    def all_8bit(self) -> Tensor:
        """All images, ``(N, 3, S, S)`` uint8, as training takes them."""
        return torch.cat([to_8bit(self.load([i])) for i in range(len(self))])

    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of the files, and their classes where these are no folders."""
        digest = Digest()
        for name in self.names:
            digest.add(f"{name!r} {(self.folder / str(name)).stat().st_size}\n")
        if (annotated := _annotations(self.folder)) is not None:
            digest.add(repr(sorted(annotated.items())))
        return digest.hexdigest()


def class_names(folder: Path, names: Sequence[str]) -> list[str]:
    """The class of each image under a folder: the first folder on its path, and "" of an image that lies in none.

    Of images/NAME it is what :data:`ANNOTATIONS` says, where the folder has that file.

    Raises:
        ValueError: annotations that do not name an image, or name one twice, lines of another form, or a class that
            could not be the name of a folder.
    """
    annotated = _annotations(folder)
    own = [name.partition("/")[0] if "/" in name else "" for name in names]
    if annotated is None:
        return own
    lacking = [name for name in names if _is_annotated(name) and name not in annotated]
    if lacking:
        others = f"{len(lacking) - 1} other images of {len(names)}"
        raise LipsimError(f"{folder / ANNOTATIONS} names no class of {lacking[0]}, nor of {others}")
    return [annotated[name] if _is_annotated(name) else of_folder for name, of_folder in zip(names, own, strict=True)]


def _is_annotated(name: str) -> bool:
    return name.startswith("images/") and name.count("/") == 1


def _annotations(folder: Path) -> dict[str, str] | None:
    """Classes of images/NAME, also of a pack's; None: there is no such file."""
    packed = find_pack(folder)
    file = (folder if packed is None else packed[0] / KEPT_ANNOTATIONS / packed[1]) / ANNOTATIONS
    if not file.is_file():
        return None
    classes: dict[str, str] = {}
    # As names of files are read, which need not be in UTF-8.
    for line in file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
        if not line.strip():
            continue
        image, of_class, *_ = [*(field.strip() for field in line.split("\t")), ""]
        # Classes become names of folders, where sets of images are written.
        is_folder = bool(of_class) and not of_class.startswith(".") and not set(of_class) & set("/\\\0")
        if not image or not is_folder or f"images/{image}" in classes:
            raise LipsimError(f"expected lines of an image and its class in {file}, each image once, got {line!r}")
        classes[f"images/{image}"] = of_class
    return classes


def to_8bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images * 255).round().to(torch.uint8)
