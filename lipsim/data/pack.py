"""A pack: images decoded and resized once, rounded to eight bits, and found by the path of their file.

A pack is a folder:

``pack.json``
    :class:`PackDescription`: how the images were resized.
``shard-00000.bin``
    The images of a shard, in the layout of litdata's chunks: uint32 N, N + 1 uint32 offsets, and for each image its
    length, uint32, and its bytes, ``(3, S, S)`` uint8; little-endian. As all images are equally long, it is one array
    behind a header, and is memory-mapped as such; litdata streams the same file from an object store.
``shard-00000.index.npy``
    A row an image: ``path`` relative to the folder of images, ``size`` and ``time`` of change of its file, ``sha256``
    of that, ``crc32`` of the pixels, and whether they are ``exact``: nothing was rounded.
``index.json``
    Which shards there are, as litdata reads it. It is written last: without it a pack is not finished.

Numbers of shards are never given twice, so that no copy of a shard in a cache is taken for a newer one.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipsim.certificates.numbers import check_count
from lipsim.data.eight_bit import as_float
from lipsim.data.transforms import CentralCrop, CentredSquare, Preprocess, UnreadableImageError
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json, read_array, write_file, write_text
from lipsim.utils.paths import user_path

FORMAT = "lipsim-pack"
VERSION = 1
FRAMES = ("whole", "crop", "square")
COMMAND = "lipsim data pack"  # named by errors, as what mends them
DESCRIPTION, SHARDS = "pack.json", "index.json"
KEPT_ANNOTATIONS = "annotations"  # what says the classes of images that lie in no folder of one, by its path
MAX_SHARD_BYTES = 2**32 - 1  # offsets are of 32 bits
_OPEN_SHARDS = 256  # a memory map keeps a file open, and a process may open some 1,000
# litdata's description of items that are bytes.
_LITDATA = {
    "chunk_bytes": None,
    "compression": None,
    "data_format": ["bytes"],
    "data_spec": json.dumps([1, {"type": None, "context": None, "children_spec": []}]),
    "encryption": None,
    "item_loader": "PyTreeLoader",
}

Transform = Preprocess | CentralCrop | CentredSquare


@dataclass(frozen=True)
class PackDescription:
    """What the images of a pack have in common.

    Attributes:
        image_size: their side.
        frame: "whole": all of each image, by :class:`lipsim.data.Preprocess`, as sets of triplets show it; "crop": its
            centre, by :class:`lipsim.data.CentralCrop`, as folders for distillation show it; "square": its centred
            square, by :class:`lipsim.data.transforms.CentredSquare`, as triplets of photographs show it.
        resize: of the whole or the square, "float" or "pil"; crops are resized in float.
        short_side: of the crop, what the short side is resized to before; None: nothing.
        stream: where the shards are that are not in the folder, an address that litdata knows, such as
            ``s3://bucket/pack``; None: nowhere.
        next_shard: number that no shard has had so far, of those that are gone as well; packs of earlier versions do
            not say, 0.
    """

    image_size: int
    frame: str = "whole"
    resize: str = "float"
    short_side: int | None = None
    stream: str | None = None
    next_shard: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_count("image_size", self.image_size)
        check_count("next_shard", self.next_shard, least=0)
        if self.frame not in FRAMES:
            raise LipsimError(f"expected a frame among {', '.join(FRAMES)}, got {self.frame!r}")
        if self.frame != "crop" and self.short_side is not None:
            raise LipsimError(f"short_side is of the frame crop, got it for {self.frame}; leave it out")
        if self.frame == "crop" and self.resize != "float":
            raise LipsimError(f"crops are resized in float, got resize {self.resize!r}")
        _ = self.transform  # refuses other impossible values

    @property
    def transform(self) -> Transform:
        """From an image file to what is stored, but for the rounding."""
        if self.frame == "crop":
            return CentralCrop(self.image_size, self.short_side)
        preprocess = Preprocess(self.image_size, self.resize)
        return preprocess if self.frame == "whole" else CentredSquare(preprocess)

    @classmethod
    def read(cls, folder: Path) -> PackDescription:
        """The description of the pack in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be understood.
        """
        file = folder / DESCRIPTION
        if not file.is_file():
            raise FileNotFoundError(f"no pack at {folder} (it has no {DESCRIPTION}); {COMMAND} makes one")
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT or content.pop("version") != VERSION:
                raise LipsimError("another format, or of a newer version of lipsim")
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LipsimError(f"cannot read {file} ({error}); make the pack again with {COMMAND}") from error

    def write(self, folder: Path) -> None:
        """Write ``pack.json``, replacing it as a whole."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(folder / DESCRIPTION, json.dumps(content, indent=1) + "\n")


class ImagePack:
    """A pack on disk, for reading by any number of processes: an :class:`lipsim.data.images.ImageSource`.

    Args:
        folder: the pack. Shards that are not in it are streamed from where ``pack.json`` says, through litdata.

    Attributes:
        description: how its images were resized.
        paths: ``(N,)`` sorted bytes, files relative to the folder that was packed.
        sha256: ``(N, 32)`` uint8, of the files.
        exact: ``(N,)`` bool, whether nothing of an image was rounded: what a file gives is what the pack gives.

    Raises:
        FileNotFoundError: no pack.
        ValueError: it is not finished, damaged, or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.description = PackDescription.read(self.folder)
        self.shards = read_shards(self.folder)
        indices = [read_index(self.folder, number) for number in self.shards]
        lengths = [len(index) for index in indices]
        self._lengths = dict(zip(self.shards, lengths, strict=True))
        self._check_files()
        paths = np.concatenate([index["path"] for index in indices])
        order = np.argsort(paths, kind="stable")
        self.paths: np.ndarray = paths[order]
        self.sha256: np.ndarray = np.concatenate([index["sha256"] for index in indices])[order]
        self.exact: np.ndarray = np.concatenate([index["exact"] for index in indices])[order]
        self._crc32 = np.concatenate([index["crc32"] for index in indices])[order]
        self._shard = np.repeat(self.shards, lengths)[order]
        self._place = np.concatenate([np.arange(length) for length in lengths])[order]
        self._item = np.arange(len(paths))[order]  # of all shards in their order, as litdata counts
        self._maps: dict[int, np.ndarray] = {}
        self._stream: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps and streams by itself: pickled, a memory map is a copy of the whole file.
        return self.__dict__ | {"_maps": {}, "_stream": None}

    @property
    def transform(self) -> Transform:
        """From an image file to an image of the pack, but for the rounding."""
        return self.description.transform

    @property
    def rounded(self) -> bool:
        """Whether any image is not, to the last digit, what its file gives."""
        return not bool(self.exact.all())

    def check_transform(self, transform: Transform) -> None:
        """Refuse a pack whose images were resized in another way than somebody wants them.

        Raises:
            ValueError: they were.
        """
        if isinstance(transform, Preprocess) and transform.way != transform.resize:
            raise LipsimError(
                f"the pack {self.folder} has images under {self.transform!r}, expected {transform!r}; whole images are "
                "stretched in a pack: leave the pack out, the files themselves can be framed in any way"
            )
        if repr(transform) != repr(self.transform):
            raise LipsimError(
                f"the pack {self.folder} has images under {self.transform!r}, expected {transform!r}; set the size and "
                f"the resize alike, or make another pack with {COMMAND} (--size, --resize, --frame, --short-side)"
            )

    def find(self, paths: np.ndarray) -> np.ndarray:
        """Rows ``(M,)`` int64 of relative paths (bytes), −1 where the pack has none."""
        rows = np.searchsorted(self.paths, paths)
        found = self.paths[np.minimum(rows, len(self) - 1)] == paths
        return np.where(found, rows, -1)

    def names(self, prefix: str) -> np.ndarray:
        """Paths that begin with a prefix, such as ``train/``, without it: ``(M,)`` sorted bytes.

        Raises:
            FileNotFoundError: none does.
        """
        start = os.fsencode(prefix)
        names = [path[len(start) :] for path in self.paths.tolist() if path.startswith(start)]
        if not names:
            raise FileNotFoundError(f"no images in the pack {self.folder} whose paths begin with {prefix}")
        return np.array(names)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of some images are not in the pack, in their order."""
        asked = list(names)
        rows = self.find(np.array([_as_bytes(name) for name in asked], dtype="S")).tolist()
        return [name for name, row in zip(asked, rows, strict=True) if row < 0]

    @property
    def remedy(self) -> str:
        """What is said of images that are not in the pack."""
        return (
            f"the pack {self.folder} lacks what is named; run {COMMAND} again, which adds it unless it says that it "
            "passes files of that ending over, or leave the pack out"
        )

    def load(self, name: str) -> Tensor:
        """One image by the path of its file, ``(3, S, S)`` float32 in [0, 1].

        Raises:
            FileNotFoundError: it is not in the pack.
            ValueError: its pixels are damaged.
        """
        return self.image(self.row(name))

    def row(self, name: str) -> int:
        """The row of an image by the path of its file.

        Raises:
            FileNotFoundError: it is not in the pack.
        """
        row = int(self.find(np.array([_as_bytes(name)]))[0])
        if row < 0:
            raise FileNotFoundError(
                f"the image {name} is not in the pack {self.folder}; run {COMMAND} again, which adds what is missing"
            )
        return row

    def image(self, row: int) -> Tensor:
        """One image by its row, ``(3, S, S)`` float32 in [0, 1].

        Raises:
            ValueError: its pixels are damaged.
        """
        return as_float(torch.from_numpy(self.pixels(row)))

    def pixels(self, row: int) -> np.ndarray:
        """One image by its row, ``(3, S, S)`` uint8.

        Raises:
            ValueError: its pixels are damaged.
        """
        number, side = int(self._shard[row]), self.description.image_size
        mapped = self._map(number)
        stored = self._streamed(row) if mapped is None else np.array(mapped[self._place[row], 4:])
        if len(stored) != 3 * side * side or zlib.crc32(stored.data) != self._crc32[row]:
            # Of one image, which may be skipped.
            damage = self._damaged(number, f"the image {os.fsdecode(self.paths[row])} is not what was written")
            raise UnreadableImageError(str(damage))
        return stored.reshape(3, side, side)

    def _map(self, number: int) -> np.ndarray | None:
        """Images of a shard, a row of length and bytes each; None where the shard is elsewhere."""
        if number not in self._maps:
            file = shard_file(self.folder, number)
            if self.description.stream is not None and not file.is_file():
                return None
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            count = self._lengths[number]
            shape = (count, 4 + row_bytes(self.description.image_size))
            try:
                self._maps[number] = np.memmap(file, np.uint8, "r", offset=4 * (count + 2), shape=shape)
            except (OSError, ValueError) as error:
                raise self._damaged(number, str(error)) from error
        return self._maps[number]

    def _streamed(self, row: int) -> np.ndarray:
        if self._stream is None:
            try:
                import litdata  # which only packs of an object store need
            except ImportError as error:
                raise LipsimError(
                    f"the shards of {self.folder} are at {self.description.stream}, which litdata streams: "
                    "pip install 'lipsim[stream]'"
                ) from error
            stream = litdata.StreamingDataset(self.description.stream)
            _check_litdata(Path(stream.input_dir.path), self.description.stream)
            if len(stream) != len(self):
                raise LipsimError(
                    f"{self.description.stream} has {len(stream)} images, the index at {self.folder} has "
                    f"{len(self)}; copy the index of that pack again (*.json and *.npy)"
                )
            self._stream = stream
        return np.frombuffer(bytearray(self._stream[int(self._item[row])]), np.uint8)

    def _check_files(self) -> None:
        """Refuse shards that a copy has cut off, before hours of training meet them."""
        for number, count in self._lengths.items():
            file, expected = shard_file(self.folder, number), shard_bytes(count, self.description.image_size)
            if file.is_file():
                if file.stat().st_size != expected:
                    raise self._damaged(number, f"it has {file.stat().st_size} bytes, expected {expected}")
            elif self.description.stream is None:
                raise self._damaged(number, "its file is missing")

    def _damaged(self, number: int, reason: str) -> LipsimError:
        return damaged(self.folder, number, reason)


def find_pack(folder: Path) -> tuple[Path, str] | None:
    """The pack that a folder is, or is within: its folder, and the prefix of the paths that are meant.

    ``PACK/train`` is no folder on disk; its images are those of the pack whose paths begin with ``train/``.
    """
    inside: tuple[str, ...] = ()
    while not (folder / DESCRIPTION).is_file():
        if folder.exists() or folder == folder.parent:
            return None
        inside, folder = (folder.name, *inside), folder.parent
    return folder, "".join(f"{name}/" for name in inside)


def row_bytes(image_size: int) -> int:
    """Bytes of an image of a pack."""
    return 3 * image_size * image_size


def shard_bytes(count: int, image_size: int) -> int:
    """Bytes of a shard of so many images."""
    return 4 * (count + 2) + count * (4 + row_bytes(image_size))


def write_shard(folder: Path, number: int, images: np.ndarray, index: np.ndarray) -> None:
    """Write a shard as a whole, its index last.

    Args:
        folder: the pack.
        number: of the shard.
        images: ``(N, 3, S, S)`` uint8.
        index: ``(N,)`` of :func:`index_type`.
    """
    count, length = len(images), row_bytes(images.shape[2])
    header = np.empty(count + 2, dtype="<u4")
    header[0], header[1:] = count, 4 * (count + 2) + np.arange(count + 1) * (4 + length)
    rows = np.empty((count, 4 + length), dtype=np.uint8)
    rows[:, :4] = np.array([length], dtype="<u4").view(np.uint8)
    rows[:, 4:] = images.reshape(count, length)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(header.data)
            file.write(rows.data)

    write_file(shard_file(folder, number), write)
    write_file(index_file(folder, number), partial(np.save, arr=index, allow_pickle=False))


def write_shards(folder: Path, counts: dict[int, int], image_size: int) -> None:
    """Write ``index.json``: the shards of a finished pack, number → images."""
    chunks = [
        {
            "chunk_bytes": shard_bytes(count, image_size),
            "chunk_size": count,
            "dim": None,
            "filename": shard_file(folder, number).name,
        }
        for number, count in sorted(counts.items())
    ]
    config = _LITDATA | {"chunk_size": max(counts.values())}
    write_text(folder / SHARDS, json.dumps({"chunks": chunks, "config": config}, indent=1) + "\n")


def read_shards(folder: Path) -> list[int]:
    """Numbers of the shards of a finished pack, ascending.

    Raises:
        ValueError: it is not finished, or its list cannot be understood.
    """
    file = folder / SHARDS
    if not file.is_file():
        raise LipsimError(f"the pack {folder} is not finished; run {COMMAND} again, which continues")
    try:
        chunks = parse_json(file.read_text(encoding="utf-8"))["chunks"]
        numbers = [int(re.fullmatch(r"shard-(\d+)\.bin", chunk["filename"])[1]) for chunk in chunks]  # type: ignore[index]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LipsimError(f"cannot read {file} ({error!r}); run {COMMAND} again") from error
    if not numbers or numbers != sorted(set(numbers)):
        raise LipsimError(f"{file} lists no shards in order; run {COMMAND} again")
    return numbers


def _check_litdata(folder: Path, place: str | None) -> None:
    """Refuse an index of litdata that is not as :func:`write_shards` writes one: it says how items are read.

    By an index of its own making, litdata would unpickle items, import modules, and write files anywhere.

    Args:
        folder: where litdata has put the index.
        place: where it is from.

    Raises:
        ValueError: it is another.
    """
    read_shards(folder)  # names of its files
    config = parse_json((folder / SHARDS).read_text(encoding="utf-8"))["config"]
    differing = [
        name for name in {**_LITDATA, **config} if name != "chunk_size" and config.get(name) != _LITDATA.get(name)
    ]
    if differing:
        raise LipsimError(
            f"{place} has an index of litdata that is not of a pack ({', '.join(sorted(differing))} differ) and is not "
            f"read; make the pack again with {COMMAND}"
        )


def read_index(folder: Path, number: int) -> np.ndarray:
    """The index of a shard, ``(N,)`` of :func:`index_type`.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        index = read_array(index_file(folder, number))
        if index.dtype.names != index_type(1).names or index.ndim != 1 or not len(index):
            raise LipsimError(f"unknown columns {index.dtype.names}")
    except (OSError, ValueError, EOFError) as error:
        raise damaged(folder, number, str(error)) from error
    return index


def index_type(length: int) -> np.dtype:
    """What the index of a shard says of an image; the longest path has ``length`` bytes."""
    return np.dtype(
        [
            ("path", f"S{length}"),
            ("size", "<i8"),
            ("time", "<i8"),
            ("sha256", np.uint8, (32,)),
            ("crc32", "<u4"),
            ("exact", "?"),
        ]
    )


def make_index(
    paths: Sequence[bytes], states: np.ndarray, sha256: np.ndarray, images: np.ndarray, exact: np.ndarray
) -> np.ndarray:
    """The index of a shard of images ``(N, 3, S, S)`` uint8.

    Args:
        paths: of the files, relative.
        states: ``(N, 2)`` size and time of change.
        sha256: ``(N, 32)`` uint8, of the files.
        images: the pixels.
        exact: ``(N,)`` bool.
    """
    index = np.empty(len(paths), index_type(max(map(len, paths))))
    index["path"], index["size"], index["time"] = paths, states[:, 0], states[:, 1]
    index["sha256"], index["exact"] = sha256, exact
    index["crc32"] = [zlib.crc32(image.tobytes()) for image in images]
    return index


def shard_file(folder: Path, number: int) -> Path:
    """File of the images of a shard."""
    return folder / f"shard-{number:05d}.bin"


def index_file(folder: Path, number: int) -> Path:
    """File that says what is in a shard."""
    return folder / f"shard-{number:05d}.index.npy"


def damaged(folder: Path, number: int, reason: str) -> LipsimError:
    """What is said of a shard that cannot be used."""
    return LipsimError(
        f"shard {number} of the pack {folder} is damaged ({reason}); copy it again, or delete "
        f"{index_file(folder, number).name} there and run {COMMAND} again"
    )


def _as_bytes(name: str) -> bytes:
    return os.fsencode(str(PurePosixPath(name)))
