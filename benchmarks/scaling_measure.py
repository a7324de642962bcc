"""Figures of this machine for the model of scaling.py, and its predictions beside trainings."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from distillation import TEACHERS
from lightning.pytorch import Callback
from PIL import Image
from scaling_model import Cluster, Figures, Run, cost
from students import seconds

import lipsim
from lipsim import PerceptualMetric
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.data.pack import ImagePack
from lipsim.data.packing import pack_images
from lipsim.data.sets.folder import FolderImages
from lipsim.data.transforms import CentralCrop, load_image
from lipsim.datamodules import ImageFolderData
from lipsim.metric import save
from lipsim.students import OrthogonalShiftNetwork
from lipsim.training import Distillation
from lipsim.training.teacher_cache import cache_teacher


def measure(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, list[object]]]:
    """Title and figures of this machine: one device, one core."""
    device, size = torch.device(options.device), options.image_size
    stage = stage_of(options, folder).to(device)
    teacher = stage.teacher
    assert teacher is not None
    optimizer = stage.optimizer_factory([p for p in stage.parameters() if p.requires_grad])
    batches = {count: torch.rand(count, 3, size, size, device=device) for count in (options.batch, 2 * options.batch)}

    def step(count: int) -> Callable[[], None]:
        target = torch.randn(count, teacher.encoder.out_features, device=device)
        batch = EmbeddedImages(batches[count], target)

        def run() -> None:
            optimizer.zero_grad()
            stage.training_step(batch, 0).backward()
            optimizer.step()

        return run

    def embed() -> None:
        with torch.no_grad():
            teacher.embed(batches[2 * options.batch])

    source = options.images or made_up(folder / "images", 64, 256 if size > 64 else 64)
    files = FolderImages(source, size, short_side=size)
    paths = [files.path(index) for index in range(min(len(files), 256))]
    few = folder / "few"
    for number, path in enumerate(paths):
        (few / "a").mkdir(parents=True, exist_ok=True)
        (few / "a" / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    pack_images(few, folder / "pack", size, frame="crop", short_side=size, num_workers=0)
    pack, crop = ImagePack(folder / "pack"), CentralCrop(size, size)

    def read(image: Callable[[int], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, len(paths), options.batch):
                torch.stack([image(index) for index in range(start, min(start + options.batch, len(paths)))])

        return run

    cases = {
        "step": step(options.batch),
        "double": step(2 * options.batch),
        "teacher": embed,
        "files": read(lambda index: load_image(paths[index], crop)),
        "pack": read(pack.image),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, options.rounds):
        for name, case in cases.items():
            spent = seconds(case, device if name in ("step", "double", "teacher") else torch.device("cpu"))
            if number >= 0:
                times[name].append(spent)
    median = {name: statistics.median(values) for name, values in times.items()}
    image = max(0.0, (median["double"] - median["step"]) / options.batch)
    kept = [kept_bytes(stage, step(count)) for count in batches]
    each = (kept[1] - kept[0]) / options.batch
    what = f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{options.threads} CPU threads"
    how = (
        f"{what}, torch {torch.__version__}, medians of {options.rounds} rounds, batches of {options.batch} and double"
    )
    some = f"{len(paths)} images of {source.name if options.images else 'made-up JPEG files'}, one core"
    student = sum(p.numel() for p in stage.parameters())
    values: dict[str, tuple[float, str]] = {
        "image_size": (size, ""),
        "features": (teacher.encoder.out_features, ""),
        "student_features": (teacher.encoder.out_features, ""),
        "parameters": (student, "counted"),
        "teacher_parameters": (sum(p.numel() for p in teacher.parameters()), "counted"),
        "step_seconds": (max(0.0, median["step"] - options.batch * image), how),
        "image_seconds": (image, how),
        "teacher_seconds": (median["teacher"] / (2 * options.batch), how),
        "step_bytes": (max(0.0, kept[0] - options.batch * each), "tensors kept for the backward pass"),
        "activation_bytes": (each, "the same, by difference"),
        "reading_core_seconds": (median["files"] / len(paths), some),
        "pack_core_seconds": (median["pack"] / len(paths), some),
        "image_bytes": (sum(path.stat().st_size for path in paths) / len(paths), some),
        "pack_bytes": (sum(f.stat().st_size for f in (folder / "pack").glob("*.bin")) / len(paths), some),
    }
    assert options.teacher in TEACHERS
    title = f"OrthogonalShiftNetwork at {size} pixels, teacher {options.teacher}, on {what}"
    return title, {name: [value, "measured", about] for name, (value, about) in values.items()}


def stage_of(options: argparse.Namespace, folder: Path, cache: Path | None = None) -> Distillation:
    """Distillation of a random teacher, which is written into the folder."""
    torch.manual_seed(0)
    size, file = options.image_size, folder / "teacher.safetensors"
    if not file.exists():
        save(PerceptualMetric(TEACHERS[options.teacher](size), size, anchor=0.0, lipschitz=float("inf")), file)
    features = {"ViT-S/16": 384, "ViT-B/16": 768, "DreamSim ensemble": 1792}[options.teacher]
    small = {"grid": 8, "widths": (96, 192), "depths": (2, 2)}
    if size >= 128:
        small = {"grid": 28, "widths": (96, 192, 384), "depths": (2, 2, 2)}
    student = OrthogonalShiftNetwork(size, features, **small)
    return Distillation(file, student, cache=cache)


def kept_bytes(stage: Distillation, step: Callable[[], None]) -> int:
    """Bytes that a step keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def made_up(folder: Path, count: int, side: int) -> Path:
    """JPEG files with as much detail as photographs have, more or less."""
    for number in range(count):
        rng, image = np.random.default_rng(number), np.zeros((side, side, 3))
        for octave in range(2, 8):
            tiles = rng.normal(0, 1, (2**octave, 2**octave, 3)).clip(-3, 3)
            pixels = ((tiles + 3) / 6 * 255).astype(np.uint8)
            image += np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
        path = folder / "train" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image / image.max()).astype(np.uint8)).save(path, quality=90)
    return folder / "train"


def check(options: argparse.Namespace, folder: Path) -> str:
    """Processor time of steps of real trainings on one core each, against what the model says of them."""
    _, content = measure(options, folder)
    figures = Figures(**{name: value for name, (value, *_) in content.items()})
    source = folder / "check"
    images = made_up(source, 4 * 3 * options.batch, 256 if options.image_size > 64 else 64)
    shutil.copytree(images, source / "val")
    for path in list((source / "val" / "a").iterdir())[2:]:
        path.unlink()
    short_side = options.image_size
    cache_teacher(folder / "teacher.safetensors", source, folder / "cache", short_side=short_side, num_workers=0,
                  accelerator="cpu", shard_size=64)  # fmt: skip
    rows = [
        "| processes | teacher | batch | predicted, s | measured, s | error |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    # Batches that the figures were not measured at.
    for processes, batch in ((1, options.batch), (1, 3 * options.batch), (2, options.batch)):
        for cached in (False, True):
            stage = stage_of(options, folder, folder / "cache" if cached else None)
            data = ImageFolderData(source, options.image_size, short_side, batch_size=batch, num_workers=0)
            clock = clock_of(folder / "times.json")
            steps = max(4, options.rounds + 1)
            epochs = -(-steps * batch * processes // (12 * options.batch))
            alone = {} if processes == 1 else {"strategy": "ddp_fork"}
            lipsim.train(stage, data, directory=folder / "run", callbacks=[clock], max_epochs=epochs, devices=processes,
                         accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
                         enable_checkpointing=False, num_sanity_val_steps=0, **alone)  # fmt: skip
            times = json.loads((folder / "times.json").read_text(encoding="utf-8"))
            measured = statistics.median(times[1:])
            # Everything in one core, one after the other: a node of a core that reads while it does not compute.
            parts = cost(figures, Cluster(1, 1, 1e15, 1e15, 1e15), Run(processes, cached, False, batch)).parts
            predicted = parts["student"] + parts["teacher"] + parts["reading"]
            rows.append(
                f"| {processes} | {'cached' if cached else 'each step'} | {batch} | {predicted:.3f} | {measured:.3f} | "
                f"{100 * (predicted / measured - 1):+.0f} % |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    assert torch.get_num_threads() == options.threads
    return "\n".join(rows)


def clock_of(file: Path) -> Callback:
    """A callback that writes the processor time of every step, its batch read and collated, of the first process."""

    class Clock(Callback):
        times: list[float]

        def on_train_start(self, trainer: object, pl_module: object) -> None:
            self.times, self.last = [], time.process_time()

        def on_train_batch_end(self, trainer: object, *arguments: object) -> None:
            now = time.process_time()
            self.times.append(now - self.last)
            self.last = now

        def on_train_end(self, trainer: object, pl_module: object) -> None:
            if trainer.is_global_zero:
                file.write_text(json.dumps(self.times), encoding="utf-8")

    return Clock()
