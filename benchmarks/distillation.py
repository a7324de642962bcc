"""What an embedding cache saves: a step of distillation of a random ViT, with the cache and without.

    python benchmarks/distillation.py [--device cuda] [--threads 1] [--batch 32] [--rounds 3] [--images FOLDER]

One round runs every case once, so that a slow moment of the machine meets all of them; times are medians of the rounds,
on a CPU the processor time of all threads. A step is jitter, targets, loss, backward and Adam of the stage
``Distillation``; with the cache the targets come with the batch. With ``--images``, a folder that has val/CLASS/IMAGE,
a second table has what it costs to read an image: the cache hashes the file and looks its embedding up.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from students import seconds

from lipsim import PerceptualMetric
from lipsim.data.embeddings.cache import CacheDescription, EmbeddingCache, write_shard
from lipsim.data.embeddings.folder import EmbeddedFolder, EmbeddedImages
from lipsim.data.sets.folder import FolderImages
from lipsim.metric import save
from lipsim.students import OrthogonalShiftNetwork
from lipsim.teachers import DreamSim, SmallViT
from lipsim.training import Distillation

TEACHERS: dict[str, Callable[[int], nn.Module]] = {
    "ViT-S/16": lambda size: SmallViT(size, patch_size=16, width=384, depth=12, heads=6),
    "ViT-B/16": lambda size: SmallViT(size, patch_size=16, width=768, depth=12, heads=12),
    "DreamSim ensemble": lambda size: DreamSim("ensemble", "random", size),
}


def steps(teacher: str, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A step of distillation without the cache and with it, of one and the same stage."""
    torch.manual_seed(0)
    size = options.image_size
    vit = TEACHERS[teacher](size)
    features = vit.out_features
    with tempfile.TemporaryDirectory() as folder:
        metric = PerceptualMetric(vit, size, anchor=0.0, lipschitz=float("inf"))
        file = save(metric, Path(folder) / "teacher.safetensors")
        student = OrthogonalShiftNetwork(size, features, grid=28, widths=(96, 192, 384), depths=(2, 2, 2))
        stage = Distillation(file, student).to(options.device)
    optimizer = stage.optimizer_factory(stage.parameters())
    images = torch.rand(options.batch, 3, size, size, device=options.device)
    target = torch.randn(options.batch, features, device=options.device)

    def step(batch: torch.Tensor | EmbeddedImages) -> None:
        optimizer.zero_grad()
        stage.training_step(batch, 0).backward()
        optimizer.step()

    return {
        "without cache": lambda: step(images),
        "with cache": lambda: step(EmbeddedImages(images, target)),
    }


def readers(root: Path, size: int, folder: Path) -> dict[str, Callable[[], None]]:
    """Reading the images of val/ without a cache and with one, in an order of no pattern."""
    images = FolderImages(root / "val", size)
    digests = [hashlib.sha256(images.path(i).read_bytes()).digest() for i in range(len(images))]
    sha256 = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    CacheDescription("", "none", 1792, size, None, ("plain", "flip"), "float16", "float32").write(folder)
    embeddings = np.random.default_rng(0).normal(size=(len(images), 2, 1792)).astype(np.float16)
    write_shard(folder, 0, [b"val/" + bytes(name) for name in images.names], sha256, embeddings)
    cached = EmbeddedFolder(images, EmbeddingCache(folder), "val/")
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    return {
        "without cache": lambda: [images[i] for i in order] and None,
        "with cache": lambda: [cached[i] for i in order] and None,
    }


def interleaved(cases: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each case."""
    device = torch.device(options.device)
    for run in cases.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, run in cases.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="You are trying to `self.log")
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, batch {options.batch}\n")
    print("| teacher | step without cache, s | step with cache, s | times as fast |\n| --- | ---: | ---: | ---: |")
    for teacher in options.teachers:
        without, cached = interleaved(steps(teacher, options), options).values()
        print(f"| {teacher} | {without:.3f} | {cached:.3f} | {without / cached:.2f} |", flush=True)
    if options.images is not None:
        with tempfile.TemporaryDirectory() as folder:
            reading = interleaved(readers(options.images, options.image_size, Path(folder)), options)
        count = len(FolderImages(options.images / "val", options.image_size))
        print("\n| reading an image | ms |\n| --- | ---: |")
        print("\n".join(f"| {name} | {1000 * value / count:.3f} |" for name, value in reading.items()))


if __name__ == "__main__":
    main()
