"""A teacher's embeddings of a folder of images, computed once, on any number of processes.

:func:`cache_teacher` writes a cache or what is missing of it, :func:`check_cache` compares one with its teacher and its
images. Progress, and what is passed over, are told on stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.certificates.numbers import check_count
from lipsim.data.embeddings.cache import (
    CacheDescription,
    EmbeddingCache,
    shard_numbers,
    teacher_fingerprint,
    write_shard,
)
from lipsim.data.pack import DESCRIPTION, ImagePack
from lipsim.data.sets.folder import VIEWS, ListedImages, list_images
from lipsim.data.transforms import CentralCrop, load_image
from lipsim.evaluation.processes import ProcessFailed, processes, total
from lipsim.metric import PerceptualMetric, load
from lipsim.utils.claim import FolderClaim, claim_folder
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_leftovers, sha256
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import one_line

# Largest relative error ‖stored − recomputed‖/‖recomputed‖ of a sound row: rounding to float16 makes up to 2⁻¹¹, other
# kernels of the same float32 network some 1e-6, and bfloat16 has eight bits in every layer.
TOLERANCE = {"float16": 1e-3, "float32": 1e-4}
BFLOAT16_TOLERANCE = 5e-2

Chunk = tuple[int, list[int]]  # number of a shard, and the positions of its images


@dataclass(frozen=True)
class WrittenCache:
    """What :func:`cache_teacher` did.

    Attributes:
        folder: of the cache.
        description: what its embeddings have in common.
        images: how many images of the folder are in it now.
        embedded: how many of them were embedded by this call, on all processes.
        size: of the embeddings on disk, in bytes.
        seconds: that it took.
        processes: how many did it.
        rank: which of them this is; the others return the same, but for the time.
    """

    folder: Path
    description: CacheDescription
    images: int
    embedded: int
    size: int
    seconds: float
    processes: int
    rank: int

    def __str__(self) -> str:
        description = self.description
        return (
            f"{self.folder} has {self.images} images × {len(description.views)} views × {description.features} "
            f"features in {description.dtype}, {self.size / 1e6:.1f} MB; {self.embedded} images embedded now in "
            f"{self.seconds:.1f} s on {self.processes} processes"
        )


@dataclass(frozen=True)
class CacheVerdict:
    """What :func:`check_cache` found.

    Attributes:
        files: how many image files were hashed, all that the cache has a row for.
        shards: how many the cache has.
        recomputed: how many rows were embedded again.
        seed: that they were drawn by.
        largest_error: the largest ``‖stored − recomputed‖/‖recomputed‖`` among them.
        failures: one line for each kind of fault; empty where the cache is sound.
    """

    files: int
    shards: int
    recomputed: int
    seed: int
    largest_error: float
    failures: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether the cache is complete and the teacher's."""
        return not self.failures

    def __str__(self) -> str:
        return (
            f"checked the hashes of the teacher and of {self.files} image files, the checksums of {self.files} rows in "
            f"{self.shards} shards; computed {self.recomputed} of them again (drawn by seed {self.seed}), which differ "
            f"by at most {self.largest_error:.1e} of their norm"
        )


class HashedImages(Dataset[tuple[Tensor, Tensor]]):
    """Image files, each with the SHA-256 of the file.

    Args:
        folder: folder of the images, or a pack of them.
        names: ``(N,)`` bytes, relative to it.
        transform: from a decoded image to a tensor; None: only the files are read and hashed.

    Raises:
        ValueError: a pack of images under another transform.
    """

    def __init__(self, folder: Path, names: np.ndarray, transform: CentralCrop | None) -> None:
        self.folder, self.names, self.transform = folder, names, transform
        self.pack = open_pack(folder, transform)
        self._rows = None if self.pack is None else self.pack.find(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image ``(3, S, S)``, empty without a transform, and a hash ``(32,)`` uint8."""
        if self.pack is not None and self._rows is not None:
            row = int(self._rows[index])
            image = torch.empty(0) if self.transform is None else self.pack.image(row)
            return image, torch.from_numpy(self.pack.sha256[row].copy())
        file = self.folder / os.fsdecode(bytes(self.names[index]))
        content = file.read_bytes()
        digest = torch.frombuffer(bytearray.fromhex(sha256(content)), dtype=torch.uint8)
        return torch.empty(0) if self.transform is None else load_image(file, self.transform, content), digest


def open_pack(images: Path, transform: CentralCrop | None = None) -> ImagePack | None:
    """The pack that is at a folder of images; None where that has files.

    Raises:
        ValueError: it is of images under another transform.
    """
    if not (images / DESCRIPTION).is_file():
        return None
    pack = ImagePack(images)
    if transform is not None:
        pack.check_transform(transform)
    return pack


def _listed(images: Path) -> ListedImages:
    pack = open_pack(images)
    return list_images(images) if pack is None else ListedImages(pack.paths, "")


def describe(
    metric: PerceptualMetric,
    views: Sequence[str] = ("plain", "flip"),
    short_side: int | None = None,
    dtype: str = "float16",
    precision: str = "float32",
    rounded: bool = False,
) -> CacheDescription:
    """The description of a teacher's cache; arguments as of :func:`cache_teacher`.

    Raises:
        ValueError: one of them is of another kind.
    """
    with torch.inference_mode():
        side = metric.image_size
        features = metric.embed(torch.zeros(1, 3, side, side)).shape[1]
    return CacheDescription(
        teacher=teacher_fingerprint(metric.encoder),
        encoder=type(metric.encoder).__name__,
        features=features,
        image_size=side,
        short_side=short_side,
        views=tuple(views),
        dtype=dtype,
        precision=precision,
        rounded=rounded,
        anchor=metric.anchor,
    )


@torch.inference_mode()
def embed(metric: PerceptualMetric, images: Tensor, description: CacheDescription) -> np.ndarray:
    """Embeddings ``(N, views, D)`` float32 of images ``(N, 3, S, S)`` in the views and the precision of a cache."""
    device = metric.device
    images = images.to(device, non_blocking=True)
    precision: AbstractContextManager[object] = full_precision()
    if description.precision == "bfloat16":
        precision = torch.autocast(device.type, dtype=torch.bfloat16)
    with precision:
        views = [metric.embed(VIEWS[view](images)).float() for view in description.views]
    return torch.stack(views, dim=1).cpu().numpy()


def plan(folder: Path, names: np.ndarray, shard_size: int) -> list[Chunk]:
    """The shards that are still to be written: of images that no complete shard has, in their order.

    A kill leaves whole shards to do, and free numbers are taken in order, so that an interrupted cache ends as an
    uninterrupted one of the same ``shard_size`` does.
    """
    done = set(shard_numbers(folder))
    left = np.flatnonzero(EmbeddingCache(folder).find(names) < 0) if done else np.arange(len(names))
    free = (number for number in range(len(done) + len(left)) if number not in done)
    return [(next(free), left[i : i + shard_size].tolist()) for i in range(0, len(left), shard_size)]


def write_shards(
    folder: Path,
    description: CacheDescription,
    metric: PerceptualMetric,
    images: Path,
    names: np.ndarray,
    chunks: list[Chunk],
    batch_size: int,
    num_workers: int,
) -> Iterator[int]:
    """Embed and write shards one after the other; yields how many images each has.

    Args:
        folder: of the cache.
        description: of the cache.
        metric: the teacher, on the device that it is to run on.
        images: folder of the images.
        names: ``(N,)`` bytes, relative to it.
        chunks: the shards to write.
        batch_size: images embedded at a time.
        num_workers: processes that read and decode.

    Raises:
        ValueError: an image cannot be read, or an embedding is not finite in the dtype of the cache.
    """
    # Batches stay within a shard: the last digits of an embedding depend on its batch, which must not depend on what
    # else was left to do.
    batches = [rows[i : i + batch_size] for _, rows in chunks for i in range(0, len(rows), batch_size)]
    loader = iter(
        DataLoader(
            HashedImages(images, names, description.transform),
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for number, rows in chunks:
        parts, digests = [], []
        for _ in range(0, len(rows), batch_size):
            batch, digest = next(loader)
            parts.append(embed(metric, batch, description))
            digests.append(digest.numpy())
        embeddings = np.concatenate(parts)
        with np.errstate(over="ignore"):  # an overflow is reported by name
            stored = embeddings.astype(description.dtype)
        bad = np.flatnonzero(~np.isfinite(stored).all((1, 2)))
        if len(bad):
            raise LipsimError(
                f"the embedding of {os.fsdecode(bytes(names[rows[bad[0]]]))} is not finite in {description.dtype} (the "
                f"teacher's values reach {np.abs(embeddings).max():.3g}); choose --dtype float32, or another teacher"
            )
        write_shard(folder, number, [bytes(names[row]) for row in rows], np.concatenate(digests), stored)
        yield len(rows)


def cache_teacher(
    teacher: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    views: Sequence[str] = ("plain", "flip"),
    short_side: int | None = None,
    dtype: str = "float16",
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int = 8,
    shard_size: int = 2048,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> WrittenCache:
    """Run a teacher once over a folder of images and keep its embeddings, or add what is missing of them.

    With ``devices`` or ``num_nodes`` above 1 every process calls this: they are started here by the command line that
    runs, or by ``torchrun`` or ``srun``, and each writes shards of its own. Killed, the same call continues.

    Args:
        teacher: an exported metric, a file or the name of a bundled one.
        images: folder of the images, at any depth, or a pack of central crops of them.
        output: folder of the cache.
        views: of :data:`lipsim.data.sets.folder.VIEWS`, an embedding for each.
        short_side: what the short side is resized to before the central crop; None: nothing.
        dtype: of what is stored, "float16" or "float32".
        precision: that the teacher runs in, "float32" or "bfloat16" (autocast).
        batch_size: images embedded at a time by each process.
        num_workers: loading processes of each process.
        shard_size: images in a shard; a kill costs one.
        accelerator: "auto", "cpu", "cuda", …, as Lightning names them.
        devices: processes on each machine.
        num_nodes: machines.

    Raises:
        FileNotFoundError: no such teacher, or no images.
        ValueError: the folder has another cache, another job is writing it, or something is wrong with an image or its
            embedding.
        ProcessFailed: something was wrong in one of several processes.
    """
    images, output = user_path(images), user_path(output)
    for name, number in {"batch_size": batch_size, "shard_size": shard_size}.items():
        check_count(name, number)
    fabric = processes(accelerator, devices, num_nodes)
    metric = load(teacher)
    pack = open_pack(images, CentralCrop(metric.image_size, short_side))
    description = describe(metric, views, short_side, dtype, precision, pack is not None and pack.rounded)
    if (output / "cache.json").is_file():
        # Before other processes are started, which would wait for one that fails.
        CacheDescription.read(output).check_equal(description, output)
    fabric.launch()
    start = time.perf_counter()
    work: tuple[np.ndarray, list[Chunk]] | Exception | None = None
    claim: FolderClaim | None = None
    if fabric.is_global_zero:
        # By one process, since the others may find shards that were written meanwhile.
        try:
            listed = _listed(images)
            claim = claim_folder(output, "--output")  # an error that leaves this call gives it back as well
            description.write(output)
            remove_leftovers(output)
            if listed.skipped:
                print(f"passed over in {images}: {listed.skipped}", file=sys.stderr)
            work = listed.names, plan(output, listed.names, shard_size)
        except (OSError, ValueError) as error:
            work = error
    work = fabric.broadcast(work)
    if isinstance(work, Exception):
        raise work if fabric.is_global_zero else ProcessFailed("the first process could not plan the work")
    assert work is not None
    names, chunks = work
    own = chunks[fabric.global_rank :: fabric.world_size]
    metric.to(fabric.device)
    failure: OSError | ValueError | None = None
    try:
        with Progress("embedding", enabled=fabric.is_global_zero) as progress:
            advance = progress.counter(sum(len(rows) for _, rows in own), "images")
            for count in write_shards(output, description, metric, images, names, own, batch_size, num_workers):
                advance(count)
    except (OSError, ValueError) as error:
        if fabric.world_size == 1:
            raise
        print(f"error: {one_line(str(error))} (the other processes finish their shards)", file=sys.stderr, flush=True)
        failure = error
    total(fabric, 0, failure)
    if claim is not None:
        claim.release()
    return WrittenCache(
        folder=output,
        description=description,
        images=len(names),
        embedded=sum(len(rows) for _, rows in chunks),
        size=sum(file.stat().st_size for file in output.glob("*.npy")),
        seconds=time.perf_counter() - start,
        processes=fabric.world_size,
        rank=fabric.global_rank,
    )


def check_cache(
    teacher: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    sample: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 8,
    accelerator: str = "auto",
) -> CacheVerdict:
    """Check a cache against its teacher and its images.

    Every image must have a row, every file its hash, every row its checksum; some rows are computed again.

    Args:
        teacher: the metric that the cache is of.
        images: folder of the images.
        output: folder of the cache.
        sample: how many rows to compute again.
        seed: of their choice.
        batch_size: images embedded at a time.
        num_workers: loading processes.
        accelerator: where the teacher runs, as of :func:`cache_teacher`.

    Raises:
        FileNotFoundError: no cache, teacher or images.
        ValueError: the cache is of another teacher, or cannot be understood; or a sample below 0.
    """
    check_count("sample", sample, least=0)
    images, output = user_path(images), user_path(output)
    with Progress("checking the cache") as progress:
        cache = EmbeddingCache(output)
        metric = load(teacher).to(processes(accelerator).device)
        cache.check_teacher(metric.encoder, teacher)
        pack = open_pack(images, cache.description.transform)
        cache.check_rounded(pack is not None and pack.rounded)
        listed = _listed(images).names
        rows = cache.find(listed)
        faults = _fault("images are not in the cache", listed[rows < 0])
        names, rows = listed[rows >= 0], rows[rows >= 0]
        files = DataLoader(HashedImages(images, names, None), batch_size=256, num_workers=num_workers)
        digests, advance = [cache.sha256[:0]], progress.counter(len(names), "files")
        for _, digest in files:
            digests.append(digest.numpy())
            advance(len(digest))
        changed = (np.concatenate(digests) != cache.sha256[rows]).any(1)
        faults += _fault("image files have other content than what was embedded", names[changed])
        progress("checksums of rows")
        damage = [_damage(cache, int(row)) for row in rows]
        faults += [f"rows are damaged: {message}" for message in dict.fromkeys(filter(None, damage))]
        usable = np.flatnonzero(~changed & np.array([message is None for message in damage], dtype=bool))
        chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:sample])
        progress("embedding a sample again")
        again = DataLoader(
            HashedImages(images, names[chosen], cache.description.transform),
            batch_size=batch_size,
            num_workers=num_workers,
        )
        errors = _errors(cache, metric, again, rows[chosen])
        tolerance = _tolerance(cache.description)
        faults += _fault(
            f"embeddings are not the teacher's, to {tolerance:g} of their norm", names[chosen][~(errors <= tolerance)]
        )
    return CacheVerdict(len(names), len(cache.shards), len(chosen), seed, float(errors.max(initial=0)), tuple(faults))


def _tolerance(description: CacheDescription) -> float:
    return BFLOAT16_TOLERANCE if description.precision == "bfloat16" else TOLERANCE[description.dtype]


def _damage(cache: EmbeddingCache, row: int) -> str | None:
    try:
        cache.embeddings(row)
    except ValueError as error:
        return str(error)
    return None


def _errors(
    cache: EmbeddingCache, metric: PerceptualMetric, batches: DataLoader[tuple[Tensor, Tensor]], rows: np.ndarray
) -> np.ndarray:
    """Largest ``‖stored − recomputed‖/‖recomputed‖`` over the views of each image, ``(N,)``."""
    parts = [embed(metric, batch, cache.description) for batch, _ in batches]
    if not parts:
        return np.zeros(0)
    again = np.concatenate(parts)
    stored = np.stack([cache.embeddings(int(row)) for row in rows]).astype(np.float32)
    norm = np.maximum(np.linalg.norm(again, axis=2), np.finfo(np.float32).tiny)
    errors: np.ndarray = np.linalg.norm(stored - again, axis=2) / norm
    largest: np.ndarray = errors.max(1)
    return largest


def _fault(what: str, names: np.ndarray) -> list[str]:
    return [f"{len(names)} {what} (first: {os.fsdecode(bytes(names[0]))})"] if len(names) else []
