"""Images of a folder, such as ImageNet, for distillation: no labels, no votes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.data.eight_bit import eight_bit as in_eight_bits
from lipsim.data.order import VIEW, Place
from lipsim.data.pack import ImagePack, find_pack
from lipsim.data.transforms import CentralCrop, load_image, load_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.sampling import key_uniform, subkey

# In any case. What has another ending is no image.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2", ".avif")

JOURNAL = ".lipsim-check.jsonl"  # that `lipsim data check` leaves beside the images; nobody is told that it is no image

# The views of an image that a student may be shown, functions of ``(…, 3, S, S)``. A teacher's embedding belongs to one
# of them, so each is exact: what is random about a view is which one it is.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda images: images, "flip": lambda images: images.flip(-1)}


class FolderImages(Dataset[Tensor]):
    """The images under a folder, such as ``{folder}/{class}/{image}``; the folders that they are in are ignored.

    Args:
        folder: their folder; :func:`list_images` finds them, at any depth. Or a pack of such central crops, or
            PACK/train for its images under train/.
        image_size: side of the central crop, see :class:`lipsim.data.transforms.CentralCrop`.
        short_side: what the short side is resized to before; None: nothing, as published.
        views: names of :data:`VIEWS`, of which each access shows one: by seed, epoch and position where a
            :class:`lipsim.data.order.TrainingOrder` asks, by torch's generator otherwise.
        eight_bit: show images in eight bits, ``(3, S, S)`` uint8, where nothing is lost: those of packs, and of files
            without a ``short_side``.

    Attributes:
        names: ``(N,)`` bytes, relative to the folder, sorted.
        skipped: what else is there, in words; empty where nothing is.
        pack: the pack that the images come from; None: they are files.

    Raises:
        FileNotFoundError: there is no image; the message says what is expected where.
        ValueError: no such size or view, or a pack of images of another kind.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        *,
        short_side: int | None = None,
        views: Sequence[str] = ("plain",),
        eight_bit: bool = False,
    ) -> None:
        check_views(views)
        self.folder, self.views, self.eight_bit = user_path(folder), tuple(views), eight_bit
        self.transform = CentralCrop(image_size, short_side)
        self.pack: ImagePack | None = None
        self._rows = np.empty(0, dtype=np.int64)
        packed = find_pack(self.folder)
        if packed is not None:
            self._open_pack(*packed)
            return
        try:
            listed = list_images(self.folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; expected images under train/ and val/ of the folder that --data.root names, at any depth, "
                "such as train/CLASS/IMAGE"
            ) from None
        self.names, self.skipped = listed.names, listed.skipped

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """One image ``(3, S, S)``, float32 in [0, 1], or in eight bits."""
        return VIEWS[self.draw_view(index)](self.load(index))

    @property
    def rounded(self) -> bool:
        """Whether images are those of a pack that had to round some of them, in this folder or in another part of it.

        A cache is of a whole pack, and says so of all of it.
        """
        return self.pack is not None and self.pack.rounded

    def load(self, index: int, content: bytes | None = None) -> Tensor:
        """One image without a view, ``(3, S, S)``; of the ``content`` of its file where that is read already."""
        if self.pack is not None:
            row = int(self._rows[index])
            return torch.from_numpy(self.pack.pixels(row)) if self.eight_bit else self.pack.image(row)
        image = load_image(self.path(index), self.transform, content)
        return in_eight_bits(image) if self.eight_bit else image

    def sha256(self, index: int) -> bytes | None:
        """SHA-256 of the file that an image of a pack was made of; None where it is a file itself."""
        return None if self.pack is None else self.pack.sha256[self._rows[index]].tobytes()

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / os.fsdecode(bytes(self.names[index]))

    def _open_pack(self, folder: Path, prefix: str) -> None:
        self.pack = ImagePack(folder)
        self.pack.check_transform(self.transform)
        self.names = self.pack.names(prefix)
        self._rows = self.pack.find(np.strings.add(os.fsencode(prefix), self.names))
        self.skipped = ""

    def draw_view(self, index: int) -> str:
        """One of the views, each with the same probability."""
        if not isinstance(index, Place):
            return self.views[int(torch.randint(len(self.views), ()))]
        share = key_uniform(torch.tensor([subkey(index.key, VIEW)]), 1)
        return self.views[int(share * len(self.views))]


@dataclass(frozen=True, eq=False)
class ListedImages:
    """What :func:`list_images` finds.

    Attributes:
        names: ``(N,)`` bytes, paths relative to the folder, sorted.
        skipped: what was passed over, in words, such as "3 hidden files or folders"; empty where nothing was.
    """

    # One block of memory: a list of a million strings would be copied into each loading process by and by.
    names: np.ndarray
    skipped: str


def list_images(folder: Path) -> ListedImages:
    """The images under a folder at any depth, by their :data:`ENDINGS`: the one reader of folders.

    Links are followed, but not to a folder that they lie in. Passed over, counted and named are files with other
    endings, links that lead nowhere or around, and what is hidden: names that begin with a dot, such as the ``._NAME``
    that macOS puts beside each file on foreign disks, and the ``__MACOSX`` of its archives.

    Raises:
        FileNotFoundError: no such folder, or no image in it; the message says what was looked for and what is there.
        OSError: a folder cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no images at {folder.absolute()}: there is no such folder")
    kinds: Counter[str] = Counter()
    first: dict[str, str] = {}

    def skip(kind: str, path: str) -> None:
        kinds[kind] += 1
        first.setdefault(kind, os.path.relpath(path, folder))

    names = sorted(os.fsencode(os.path.relpath(path, folder)) for path in _walk(os.fspath(folder), (), skip))
    skipped = ", ".join(f"{count} {kind} (first: {first[kind]})" for kind, count in sorted(kinds.items()))
    if not names:
        there = f"; there are {skipped}" if skipped else "; it is empty"
        raise FileNotFoundError(
            f"no images in {folder.absolute()} or its folders ({', '.join(ENDINGS)}, in any case){there}"
        )
    return ListedImages(np.array(names), skipped)


def load_first_images(folder: Path, count: int, preprocess: Callable[..., Tensor]) -> tuple[Tensor, str]:
    """The first images of a folder, in the order of their names, and what was passed over there.

    Args:
        folder: where :func:`list_images` looks.
        count: how many at most.
        preprocess: from a decoded image to a tensor, as ``metric.preprocess``.

    Returns:
        ``(N, 3, S, S)``, and what was passed over, in words; empty where nothing was.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image cannot be read, or ``preprocess`` refuses it.
    """
    listed = list_images(folder)
    files = [folder / os.fsdecode(bytes(name)) for name in listed.names[:count]]
    return load_images(files, preprocess), listed.skipped


def _walk(folder: str, above: tuple[tuple[int, int], ...], skip: Callable[[str, str], None]) -> Iterator[str]:
    """Paths of the images under a folder that is inside the folders ``above`` (device and inode)."""
    above = (*above, _identity(folder))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name == JOURNAL:
            continue
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            skip("hidden files or folders", entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            skip("broken links", entry.path)
        elif entry.is_dir():
            if entry.is_symlink() and _identity(entry.path) in above:
                skip("links to a folder that they are in", entry.path)
            else:
                yield from _walk(entry.path, above, skip)
        elif entry.name.lower().endswith(ENDINGS):
            yield entry.path
        else:
            skip("files with other endings", entry.path)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_views(views: Sequence[str]) -> None:
    """Refuse views that are unknown, named twice, or none at all.

    Raises:
        ValueError: they are.
    """
    if not views or len(set(views)) < len(views) or not set(views) <= VIEWS.keys():
        raise LipsimError(f"expected some of the views {', '.join(VIEWS)}, each once, got {', '.join(views) or 'none'}")
