"""Make a pack of a folder of images, or bring one up to date."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lipsim.certificates.numbers import check_count
from lipsim.data.eight_bit import rounded
from lipsim.data.embeddings.cache import shard_numbers
from lipsim.data.pack import (
    COMMAND,
    DESCRIPTION,
    KEPT_ANNOTATIONS,
    MAX_SHARD_BYTES,
    PackDescription,
    Transform,
    index_file,
    make_index,
    read_index,
    row_bytes,
    shard_bytes,
    shard_file,
    write_shard,
    write_shards,
)
from lipsim.data.sets.folder import list_images
from lipsim.data.sets.labelled_folder import ANNOTATIONS
from lipsim.data.transforms import load_image
from lipsim.utils.claim import CLAIM, claim_folder
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_states, remove_leftovers, sha256, write_bytes
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

SHARD_BYTES = 64 * 2**20  # what an object store hands over in a fraction of a second, and 445 images of 224 pixels
_BATCH = 16  # images a task of a reading process
_MOST_TOLD = 20


@dataclass(frozen=True)
class Packed:
    """What :func:`pack_images` did.

    Attributes:
        folder: the pack.
        description: how its images were resized.
        images: how many it has.
        read: how many of them were decoded now; the others were there.
        removed: how many it had that are no longer under the folder, or have changed.
        rounded: how many are rounded: differ from what their file gives, by up to half a grey level.
        size: of the shards in bytes.
        seconds: that it took.
        passed_over: what is in the folder and is no image, in words.
    """

    folder: Path
    description: PackDescription
    images: int
    read: int
    removed: int
    rounded: int
    size: int
    seconds: float
    passed_over: str

    def __str__(self) -> str:
        return (
            f"{self.folder} has {self.images} images under {self.description.transform!r}, {self.size / 1e6:.1f} MB; "
            f"{self.read} decoded now in {self.seconds:.1f} s, {self.removed} removed, {self.rounded} rounded to 8 bits"
        )


class _Row(NamedTuple):
    """Where an image is in a pack."""

    shard: int
    place: int
    state: tuple[int, int]


def pack_images(
    root: str | Path,
    output: str | Path,
    image_size: int,
    *,
    frame: str = "whole",
    resize: str = "float",
    short_side: int | None = None,
    stream: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    num_workers: int = 4,
    progress: Progress | None = None,
) -> Packed:
    """Decode and resize the images under a folder, and keep them in eight bits.

    An image is decoded where the pack does not have it, or where size or time of change of its file is another; what
    the folder has no more is dropped. Killed, the same call continues, and loses one shard.

    Args:
        root: folder of the images, at any depth.
        output: folder of the pack.
        image_size: side of the images.
        frame: "whole", "crop" or "square", see :class:`lipsim.data.pack.PackDescription`.
        resize: of the whole or the square, "float" or "pil".
        short_side: of the crop, what the short side is resized to before.
        stream: where the shards will be read from where they are not in the folder, such as ``s3://bucket/pack``.
        max_shard_bytes: of a shard.
        num_workers: processes that read and decode; 0: this one.
        progress: is told how many are done.

    Raises:
        FileNotFoundError: no folder, or no image in it.
        ValueError: ``output`` has another pack or something else, another process is writing it, or images cannot be
            read. The others are in shards then, and the same call continues.
    """
    start = time.perf_counter()
    root, output = user_path(root), user_path(output)
    check_count("num_workers", num_workers, least=0)
    description = PackDescription(image_size, frame, resize, short_side, stream)
    smallest, most = shard_bytes(1, image_size), min(max_shard_bytes, MAX_SHARD_BYTES)
    if most < smallest:
        raise LipsimError(f"expected shards of at least {smallest} bytes, an image's, got {most}")
    shard_size = (most - 8) // (8 + row_bytes(image_size))
    _check_output(output, description)
    listed = list_images(root)
    states = file_states(root, listed.names)
    claim = claim_folder(output, "--output")  # an error that leaves this call gives it back as well
    known = PackDescription.read(output).next_shard if (output / DESCRIPTION).is_file() else 0
    description = replace(description, next_shard=known)
    description.write(output)
    remove_leftovers(output)
    there, counts = _rows_of(output, image_size)
    wanted = {
        name: (int(size), int(changed))
        for name, (size, changed) in zip(listed.names.tolist(), states.tolist(), strict=True)
    }
    valid = {name: row for name, row in there.items() if wanted.get(name) == row.state}
    used = Counter(row.shard for row in valid.values())
    full = {number: count for number, count in counts.items() if used[number] == count}
    copied = [(name, row) for name, row in valid.items() if row.shard not in full]
    todo = [position for position, name in enumerate(listed.names.tolist()) if name not in valid]
    writer = _Writer(output, image_size, shard_size, first=max(known, max(counts, default=-1) + 1))
    for name, row in sorted(copied, key=lambda item: item[1][:2]):
        writer.copy(name, row)
    refused = []
    advance = None if progress is None else progress.counter(len(todo), "images")
    for batch in _decode(root, listed.names, description.transform, todo, num_workers):
        for position, decoded in batch:
            if isinstance(decoded, str):
                refused.append(decoded)
            else:
                writer.add(listed.names[position], states[position], *decoded)
        if advance is not None:
            advance(len(batch))
    writer.finish()
    if refused:
        more = f"; and {len(refused) - _MOST_TOLD} more" if len(refused) > _MOST_TOLD else ""
        raise LipsimError(
            f"{len(refused)} of {len(wanted)} images cannot be packed: {'; '.join(refused[:_MOST_TOLD])}{more}; mend "
            "or remove them and give the same command again, which continues"
        )
    _keep_annotations(root, output, listed.names)
    final = full | writer.counts
    write_shards(output, final, image_size)
    description = replace(description, next_shard=writer.next)
    description.write(output)  # before a file that has a number goes
    for number in counts.keys() - full.keys():
        index_file(output, number).unlink()
        shard_file(output, number).unlink(missing_ok=True)
    claim.release()
    return Packed(
        folder=output,
        description=description,
        images=len(wanted),
        read=len(todo),
        removed=len(there.keys() - valid.keys()),
        rounded=sum(int((~read_index(output, number)["exact"]).sum()) for number in final),
        size=sum(shard_bytes(count, image_size) for count in final.values()),
        seconds=time.perf_counter() - start,
        passed_over=listed.skipped,
    )


def _check_output(output: Path, description: PackDescription) -> None:
    if (output / DESCRIPTION).is_file():
        found = replace(PackDescription.read(output), stream=description.stream)
        if found != description:
            raise LipsimError(
                f"the pack {output} has images under {found.transform!r}, not {description.transform!r}; give its "
                "options, or another folder"
            )
    elif output.exists() and (not output.is_dir() or any(path.name != CLAIM for path in output.iterdir())):
        raise LipsimError(f"expected a pack, or no folder, or an empty one, got {output}; give another")


def _keep_annotations(root: Path, output: Path, names: np.ndarray) -> None:
    """Copy what says the classes of images/ in the folders of these images, and drop what says it no more."""
    folders = {os.path.dirname(os.path.dirname(os.fsdecode(name))) for name in names.tolist()}
    there = {str(Path(folder, ANNOTATIONS)) for folder in folders if (root / folder / ANNOTATIONS).is_file()}
    kept = output / KEPT_ANNOTATIONS
    for name in there:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(kept / name, (root / name).read_bytes())
    for file in kept.rglob(ANNOTATIONS):
        if str(file.relative_to(kept)) not in there:
            file.unlink()


def _rows_of(output: Path, image_size: int) -> tuple[dict[bytes, _Row], dict[int, int]]:
    """Where each image is in the complete shards, listed or not, and how many each shard has."""
    rows: dict[bytes, _Row] = {}
    counts = {}
    for number in shard_numbers(output):
        index, file = read_index(output, number), shard_file(output, number)
        counts[number] = len(index)
        if not file.is_file() or file.stat().st_size != shard_bytes(len(index), image_size):
            continue  # its images are decoded again
        columns = (index["path"].tolist(), index["size"].tolist(), index["time"].tolist())
        for place, (path, size, changed) in enumerate(zip(*columns, strict=True)):
            rows[path] = _Row(number, place, (size, changed))  # the later shard, where an update was killed
    return rows, counts


class _Writer:
    """Collects images into shards of one size."""

    def __init__(self, folder: Path, image_size: int, shard_size: int, first: int) -> None:
        self.folder, self.image_size, self.shard_size, self.next = folder, image_size, shard_size, first
        self.counts: dict[int, int] = {}
        self._images = np.empty((shard_size, 3, image_size, image_size), dtype=np.uint8)
        self._rows: list[tuple[bytes, np.ndarray, np.ndarray, bool]] = []
        self._source: tuple[int, np.ndarray, np.memmap] | None = None

    def add(self, path: bytes, state: np.ndarray, pixels: np.ndarray, digest: np.ndarray, exact: bool) -> None:
        self._images[len(self._rows)] = pixels
        self._rows.append((bytes(path), np.asarray(state), digest, exact))
        if len(self._rows) == self.shard_size:
            self.finish()

    def copy(self, path: bytes, row: _Row) -> None:
        """Take an image over from another shard, without its file."""
        if self._source is None or self._source[0] != row.shard:
            index = read_index(self.folder, row.shard)
            shape = (len(index), 4 + row_bytes(self.image_size))
            file = shard_file(self.folder, row.shard)
            self._source = row.shard, index, np.memmap(file, np.uint8, "r", offset=4 * (len(index) + 2), shape=shape)
        _, index, mapped = self._source
        entry, pixels = index[row.place], np.array(mapped[row.place, 4:])
        if zlib.crc32(pixels.data) != entry["crc32"]:
            raise LipsimError(
                f"shard {row.shard} of the pack {self.folder} is damaged; delete "
                f"{index_file(self.folder, row.shard).name} there and run {COMMAND} again"
            )
        side = self.image_size
        self.add(path, np.array(row.state), pixels.reshape(3, side, side), entry["sha256"], bool(entry["exact"]))

    def finish(self) -> None:
        """Write what is collected."""
        if not self._rows:
            return
        paths, states, digests, exact = zip(*self._rows, strict=True)
        images = self._images[: len(paths)]
        index = make_index(paths, np.stack(states), np.stack(digests), images, np.array(exact))
        write_shard(self.folder, self.next, images, index)
        self.counts[self.next] = len(paths)
        self.next += 1
        self._rows.clear()


Decoded = tuple[np.ndarray, np.ndarray, bool]


class _Files(Dataset[tuple[int, "Decoded | str"]]):
    """Image files by position: pixels, hash and whether nothing was rounded; or what is wrong with one."""

    def __init__(self, root: Path, names: np.ndarray, transform: Transform) -> None:
        self.root, self.names, self.transform = root, names, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Decoded | str]:
        file = self.root / os.fsdecode(bytes(self.names[index]))
        try:
            content = file.read_bytes()
            pixels, exact = rounded(load_image(file, self.transform, content))
        except (LipsimError, OSError) as error:
            return index, str(error)
        return index, (pixels.numpy(), np.frombuffer(bytes.fromhex(sha256(content)), np.uint8), exact)


def _decode(
    root: Path, names: np.ndarray, transform: Transform, todo: list[int], num_workers: int
) -> Iterator[list[tuple[int, Decoded | str]]]:
    batches = [todo[i : i + _BATCH] for i in range(0, len(todo), _BATCH)]
    return iter(
        DataLoader(
            _Files(root, names, transform),
            batch_sampler=batches,
            num_workers=min(num_workers, len(batches)),
            collate_fn=list,
            generator=torch.Generator(),  # a loader draws from torch's, which is the caller's
        )
    )
