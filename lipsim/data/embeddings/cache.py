"""A teacher's embeddings of a folder of images, computed once: memory-mapped shards that know what they belong to.

A cache is a folder:

``cache.json``
    :class:`CacheDescription`: which teacher (SHA-256), what it saw of an image, in which views, and the dtype.
``shard-00000.npy``
    ``(rows, views, features)``, float16 or float32.
``shard-00000.index.npy``
    A row each: ``path`` of the image relative to the folder of images, ``sha256`` of its file, ``crc32`` of the row.

Shards are written whole, the index last: a shard without its index is none, so a killed run loses the shards in work
and nothing else. They may come in any order, from any number of processes, and be deleted one by one.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lipsim.data.sets.folder import FolderImages, check_views
from lipsim.data.transforms import CentralCrop
from lipsim.layers.encoder import Encoder
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import map_array, parse_json, read_array, state_fingerprint, write_file, write_text
from lipsim.utils.files import sha256 as sha256_of
from lipsim.utils.paths import user_path

FORMAT = "lipsim-embeddings"
VERSION = 3  # version 1 called short_side resize, 2 had no packs
DTYPES = ("float16", "float32")  # of what is stored
PRECISIONS = ("float32", "bfloat16")  # in which the teacher runs
_OPEN_SHARDS = 256  # a memory map keeps a file open, and a process may open some 1,000
COMMAND = "lipsim cache-teacher"  # named by errors, as what mends them


@dataclass(frozen=True)
class CacheDescription:
    """What every embedding of a cache has in common.

    Attributes:
        teacher: SHA-256 of the teacher, see :func:`teacher_fingerprint`.
        encoder: its class, to be read by people.
        features: its number of features.
        image_size: side of the images that it saw, see :class:`lipsim.data.transforms.CentralCrop`.
        short_side: what their short side was resized to before; None: nothing.
        views: names of :data:`lipsim.data.sets.folder.VIEWS`, in the order of the rows.
        dtype: of the stored embeddings.
        precision: that the teacher ran in, "float32" or "bfloat16" (autocast).
        rounded: whether it saw images that a pack had rounded to eight bits.
        anchor: of its metric, which the distances between embeddings have to do with.
    """

    teacher: str
    encoder: str
    features: int
    image_size: int
    short_side: int | None
    views: tuple[str, ...]
    dtype: str
    precision: str
    rounded: bool = False
    anchor: float = 0.0

    def __post_init__(self) -> None:
        check_views(self.views)
        _ = self.transform  # refuses impossible sizes
        for given, known in ((self.dtype, DTYPES), (self.precision, PRECISIONS)):
            if given not in known:
                raise LipsimError(f"expected {' or '.join(known)}, got {given!r}")

    @property
    def transform(self) -> CentralCrop:
        """From an image file to what the teacher saw, but for the views."""
        return CentralCrop(self.image_size, self.short_side)

    @classmethod
    def read(cls, folder: Path) -> CacheDescription:
        """The description of the cache in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be understood.
        """
        file = folder / "cache.json"
        if not file.is_file():
            raise FileNotFoundError(f"no embedding cache at {folder}; {COMMAND} makes one")
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
            version = content.pop("version")
            if content.pop("format") != FORMAT or version > VERSION:
                raise LipsimError("another format, or of a newer version of lipsim")
            if version == 1:
                content["short_side"] = content.pop("resize")
            return cls(**content | {"views": tuple(content["views"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LipsimError(f"cannot read {file} ({error}); make the cache again with {COMMAND}") from error

    def write(self, folder: Path) -> None:
        """Write ``cache.json``, replacing it as a whole."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(folder / "cache.json", json.dumps(content, indent=1) + "\n")

    def check_equal(self, other: CacheDescription, folder: Path) -> None:
        """Refuse to add embeddings of another description to the cache in ``folder``, which this one is of.

        Raises:
            ValueError: they differ; the message names every field that does.
        """
        ours, theirs = asdict(self), asdict(other)
        differing = [f"{name} {ours[name]} instead of {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if differing:
            raise LipsimError(f"the cache {folder} has {'; '.join(differing)}; give its options, or another --output")


class EmbeddingCache:
    """A cache on disk, for reading by any number of processes; one row an image.

    Args:
        folder: the cache.

    Attributes:
        description: what its embeddings have in common.
        paths: ``(N,)`` sorted bytes, the images relative to the folder of images.
        sha256: ``(N, 32)`` uint8, of their files.

    Raises:
        FileNotFoundError: no cache, or nothing in it.
        ValueError: it cannot be understood.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.description = CacheDescription.read(self.folder)
        self.shards = shard_numbers(self.folder)
        if not self.shards:
            raise FileNotFoundError(f"the cache {self.folder} is empty; run {COMMAND} again, which continues")
        parts = [self._read_index(number) for number in self.shards]
        self._lengths = {number: len(part) for number, part in zip(self.shards, parts, strict=True)}
        paths = np.concatenate([part["path"] for part in parts])
        order = np.argsort(paths, kind="stable")
        self.paths: np.ndarray = paths[order]
        self.sha256: np.ndarray = np.concatenate([part["sha256"] for part in parts])[order]
        self._crc32 = np.concatenate([part["crc32"] for part in parts])[order]
        self._shard = np.repeat(self.shards, [len(part) for part in parts])[order]
        self._place = np.concatenate([np.arange(len(part)) for part in parts])[order]
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the shards itself: pickled, a memory map is a copy of the whole file.
        return self.__dict__ | {"_maps": {}}

    def find(self, paths: np.ndarray) -> np.ndarray:
        """Rows ``(M,)`` int64 of relative paths (bytes), −1 where the cache has none."""
        rows = np.searchsorted(self.paths, paths)
        found = self.paths[np.minimum(rows, len(self) - 1)] == paths
        return np.where(found, rows, -1)

    def embeddings(self, row: int) -> np.ndarray:
        """The embeddings of one image, ``(views, D)``, as they are stored.

        Raises:
            ValueError: they are damaged.
        """
        number = int(self._shard[row])
        stored: np.ndarray = np.array(self._map(number)[self._place[row]])
        if zlib.crc32(stored.tobytes()) != self._crc32[row]:
            raise self._damaged(number, f"the embedding of {os.fsdecode(self.paths[row])} is not what was written")
        return stored

    def embedding(self, row: int, view: str) -> Tensor:
        """The embedding of one view of one image, ``(D,)`` float32.

        Raises:
            ValueError: it is damaged.
        """
        stored = self.embeddings(row)[self.description.views.index(view)]
        return torch.from_numpy(stored.astype(np.float32))

    def check_content(self, row: int, file: Path, content: bytes) -> None:
        """Refuse an image file that is not the one that was embedded.

        Raises:
            ValueError: its ``content`` has another SHA-256.
        """
        self.check_sha256(row, file, bytes.fromhex(sha256_of(content)))

    def check_sha256(self, row: int, file: Path, digest: bytes) -> None:
        """Refuse an image of a file that is not the one that was embedded, by its SHA-256.

        Raises:
            ValueError: it is another.
        """
        if digest != self.sha256[row].tobytes():
            raise LipsimError(
                f"{file} is not the image whose embedding is in the cache {self.folder}: its content differs; restore "
                f"it, or delete {index_file(self.folder, int(self._shard[row])).name} there and run {COMMAND} again"
            )

    def check_teacher(self, encoder: nn.Module, name: str | Path) -> None:
        """Refuse a teacher that the embeddings are not of.

        Raises:
            ValueError: it has another fingerprint.
        """
        found = teacher_fingerprint(encoder)
        if found != self.description.teacher:
            raise LipsimError(
                f"the cache {self.folder} is of another teacher ({self.description.encoder} "
                f"{self.description.teacher[:12]}) than {name} ({type(encoder).__name__} {found[:12]}); name that one, "
                f"or make a cache of this one with {COMMAND}"
            )

    def check_images(self, images: FolderImages) -> None:
        """Refuse images that are seen in another way than the teacher saw them, see :meth:`check_view`.

        Raises:
            ValueError: another frame or view, or one of both is of images that a pack rounded and the other is not.
        """
        self.check_view(images.transform, images.views)
        self.check_rounded(images.rounded)

    def check_rounded(self, rounded: bool) -> None:
        """Refuse images of a pack that rounded them where the embeddings are of files, and the other way round.

        Raises:
            ValueError: they are.
        """
        if rounded != self.description.rounded:
            theirs, ours = ("a pack" if of_pack else "files" for of_pack in (self.description.rounded, rounded))
            raise LipsimError(
                f"the cache {self.folder} is of images of {theirs} and the data has images of {ours}, which differ by "
                f"up to half a grey level; give the same ones, or make another cache with {COMMAND}"
            )

    def check_view(self, transform: CentralCrop, views: Sequence[str]) -> None:
        """Refuse another part of an image than the teacher saw, or a view that was not embedded.

        The size may be another, as for a student of 64 pixels and a teacher of 224.

        Raises:
            ValueError: another frame, or a view that the cache lacks.
        """
        if not transform.frames_as(self.description.transform):
            raise LipsimError(
                f"the cache {self.folder} is of images under {self.description.transform!r}, the data has "
                f"{transform!r}; set image_size and short_side of the data alike, or make another cache with "
                f"{COMMAND} (another size will do where both have the same ratio to their short side)"
            )
        lacking = [view for view in views if view not in self.description.views]
        if lacking:
            raise LipsimError(
                f"the cache {self.folder} has the views {', '.join(self.description.views)} and lacks "
                f"{', '.join(lacking)}; leave them out of data.views, or make another cache with {COMMAND} --views"
            )

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[number] = self._open(number)
        return self._maps[number]

    def _open(self, number: int) -> np.ndarray:
        expected = (self._lengths[number], len(self.description.views), self.description.features)
        try:
            stored = map_array(shard_file(self.folder, number))
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(number, str(error)) from error
        if stored.shape != expected or stored.dtype != self.description.dtype:
            wanted = f"expected {self.description.dtype} {expected}"
            raise self._damaged(number, f"{wanted}, got {stored.dtype} {stored.shape}")
        return stored

    def _read_index(self, number: int) -> np.ndarray:
        try:
            index = read_array(index_file(self.folder, number))
            if index.dtype.names != _index_type(1).names:
                raise LipsimError(f"unknown columns {index.dtype.names}")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(number, str(error)) from error
        return index

    def _damaged(self, number: int, reason: str) -> LipsimError:
        return LipsimError(
            f"shard {number} of the cache {self.folder} is damaged ({reason}); delete "
            f"{index_file(self.folder, number).name} there and run {COMMAND} again"
        )


@runtime_checkable
class ServesEmbeddings(Protocol):
    """A data module that can serve each image with its embedding."""

    def use_embeddings(self, cache: EmbeddingCache | None) -> None:
        """Serve the embeddings of a cache from now on; None: images alone."""


def teacher_fingerprint(encoder: nn.Module) -> str:
    """SHA-256 over class, configuration and weights of a teacher: equal weights may serve another architecture."""
    config = json.dumps(encoder.config if isinstance(encoder, Encoder) else None, sort_keys=True, default=str)
    return sha256_of(f"{type(encoder).__name__}{config}{state_fingerprint(encoder.state_dict())}")


def write_shard(folder: Path, number: int, paths: Sequence[bytes], sha256: np.ndarray, embeddings: np.ndarray) -> None:
    """Write a shard as a whole, its index last.

    Args:
        folder: the cache.
        number: of the shard; one of this number is replaced.
        paths: relative paths of the images.
        sha256: ``(rows, 32)`` uint8, of their files.
        embeddings: ``(rows, views, D)`` in the dtype of the cache.
    """
    index = np.empty(len(paths), _index_type(max(map(len, paths))))
    index["path"], index["sha256"] = paths, sha256
    index["crc32"] = [zlib.crc32(row.tobytes()) for row in embeddings]
    for file, content in ((shard_file(folder, number), embeddings), (index_file(folder, number), index)):
        write_file(file, partial(np.save, arr=content, allow_pickle=False))


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the shards that are complete, ascending; other names, "shard-00000 (copy)", are passed over."""
    found = (re.fullmatch(r"shard-([0-9]{5,})\.index\.npy", file.name) for file in folder.glob("shard-*.index.npy"))
    return sorted(int(match[1]) for match in found if match)


def shard_file(folder: Path, number: int) -> Path:
    """File of the embeddings of a shard."""
    return folder / f"shard-{number:05d}.npy"


def index_file(folder: Path, number: int) -> Path:
    """File that says what is in a shard."""
    return folder / f"shard-{number:05d}.index.npy"


def _index_type(length: int) -> np.dtype:
    return np.dtype([("path", f"S{length}"), ("sha256", np.uint8, (32,)), ("crc32", "<u4")])
