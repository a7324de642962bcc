"""A teacher's embeddings of a folder of images, computed once, on any number of processes."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.data.embeddings.cache import (
    CacheDescription,
    EmbeddingCache,
    shard_numbers,
    teacher_fingerprint,
    write_shard,
)
from lipsim.data.sets.folder import VIEWS, list_images
from lipsim.data.transforms import CentralCrop, load_image
from lipsim.metric import PerceptualMetric, load
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress
from lipsim.utils.slurm import check_slurm
from lipsim.utils.terminal import one_line

# Largest relative error ‖stored − recomputed‖/‖recomputed‖ of a sound row: rounding to float16 makes up to 2⁻¹¹, other
# kernels of the same float32 network some 1e-6, and bfloat16 has eight bits in every layer.
TOLERANCE = {"float16": 1e-3, "float32": 1e-4}
BFLOAT16_TOLERANCE = 5e-2

Chunk = tuple[int, list[int]]  # number of a shard, and the positions of its images


class HashedImages(Dataset[tuple[Tensor, Tensor]]):
    """Image files, each with the SHA-256 of the file.

    Args:
        folder: folder of the images.
        names: ``(N,)`` bytes, relative to it.
        transform: from a decoded image to a tensor; None: only the files are read and hashed.
    """

    def __init__(self, folder: Path, names: np.ndarray, transform: CentralCrop | None) -> None:
        self.folder, self.names, self.transform = folder, names, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image ``(3, S, S)``, empty without a transform, and a hash ``(32,)`` uint8."""
        file = self.folder / os.fsdecode(bytes(self.names[index]))
        content = file.read_bytes()
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        return torch.empty(0) if self.transform is None else load_image(file, self.transform, content), digest


def describe(metric: PerceptualMetric, options: argparse.Namespace) -> CacheDescription:
    """The description of the cache that the options ask for."""
    with torch.inference_mode():
        side = metric.image_size
        features = metric.embed(torch.zeros(1, 3, side, side)).shape[1]
    return CacheDescription(
        teacher=teacher_fingerprint(metric.encoder),
        encoder=type(metric.encoder).__name__,
        features=features,
        image_size=side,
        resize=options.resize,
        views=tuple(options.views),
        dtype=options.dtype,
        precision=options.precision,
    )


@torch.inference_mode()
def embed(metric: PerceptualMetric, images: Tensor, description: CacheDescription) -> np.ndarray:
    """Embeddings ``(N, views, D)`` float32 of images ``(N, 3, S, S)`` in the views and the precision of a cache."""
    device = next(metric.parameters()).device
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
    options: argparse.Namespace,
    description: CacheDescription,
    metric: PerceptualMetric,
    names: np.ndarray,
    chunks: list[Chunk],
) -> Iterator[int]:
    """Embed and write shards one after the other; yields how many images each has.

    Raises:
        ValueError: an image cannot be read, or an embedding is not finite in the dtype of the cache.
    """
    # Batches stay within a shard: the last digits of an embedding depend on its batch, which must not depend on what
    # else was left to do.
    size = options.batch_size
    batches = [rows[i : i + size] for _, rows in chunks for i in range(0, len(rows), size)]
    images = HashedImages(options.images, names, description.transform)
    loader = iter(
        DataLoader(
            images,
            batch_sampler=batches,
            num_workers=options.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for number, rows in chunks:
        embeddings, digests = [], []
        for _ in range(0, len(rows), size):
            batch, digest = next(loader)
            embeddings.append(embed(metric, batch, description))
            digests.append(digest.numpy())
        found = np.concatenate(embeddings)
        with np.errstate(over="ignore"):  # an overflow is reported by name
            stored = found.astype(description.dtype)
        bad = np.flatnonzero(~np.isfinite(stored).all((1, 2)))
        if len(bad):
            raise LipsimError(
                f"the embedding of {os.fsdecode(bytes(names[rows[bad[0]]]))} is not finite in {description.dtype} (the "
                f"teacher's values reach {np.abs(found).max():.3g}); choose --dtype float32, or another teacher"
            )
        write_shard(options.output, number, [bytes(names[row]) for row in rows], np.concatenate(digests), stored)
        yield len(rows)


def build(options: argparse.Namespace) -> None:
    """Write the cache that the options ask for, or what is missing of it.

    Raises:
        FileNotFoundError: no such teacher, or no images.
        ValueError: the folder has another cache, or something is wrong with an image or its embedding.
    """
    fabric = _fabric(options)
    metric = load(options.teacher)
    description = describe(metric, options)
    if (options.output / "cache.json").is_file():
        # Before other processes are started, which would wait for one that fails.
        CacheDescription.read(options.output).check_equal(description, options.output)
    fabric.launch()
    start = time.perf_counter()
    work: tuple[np.ndarray, list[Chunk]] | Exception | None = None
    if fabric.is_global_zero:
        # By one process, since the others may find shards that were written meanwhile.
        try:
            listed = list_images(options.images)
            names = listed.names
            description.write(options.output)
            if listed.skipped:
                print(f"passed over in {options.images}: {listed.skipped}", file=sys.stderr)
            work = names, plan(options.output, names, options.shard_size)
        except (OSError, ValueError) as error:
            work = error
    work = fabric.broadcast(work)
    if isinstance(work, Exception):
        raise work if fabric.is_global_zero else SystemExit(1)
    assert work is not None
    names, chunks = work
    own = chunks[fabric.global_rank :: fabric.world_size]
    metric.to(fabric.device)
    failed = False
    try:
        with Progress("embedding", enabled=fabric.is_global_zero) as progress:
            advance = progress.counter(sum(len(rows) for _, rows in own), "images")
            for count in write_shards(options, description, metric, names, own):
                advance(count)
    except (OSError, ValueError) as error:
        if fabric.world_size == 1:
            raise
        print(f"error: {one_line(str(error))} (the other processes finish their shards)", file=sys.stderr, flush=True)
        failed = True
    failures = fabric.all_reduce(torch.tensor(float(failed)), reduce_op="sum")  # waits for the slowest
    if failures:
        raise SystemExit(1)
    if fabric.is_global_zero:
        new, size = sum(len(rows) for _, rows in chunks), sum(f.stat().st_size for f in options.output.glob("*.npy"))
        print(
            f"{options.output} has {len(names)} images × {len(description.views)} views × {description.features} "
            f"features in {description.dtype}, {size / 1e6:.1f} MB; {new} images embedded now in "
            f"{time.perf_counter() - start:.1f} s on {fabric.world_size} processes"
        )


def verify(options: argparse.Namespace) -> list[str]:
    """Check a cache against its teacher and its images; prints what was checked and what is wrong.

    Every image must have a row, every file its hash, every row its checksum; some rows are computed again.

    Returns:
        What is wrong, one line each.

    Raises:
        FileNotFoundError: no cache, teacher or images.
        ValueError: the cache is of another teacher, or cannot be understood.
    """
    with Progress("checking the cache") as progress:
        return _verify(options, progress)


def _verify(options: argparse.Namespace, progress: Progress) -> list[str]:
    cache = EmbeddingCache(options.output)
    metric = load(options.teacher).to(_fabric(options).device)
    cache.check_teacher(metric.encoder, options.teacher)
    listed = list_images(options.images).names
    rows = cache.find(listed)
    faults = _fault("images are not in the cache", listed[rows < 0])
    names, rows = listed[rows >= 0], rows[rows >= 0]
    files = DataLoader(HashedImages(options.images, names, None), batch_size=256, num_workers=options.num_workers)
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
    sample = np.sort(np.random.default_rng(options.seed).permutation(usable)[: options.sample])
    progress("embedding a sample again")
    errors = _errors(options, cache, metric, names[sample], rows[sample])
    tolerance = BFLOAT16_TOLERANCE if cache.description.precision == "bfloat16" else TOLERANCE[cache.description.dtype]
    faults += _fault(
        f"embeddings are not the teacher's, to {tolerance:g} of their norm", names[sample][~(errors <= tolerance)]
    )
    print(
        f"checked the hashes of the teacher and of {len(names)} image files, the checksums of {len(rows)} rows in "
        f"{len(cache.shards)} shards; computed {len(sample)} of them again (drawn by seed {options.seed}), which "
        f"differ by at most {errors.max(initial=0):.1e} of their norm"
    )
    print("\n".join(f"FAILED: {line}" for line in faults) or "sound: the cache is complete and the teacher's")
    return faults


def _damage(cache: EmbeddingCache, row: int) -> str | None:
    try:
        cache.embeddings(row)
    except ValueError as error:
        return str(error)
    return None


def _errors(
    options: argparse.Namespace, cache: EmbeddingCache, metric: PerceptualMetric, names: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Largest ``‖stored − recomputed‖/‖recomputed‖`` over the views of each image, ``(N,)``."""
    images = HashedImages(options.images, names, cache.description.transform)
    batches = DataLoader(images, batch_size=options.batch_size, num_workers=options.num_workers)
    found = [embed(metric, batch, cache.description) for batch, _ in batches]
    if not found:
        return np.zeros(0)
    again = np.concatenate(found)
    stored = np.stack([cache.embeddings(int(row)) for row in rows]).astype(np.float32)
    norm = np.maximum(np.linalg.norm(again, axis=2), np.finfo(np.float32).tiny)
    errors: np.ndarray = np.linalg.norm(stored - again, axis=2) / norm
    largest: np.ndarray = errors.max(1)
    return largest


def _fault(what: str, names: np.ndarray) -> list[str]:
    return [f"{len(names)} {what} (first: {os.fsdecode(bytes(names[0]))})"] if len(names) else []


def _fabric(options: argparse.Namespace) -> Fabric:
    """One process, or several that this command or a launcher starts; the slowest may take a week longer."""
    check_slurm()
    alone = options.devices * options.num_nodes == 1 and os.environ.get("WORLD_SIZE", "1") == "1"
    return Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="auto" if alone else DDPStrategy(timeout=timedelta(days=7)),
    )
