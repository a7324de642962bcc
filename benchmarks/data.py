"""How fast images are read: files, a pack of them, and a pack streamed by litdata.

    python benchmarks/data.py --images FOLDER [--size 224] [--count 512] [--rounds 5] [--output FILE.json]

Packs what it reads into a temporary folder. Each row reads the same images in the same random order and ends with
``(3, S, S)`` float32 tensors in [0, 1], or with uint8 where it says eight bits, a quarter of the bytes; rows take
turns. Images a second are of processor time of one thread, medians over rounds, from the page cache of the system.
Behind them is how many GPUs that each take 1,000 images a second a node of so many cores can feed, when every core does
nothing else. A first reading from the disk, and batches from a loader with one process, are on the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader

from lipsim.data.pack import ImagePack
from lipsim.data.packing import pack_images
from lipsim.data.sets.folder import FolderImages, list_images
from lipsim.data.transforms import CentralCrop, Preprocess, load_image
from lipsim.utils.files import write_text

GPU = 1000  # images a second
BATCH = 64
Read = Callable[[int], torch.Tensor]
ReadAll = Callable[[np.ndarray], None]


def one_by_one(read: Read) -> ReadAll:
    """Read images that nobody keeps."""

    def read_all(order: np.ndarray) -> None:
        for index in order.tolist():
            read(index)

    return read_all


def in_batches(read: Read) -> ReadAll:
    """Read batches, as a process of a DataLoader makes them."""

    def read_all(order: np.ndarray) -> None:
        for start in range(0, len(order), BATCH):
            torch.stack([read(index) for index in order[start : start + BATCH].tolist()])

    return read_all


def measure(rows: dict[str, ReadAll], order: np.ndarray, rounds: int) -> dict[str, float]:
    """Images a second of processor time of each row, medians; rows take turns, the first of which is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(-1, rounds):
        for name, read_all in rows.items():
            start = time.process_time()
            read_all(order)
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: len(order) / statistics.median(values) for name, values in seconds.items()}


def from_disk(files: list[Path], read: Callable[[], object]) -> float:
    """Seconds on the clock of a reading after the system has let go of what it had of the files."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # elsewhere the row is one of the page cache
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def from_loader(images: FolderImages, batches: int = 40) -> float:
    """Images a second on the clock from a loader with one process, without its start."""
    repeats = -(-(batches + 1) * BATCH // len(images))
    loader = DataLoader(ConcatDataset([images] * repeats), BATCH, num_workers=1, drop_last=True)
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * BATCH / (time.perf_counter() - start)


def main(args: Sequence[str] | None = None) -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--size", type=int, default=224, help="side of the images (%(default)s)")
    parser.add_argument("--count", type=int, default=512, help="images that are read (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each row reads them (%(default)s)")
    parser.add_argument("--cores", type=int, nargs="+", default=[8, 32, 128], help="of a node (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file with the figures")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        names = list_images(options.images).names
        chosen = np.sort(np.random.default_rng(0).permutation(len(names))[: options.count])
        files = [root / "images" / os.fsdecode(bytes(names[i])) for i in chosen]
        for i, file in zip(chosen, files, strict=True):  # so that packs have what is read and no more
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((options.images / os.fsdecode(bytes(names[i]))).read_bytes())
        size, order = options.size, np.random.default_rng(1).permutation(len(files))
        packed = pack_images(root / "images", root / "whole", size, num_workers=0)
        pack_images(root / "images", root / "crop", size, frame="crop", short_side=size, num_workers=0)
        shards = sorted((root / "whole").glob("*.bin"))
        # First, since pages that a process has mapped stay in memory.
        decode = one_by_one(lambda i: load_image(files[i], Preprocess(size)))
        disk = {
            "files, Preprocess, float": from_disk(files, lambda: decode(order)),
            "pack": from_disk(shards, lambda: one_by_one(ImagePack(root / "whole").image)(order)),
        }
        stored = {"files": sum(file.stat().st_size for file in files), "pack": packed.size}
        whole, crop = ImagePack(root / "whole"), ImagePack(root / "crop")
        central = CentralCrop(size, size)
        rows = {
            "files, Preprocess, float": decode,
            "files, Preprocess, pil": one_by_one(lambda i: load_image(files[i], Preprocess(size, "pil"))),
            "files, CentralCrop": one_by_one(lambda i: load_image(files[i], central)),
            f"files, CentralCrop, batches of {BATCH}": in_batches(lambda i: load_image(files[i], central)),
            "pack": one_by_one(whole.image),
            f"pack, batches of {BATCH}": in_batches(crop.image),
            f"pack, batches of {BATCH} in eight bits": in_batches(lambda i: torch.from_numpy(crop.pixels(i))),
        }
        if importlib.util.find_spec("litdata") is not None:
            import litdata

            stream = litdata.StreamingDataset(str(root / "whole"))
            shape = (3, size, size)

            def streamed(i: int) -> torch.Tensor:
                return torch.frombuffer(bytearray(stream[i]), dtype=torch.uint8).reshape(shape).float() / 255

            rows["pack, read through litdata"] = one_by_one(streamed)
        speeds = measure(rows, order, options.rounds)
        first = next(iter(speeds.values()))
        batches = {"float32": BATCH * 12 * size * size, "eight bits": BATCH * 3 * size * size}
        print(f"{len(files)} images of {options.images.name} at {size} pixels; GPUs that take {GPU:,} images/s each")
        heading = "".join(f" GPUs fed by {cores} cores |" for cores in options.cores)
        print(f"\n| read from | images/s of one core | times the first |{heading}")
        print("| --- | ---: | ---: |" + " ---: |" * len(options.cores))
        for name, speed in speeds.items():
            gpus = "".join(f" {speed * cores / GPU:.1f} |" for cores in options.cores)
            print(f"| {name} | {speed:,.0f} | {speed / first:.1f} |{gpus}")
        print("\n| after the page cache was dropped | images/s on the clock | bytes an image |\n| --- | ---: | ---: |")
        for name, seconds in disk.items():
            print(f"| {name} | {len(files) / seconds:,.0f} | {stored[name.split(',')[0]] / len(files):,.0f} |")
        print(
            f"\nA batch of {BATCH}: " + ", ".join(f"{total / 1e6:.1f} MB in {name}" for name, total in batches.items())
        )
        print(f"\n| a loader with one process, batches of {BATCH} | images/s on the clock |\n| --- | ---: |")
        kinds = {"float32": False, "eight bits": True}
        loaded: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, eight_bit in kinds.items():
                packed_images = FolderImages(root / "crop", size, short_side=size, eight_bit=eight_bit)
                loaded[name].append(from_loader(packed_images))
        for name, values in loaded.items():
            print(f"| pack, {name} | {statistics.median(values):,.0f} |")
        if options.output is not None:
            content = {
                "images": options.images.name, "count": len(files), "size": size, "per_core": speeds,
                "from_disk": {name: len(files) / seconds for name, seconds in disk.items()},
                "loader": {name: statistics.median(values) for name, values in loaded.items()},
                "bytes": {name: total / len(files) for name, total in stored.items()},
            }  # fmt: skip
            write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
