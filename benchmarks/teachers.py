"""Throughput of teachers with random weights, and the memory that tuning them takes.

    python benchmarks/teachers.py                              # the DreamSim ensemble on one core
    python benchmarks/teachers.py --device cuda --batch 256    # images/s of a GPU
    python benchmarks/teachers.py --tuning --batch 3           # what LoRA tuning keeps for its backward pass

The first case is the baseline: float32, attention as two products and a softmax, as the original code has it. Times are
processor time on CPUs and wall time on GPUs, as in students.py; cases take turns. The last column is the largest cosine
distance between an embedding and the baseline's, on random images. The second table counts the tensors that a training
step keeps, weights left out, which does not depend on the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from students import seconds

from lipsim.teachers import DreamSim
from lipsim.teachers.catalogue import VARIANTS
from lipsim.training import Acceleration, TeacherTuning

# Name, fused attention, bf16, images at a time, compiled.
CASES = [
    ("plain float32 loop", False, False, None, False),
    ("plain, one image at a time", False, False, 1, False),
    ("fused attention", True, False, None, False),
    ("bf16", False, True, None, False),
    ("fused attention, bf16", True, True, None, False),
    ("fused attention, bf16, compile", True, True, None, True),
]


def embedding(
    teacher: DreamSim, images: Tensor, fused: bool, bf16: bool, chunk: int | None, compiled: bool
) -> Callable[[], Tensor]:
    """A function that embeds the images in the way of a case."""
    run = torch.compile(teacher) if compiled else teacher

    def step() -> Tensor:
        for module in teacher.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            return torch.cat([run(part) for part in images.split(chunk or len(images))])

    return step


def throughput_table(teacher: DreamSim, images: Tensor, options: argparse.Namespace) -> str:
    """Images a second of each case."""
    steps = {name: embedding(teacher, images, *how) for name, *how in CASES if options.compile or "compile" not in name}
    embeddings = {name: step() for name, step in steps.items()}  # warms up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, images.device))
    median = {name: statistics.median(values) for name, values in times.items()}
    first = CASES[0][0]
    rows = ["| case | images/s | times the first | cosine distance |", "| --- | ---: | ---: | ---: |"]
    for name, time in median.items():
        distance = max(0.0, float((1 - (embeddings[name] * embeddings[first]).sum(1)).max()))
        rows.append(f"| {name} | {len(images) / time:.2f} | {median[first] / time:.2f} | {distance:.1e} |")
    return "\n".join(rows)


def kept(module: TeacherTuning, images: Tensor, bf16: bool, checkpoint: bool) -> int:
    """Bytes of activations that the forward pass of a training step keeps for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    run = Acceleration(checkpoint=checkpoint).wrap(module.train().metric.encoder)
    precision = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        run(images)
    return sum(sizes.values())


def tuning_table(teacher: DreamSim, images: Tensor) -> str:
    """Memory of LoRA tuning by image."""
    module = TeacherTuning(teacher, tune="lora")
    trained, total = (
        sum(p.numel() for p in module.parameters() if p.requires_grad or every) for every in (False, True)
    )
    rows = [
        f"{trained:,} of {total:,} parameters are trained.\n",
        "| tuning with LoRA | kept for an image | for 16 triplets |",
        "| --- | ---: | ---: |",
    ]
    for name, bf16, checkpoint in (
        ("float32", False, False),
        ("bf16", True, False),
        ("float32, checkpoint", False, True),
        ("bf16, checkpoint", True, True),
    ):
        # By difference: under autocast, converted weights are kept besides, once for all images.
        one, all_ = (kept(module, part, bf16, checkpoint) for part in (images[:1], images))
        size = (all_ - one) / (len(images) - 1)
        rows.append(f"| {name} | {size / 2**20:.0f} MiB | {48 * size / 2**30:.1f} GiB |")
    return "\n".join(rows)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="ensemble", choices=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also the compiled case, slow to begin with")
    parser.add_argument("--tuning", action="store_true", help="memory of LoRA tuning in place of throughput")
    parser.add_argument("--depth", type=int, help="blocks, instead of the published 12")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    small = {} if options.depth is None else {"depth": options.depth}
    teacher = DreamSim(options.variant, "random", options=small).to(device).eval().requires_grad_(False)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    print(
        f"torch {torch.__version__}, {options.device} ({hardware}), DreamSim {options.variant}, batch {options.batch}\n"
    )
    images = torch.rand(options.batch, 3, teacher.image_size, teacher.image_size, device=device)
    print(tuning_table(teacher, images) if options.tuning else throughput_table(teacher, images, options))


if __name__ == "__main__":
    main()
