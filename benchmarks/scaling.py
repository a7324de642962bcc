"""What distilling on ImageNet costs on 1, 8 and 64 GPUs: a model of it, from figures of a single device.

    python benchmarks/scaling.py                                              # the figures of benchmarks/scaling.json
    python benchmarks/scaling.py --measure mine.json --device cuda --images FOLDER    # measure them on this machine
    python benchmarks/scaling.py --figures mine.json --gpus 4 16 --batch 64 --epochs 20
    python benchmarks/scaling.py --check --image-size 64                      # predictions against trainings, here

A step takes as long as the slowest of: what the GPU computes and then sends, what the cores of the node read, what its
disk gives. docs/scaling.md has the formulas, and how far predictions were from trainings. A file of figures has, for
each, its value, how it came about ("measured", "derived", "assumed", "given") and the source.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from lipsim.training import Distillation

FIGURES = Path(__file__).with_suffix(".json")
GIGA = 1e9


@dataclass(frozen=True)
class Figures:
    """Of one GPU, one core and one image.

    Attributes:
        image_size: side of the images that the student sees.
        features: of the teacher, which the cache has.
        student_features: of the student, which may follow fewer (principal axes).
        parameters: of the student.
        teacher_parameters: of the teacher.
        step_seconds: of a training step, whatever its batch: the orthonormal maps, the optimizer.
        image_seconds: what each image of the batch adds, forward and backward, both views.
        teacher_seconds: an image takes in the teacher.
        step_bytes: a step keeps until its backward pass, whatever its batch.
        activation_bytes: what it keeps besides for each image, both views.
        reading_core_seconds: of one core, to read an image from its file.
        pack_core_seconds: the same from a pack.
        image_bytes: of a file.
        pack_bytes: of an image in a pack.
    """

    image_size: int
    features: int
    student_features: int
    parameters: int
    teacher_parameters: int
    step_seconds: float
    image_seconds: float
    teacher_seconds: float
    step_bytes: float
    activation_bytes: float
    reading_core_seconds: float
    pack_core_seconds: float
    image_bytes: float
    pack_bytes: float


@dataclass(frozen=True)
class Cluster:
    """What the nodes are like; rates in bytes a second.

    Attributes:
        gpus_per_node: GPUs of a node.
        cores_per_node: cores of a node that read images.
        disk: what a node reads.
        node_link: between the GPUs of a node, for each of them.
        network: between nodes, for each GPU.
    """

    gpus_per_node: int = 8
    cores_per_node: int = 128
    disk: float = 2e9
    node_link: float = 300e9
    network: float = 25e9


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        gpus: on how many.
        cached: whether the teacher's embeddings come from a cache.
        packed: whether images come from a pack.
        batch: images of one GPU in a step.
        images: of an epoch.
        epochs: number of them.
        views: embeddings of an image in the cache.
        dtype_bytes: of a number in it.
    """

    gpus: int
    cached: bool
    packed: bool
    batch: int = 32
    images: int = 1_281_167
    epochs: int = 40
    views: int = 2
    dtype_bytes: int = 2


@dataclass(frozen=True)
class Cost:
    """What the model says of a run; seconds and bytes.

    Attributes:
        step: seconds of a step.
        bound: what it waits for: "student", "teacher", "network", "reading" or "disk".
        parts: seconds of each of these in a step, were it alone.
        images_per_second: of all GPUs.
        epoch: seconds of an epoch.
        caching: seconds in which the same GPUs make the cache; 0 without one.
        run: seconds of all epochs, and of the cache.
        memory: bytes of one GPU: weights, gradients, Adam, activations, batch.
        read_epoch: bytes that are read in an epoch.
        read_node: bytes a second that a node reads.
        cache: bytes of the cache.
        sent: bytes that a GPU sends in a step: gradients, and features, since losses are those of the global batch.
    """

    step: float
    bound: str
    parts: dict[str, float]
    images_per_second: float
    epoch: float
    caching: float
    run: float
    memory: float
    read_epoch: float
    read_node: float
    cache: float
    sent: float


def cost(figures: Figures, cluster: Cluster, run: Run) -> Cost:
    """The model."""
    on_node, batch = min(run.gpus, cluster.gpus_per_node), run.batch
    read = figures.pack_core_seconds if run.packed else figures.reading_core_seconds
    size = figures.pack_bytes if run.packed else figures.image_bytes
    embedding = figures.features * run.dtype_bytes if run.cached else 0
    # A ring: each gradient goes around twice, but for one's own part; features of both views and targets once.
    gradients = 4 * figures.parameters
    sent = 2 * (run.gpus - 1) / run.gpus * gradients + (run.gpus - 1) * batch * 3 * 4 * figures.student_features
    parts = {
        "student": figures.step_seconds + batch * figures.image_seconds,
        "teacher": 0.0 if run.cached else batch * figures.teacher_seconds,
        "network": sent / (cluster.node_link if run.gpus <= cluster.gpus_per_node else cluster.network),
        "reading": batch * on_node * read / cluster.cores_per_node,
        "disk": batch * on_node * (size + embedding) / cluster.disk,
    }
    computed = {name: parts[name] for name in ("student", "teacher", "network")}
    step = max(sum(computed.values()), parts["reading"], parts["disk"])
    waits = computed if step == sum(computed.values()) else {name: parts[name] for name in ("reading", "disk")}
    epoch = run.images / (run.gpus * batch) * step
    caching = 0.0
    if run.cached:
        # An image is read once for all of its views.
        nodes = max(1, run.gpus / cluster.gpus_per_node)
        caching = run.images * max(
            run.views * figures.teacher_seconds / run.gpus,
            read / cluster.cores_per_node / nodes,
            size / cluster.disk / nodes,
        )
    weights = 16 * figures.parameters + (gradients if run.gpus > 1 else 0)  # DDP has a copy of the gradients to send
    activations = figures.step_bytes + batch * figures.activation_bytes
    teacher = 0 if run.cached else 4 * figures.teacher_parameters
    return Cost(
        step=step,
        bound=max(waits, key=lambda name: waits[name]),
        parts=parts,
        images_per_second=run.gpus * batch / step,
        epoch=epoch,
        caching=caching,
        run=run.epochs * epoch + caching,
        memory=weights + teacher + activations + batch * 3 * 4 * figures.image_size**2,
        read_epoch=run.images * (size + embedding),
        read_node=batch * on_node * (size + embedding) / step,
        cache=run.images * run.views * embedding,
        sent=sent,
    )


# --- figures


def load_figures(file: Path, case: str | None = None) -> tuple[str, Figures, dict[str, tuple[str, str]]]:
    """Title, figures, and of each how it came about and the source.

    A figure may also be its value alone, of which is said that it was given.

    Raises:
        OSError: there is no such file.
        ValueError: no such case, or figures that are missing, unknown or no numbers of at least 0.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not (isinstance(content, dict) and content):
        raise ValueError(f'expected {file} to be {{"title": …, "figures": {{…}}}}; --measure FILE writes one')
    if "figures" not in content:
        names = list(content)
        if (case or names[0]) not in content:
            raise ValueError(f"expected a case out of {', '.join(names)} of {file}, got {case}")
        content = content[case or names[0]]
    found, known = content.get("figures"), [field.name for field in fields(Figures)]
    if not isinstance(found, dict):
        raise ValueError(f"expected figures by name in {file}, got {found!r}; --measure FILE writes all figures")
    if missing := [name for name in known if name not in found]:
        raise ValueError(f"{file} has no {', '.join(missing)}; --measure FILE writes all figures")
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"{file} has figures that are unknown: {', '.join(unknown)}; they are {', '.join(known)}")
    # Value, how it came about, source; the last two may be left out.
    rows = {name: [*value, *("given", "")[len(value) - 1 :]] if isinstance(value := found[name], list) and value
            else [value, "given", ""] for name in known}  # fmt: skip
    values = {name: row[0] for name, row in rows.items()}
    if bad := [
        name for name, value in values.items() if not (isinstance(value, int | float) and 0 <= value < math.inf)
    ]:
        raise ValueError(f"expected figures of at least 0, got {bad[0]} = {values[bad[0]]} in {file}")
    if not (values["image_seconds"] and values["image_size"]):
        raise ValueError(f"expected an image_size and image_seconds above 0 in {file}: a step takes some time")
    return str(content.get("title", file.stem)), Figures(**values), {n: (row[1], row[2]) for n, row in rows.items()}


def hours(seconds: float) -> str:
    """Hours with three digits that count."""
    return f"{seconds / 3600:,.3g}" if seconds < 3.6e6 else f"{seconds / 3600:,.0f}"


def table(figures: Figures, cluster: Cluster, runs: Sequence[Run]) -> str:
    """Markdown, a row a run."""
    heading = [
        "GPUs",
        "teacher",
        "images",
        "images/s",
        "h an epoch",
        "h in all",
        "GPU hours",
        "GB a GPU",
        "MB/s a node",
    ]
    heading += ["bound by", "of the step"]
    lines = [f"| {' | '.join(heading)} |", "| ---: | --- | --- |" + " ---: |" * 6 + " --- | ---: |"]
    for run in runs:
        found = cost(figures, cluster, run)
        cells = [
            str(run.gpus), "cached" if run.cached else "each step", "pack" if run.packed else "files",
            f"{found.images_per_second:,.0f}", hours(found.epoch), hours(found.run), hours(found.run * run.gpus),
            f"{found.memory / GIGA:.1f}", f"{found.read_node / 1e6:,.0f}",
            found.bound, f"{100 * found.parts[found.bound] / found.step:.0f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(figures: Figures, cluster: Cluster, runs: Sequence[Run]) -> str:
    """What is the same in all rows, or too wide for the table."""
    lines = []
    cached = [run for run in runs if run.cached]
    if cached:
        lines.append(f"cache of embeddings: {cost(figures, cluster, cached[0]).cache / GIGA:.1f} GB; made in")
        for run in {run.gpus: run for run in cached}.values():
            lines[-1] += f" {hours(cost(figures, cluster, run).caching)} h on {run.gpus},"
        lines[-1] = lines[-1].rstrip(",") + " GPUs, which is in the hours in all"
    for packed in sorted({run.packed for run in runs}):
        run = next(run for run in runs if run.packed == packed)
        name = "pack" if packed else "files"
        lines.append(f"read in an epoch from {name}: {cost(figures, cluster, run).read_epoch / GIGA:,.0f} GB")
    most = max(runs, key=lambda run: run.gpus)
    lines.append(f"gradients: {4 * figures.parameters / 1e6:,.0f} MB; a GPU of {most.gpus} sends "
                 f"{cost(figures, cluster, most).sent / 1e6:,.0f} MB a step")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


# --- measuring


def measure(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, list[object]]]:
    """Title and figures of this machine: one device, one core."""
    import torch
    from distillation import TEACHERS
    from students import seconds

    from lipsim.data.pack import ImagePack
    from lipsim.data.packing import pack_images
    from lipsim.data.sets.folder import FolderImages
    from lipsim.data.transforms import CentralCrop, load_image

    device, size = torch.device(options.device), options.image_size
    stage = stage_of(options, folder).to(device)
    teacher = stage.teacher
    assert teacher is not None
    optimizer = stage.optimizer_factory([p for p in stage.parameters() if p.requires_grad])
    batches = {count: torch.rand(count, 3, size, size, device=device) for count in (options.batch, 2 * options.batch)}

    def step(count: int) -> Callable[[], None]:
        from lipsim.data.embeddings.folder import EmbeddedImages

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
    import torch
    from distillation import TEACHERS

    from lipsim import PerceptualMetric
    from lipsim.metric import save
    from lipsim.students import OrthogonalShiftNetwork
    from lipsim.training import Distillation

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
    import torch

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
    import numpy as np
    from PIL import Image

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


# --- checking


def check(options: argparse.Namespace, folder: Path) -> str:
    """Processor time of steps of real trainings on one core each, against what the model says of them."""
    import shutil

    import torch

    import lipsim
    from lipsim.datamodules import ImageFolderData
    from lipsim.training.teacher_cache import cache_teacher

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
    from lightning.pytorch import Callback

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


def main(args: Sequence[str] | None = None) -> None:
    """Print Markdown."""
    cluster, run = Cluster(), Run(1, False, False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="JSON file (%(default)s)")
    parser.add_argument("--case", help="of that file, where it has several (the first)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch", type=int, default=32, help="images of one GPU in a step (%(default)s)")
    parser.add_argument("--epochs", type=int, default=run.epochs, help="(%(default)s)")
    parser.add_argument("--count", type=int, default=run.images, help="images of an epoch (%(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=cluster.gpus_per_node, help="(%(default)s)")
    parser.add_argument("--cores", type=int, default=cluster.cores_per_node, help="of a node (%(default)s)")
    parser.add_argument("--disk", type=float, default=cluster.disk, help="bytes/s that a node reads (%(default)g)")
    parser.add_argument("--node-link", type=float, default=cluster.node_link, help="bytes/s of a GPU (%(default)g)")
    parser.add_argument("--network", type=float, default=cluster.network, help="bytes/s of a GPU (%(default)g)")
    parser.add_argument("--json", action="store_true", help="print all that the model says, as JSON")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure the figures here and write them")
    parser.add_argument("--check", action="store_true", help="compare predictions with trainings, here, on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--teacher", choices=("ViT-S/16", "ViT-B/16", "DreamSim ensemble"), default="ViT-S/16")
    parser.add_argument("--images", type=Path, help="folder whose files are read; without, JPEG files are made up")
    options = parser.parse_args(args)
    positive = ("gpus", "batch", "epochs", "count", "gpus_per_node", "cores", "disk", "node_link", "network")
    for name in positive:
        given = getattr(options, name)
        if not min(given if name == "gpus" else [given]) > 0:
            parser.error(f"expected --{name.replace('_', '-')} above 0, got {given}")
    if options.measure is not None or options.check:
        import torch

        torch.set_num_threads(options.threads)
        warnings.filterwarnings("ignore", message="You are trying to `self.log")
        with tempfile.TemporaryDirectory() as temporary:
            if options.check:
                print(check(options, Path(temporary)))
                return
            title, found = measure(options, Path(temporary))
        lines = ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in found.items())
        options.measure.write_text(f'{{"title": {json.dumps(title)}, "figures": {{\n{lines}\n}}}}\n', encoding="utf-8")
        options.figures = options.measure
    try:
        title, figures, sources = load_figures(options.figures, options.case)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cluster = Cluster(options.gpus_per_node, options.cores, options.disk, options.node_link, options.network)
    same = replace(run, batch=options.batch, epochs=options.epochs, images=options.count)
    runs = [
        replace(same, gpus=gpus, cached=cached, packed=packed)
        for gpus in options.gpus for cached in (False, True) for packed in (False, True)
    ]  # fmt: skip
    if options.json:
        print(json.dumps([{**asdict(run), **asdict(cost(figures, cluster, run))} for run in runs], indent=1))
        return
    print(f"{title}; {options.count:,} images, {options.epochs} epochs, batches of {options.batch} on each GPU\n")
    print(table(figures, cluster, runs) + "\n\n" + notes(figures, cluster, runs))
    print("\n| figure | value | | source |\n| --- | ---: | --- | --- |")
    for name, (kind, source) in sources.items():
        print(f"| {name} | {getattr(figures, name):.4g} | {kind} | {source} |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
