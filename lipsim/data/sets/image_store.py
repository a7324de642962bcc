"""The images of a folder held in memory, in eight bits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.certificates.numbers import check_count
from lipsim.data.embeddings.cache import COMMAND, EmbeddingCache
from lipsim.data.pack import ImagePack, find_pack
from lipsim.data.sets.folder import list_images
from lipsim.data.sets.labelled_folder import class_names
from lipsim.data.transforms import CentralCrop, CentredSquare, Preprocess, load_image
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import sha256
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

MAX_BYTES = 8 * 2**30  # 28,000 images take 344 MB at 64 pixels and 4.2 GB at 224
_READ_BATCH = 64  # images a task of a reading process


@dataclass(frozen=True, eq=False)
class ImageStore:
    """Images by number.

    Attributes:
        folder: that they are of.
        names: ``(M,)`` bytes, relative to the folder, sorted.
        images: ``(M, 3, S, S)`` uint8.
        sha256: ``(M, 32)`` uint8, of the files.
        preprocess: how the centred square of an image became its row; the result is rounded to eight bits.
    """

    folder: Path
    names: np.ndarray
    images: Tensor
    sha256: Tensor
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.names)

    def floats(self, numbers: Tensor) -> Tensor:
        """Some of the images, ``(N, 3, S, S)`` float32 in [0, 1]."""
        return self.images[numbers].float().div_(255)

    def classes(self) -> Tensor:
        """Number of the class of each image, as :func:`lipsim.data.sets.labelled_folder.class_names` has it.

        ``(M,)`` int64.

        Raises:
            ValueError: some are in no folder of a class, beside others that are: nobody knows whether two of them are
                alike.
        """
        names = [os.fsdecode(name) for name in self.names.tolist()]
        own = np.array(class_names(self.folder, names))
        strays = np.flatnonzero(own == "")
        if 0 < len(strays) < len(own):
            raise LipsimError(
                f"{len(strays)} of {len(own)} images in {self.folder} are in no folder of a class (first: "
                f"{names[strays[0]]}); move them to where they belong, or away, or leave out semantic triplets"
            )
        return torch.from_numpy(np.unique(own, return_inverse=True)[1].astype(np.int64))

    def embeddings(self, cache: EmbeddingCache, prefix: str) -> Tensor:
        """A teacher's embeddings of the images, ``(M, D)`` float32 of unit norm, from a cache of these very files.

        Args:
            cache: of the plain view; the teacher may have seen the images at another size.
            prefix: path of the folder relative to that of the cached images, such as "train/".

        Raises:
            ValueError: the cache lacks images or the view, is of another frame, or of files of another content.
        """
        size = self.preprocess.image_size
        cache.check_view(CentralCrop(size, size), ("plain",))
        rows = cache.find(np.strings.add(os.fsencode(prefix), self.names))
        lacking = np.flatnonzero(rows < 0)
        if len(lacking):
            raise LipsimError(
                f"{len(lacking)} of {len(self)} images in {self.folder} are not in the cache {cache.folder} (first: "
                f"{prefix}{os.fsdecode(bytes(self.names[lacking[0]]))}); run {COMMAND} again with the folder that has "
                f"{prefix} as --images, it embeds what is missing"
            )
        changed = np.flatnonzero((cache.sha256[rows] != self.sha256.numpy()).any(1))
        if len(changed):
            file = self.folder / os.fsdecode(bytes(self.names[changed[0]]))
            cache.check_content(int(rows[changed[0]]), file, file.read_bytes())
        embeddings = torch.stack([cache.embedding(int(row), "plain") for row in rows])
        return torch.nn.functional.normalize(embeddings, dim=1)


def load_image_store(
    folder: str | Path,
    preprocess: Preprocess,
    *,
    num_images: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> ImageStore:
    """Read the images under a folder, at any depth: the centred square of each, resized and rounded to eight bits.

    Args:
        folder: where :func:`lipsim.data.sets.folder.list_images` looks. Or a pack of such squares, or PACK/train for
            its images under train/, which gives the same.
        preprocess: how the square is resized, as a metric's has it.
        num_images: how many to draw; None: all.
        seed: of the draw.
        num_workers: processes that read; the result is the same.
        progress: is told how many are read.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image cannot be read, all of them would take more than :data:`MAX_BYTES`, or a pack is of images
            of another kind.
    """
    folder = user_path(folder)
    packed = find_pack(folder)
    pack, prefix = (None, "") if packed is None else (ImagePack(packed[0]), packed[1])
    if pack is not None:
        pack.check_transform(CentredSquare(preprocess))
    names = list_images(folder).names if pack is None else pack.names(prefix)
    if num_images is not None and check_count("num_images", num_images) < len(names):
        names = names[np.sort(np.random.default_rng(seed).permutation(len(names))[:num_images])]
    size = preprocess.image_size
    if (needed := len(names) * 3 * size * size) > MAX_BYTES:
        raise LipsimError(
            f"{len(names)} images of {folder} take {needed / 2**30:.1f} GiB at {size} pixels, more than the "
            f"{MAX_BYTES / 2**30:g} GiB that are held in memory; set num_images to at most "
            f"{MAX_BYTES // (3 * size * size)}, or a smaller image_size"
        )
    images = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
    digests = torch.empty(len(names), 32, dtype=torch.uint8)
    # With its own generator, since a loader draws from torch's and what is in memory must not change a training.
    loader = DataLoader(
        _Files(folder, names, preprocess) if pack is None else _Packed(pack, prefix, names),
        _READ_BATCH,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    start, advance = 0, None if progress is None else progress.counter(len(names), "images")
    for batch, digest in loader:
        stop = start + len(batch)
        images[start:stop], digests[start:stop] = batch, digest
        start = stop
        if advance is not None:
            advance(len(batch))
    return ImageStore(folder, names, images, digests, preprocess)


class _Files(Dataset[tuple[Tensor, Tensor]]):
    """Image files as ``(3, S, S)`` uint8, each with the SHA-256 of the file, ``(32,)`` uint8."""

    def __init__(self, folder: Path, names: np.ndarray, preprocess: Preprocess) -> None:
        self.folder, self.names, self.preprocess = folder, names, preprocess

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file = self.folder / os.fsdecode(bytes(self.names[index]))
        content = file.read_bytes()
        digest = torch.frombuffer(bytearray.fromhex(sha256(content)), dtype=torch.uint8)
        image = load_image(file, CentredSquare(self.preprocess), content)
        return (image * 255).round().to(torch.uint8), digest


class _Packed(Dataset[tuple[Tensor, Tensor]]):
    """The same of images in a pack."""

    def __init__(self, pack: ImagePack, prefix: str, names: np.ndarray) -> None:
        self.pack, self.rows = pack, pack.find(np.strings.add(os.fsencode(prefix), names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self.rows[index])
        return torch.from_numpy(self.pack.pixels(row)), torch.from_numpy(self.pack.sha256[row].copy())
