"""Speed and memory of the students, as ratios to the published small network implemented as its formulas read.

    python benchmarks/students.py [--device cuda] [--threads 1] [--batch 8] [--rounds 3]

Every round runs one step of each case in turn, so that a slow moment of the machine meets all of them; a time is the
median of the rounds, on a CPU the processor time of all threads. Peak memory is that of the step alone, each case in a
process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parent))
from published import PlainConvolutions, PublishedNetwork

from lipsim.layers import freeze
from lipsim.students import OrthogonalShiftNetwork, SLLNetwork
from lipsim.training.acceleration import Acceleration


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    name: str
    make: Callable[[int], nn.Module]
    bf16: bool = False
    acceleration: Acceleration | None = None
    frozen: bool = False


def _published(size: int) -> nn.Module:
    return PublishedNetwork(size)


def _small(size: int) -> nn.Module:
    return SLLNetwork.from_preset("small", size)


def _default(size: int) -> nn.Module:
    return OrthogonalShiftNetwork(image_size=size, out_features=1792)


FAST = Acceleration(channels_last=True)
TRAINING = [
    Case("published small", _published),
    Case("published small, channels_last", _published, acceleration=FAST),
    Case("published small, bf16", _published, bf16=True),
    Case("SLLNetwork small", _small),
    Case("SLLNetwork small, channels_last", _small, acceleration=FAST),
    Case("SLLNetwork small, channels_last, checkpoint", _small, acceleration=Acceleration(True, checkpoint=True)),
    Case("SLLNetwork small, channels_last, compile", _small, acceleration=Acceleration(True, compile=True)),
    Case("SLLNetwork small, bf16", _small, bf16=True),
    Case("SLLNetwork small, bf16, channels_last", _small, bf16=True, acceleration=FAST),
    Case("default student", _default),
    Case("default student, channels_last", _default, acceleration=FAST),
    Case("default student, bf16", _default, bf16=True),
    Case("default student, compile", _default, acceleration=Acceleration(compile=True)),
    Case("ResNet-50", lambda _: resnet50(num_classes=1792)),
]
INFERENCE = [
    Case("plain convolutions", PlainConvolutions),
    Case("published small", _published),
    Case("SLLNetwork small, frozen", _small, frozen=True),
    Case("plain convolutions, channels_last", PlainConvolutions, acceleration=FAST),
    Case("SLLNetwork small, frozen, channels_last", _small, acceleration=FAST, frozen=True),
    Case("default student, frozen", _default, frozen=True),
]


def training_step(case: Case, size: int, images: Tensor) -> Callable[[], None]:
    """Forward, RMSE to constant targets, backward and Adam, as distillation does."""
    torch.manual_seed(0)
    network = case.make(size).to(images.device).train()
    run = (case.acceleration or Acceleration()).wrap(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.5, 0.9))

    def step() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=case.bf16):
            features = run(images)
        loss = (features.float() - 1).square().mean(1).sqrt().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference_step(case: Case, size: int, images: Tensor) -> Callable[[], None]:
    """A forward pass without gradients."""
    torch.manual_seed(0)
    network = case.make(size).to(images.device).eval()
    if case.frozen:
        freeze(network)
    run = (case.acceleration or Acceleration()).wrap(network)

    def step() -> None:
        with torch.no_grad():
            run(images)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Time of one step: processor time of all threads, which other processes do not change, or a GPU's wall time."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(options: argparse.Namespace) -> int:
    """Bytes that a second step of one case takes above what the process held before the first."""
    images, device = _images(options)
    case = next(case for case in TRAINING if case.name == options.memory_of)
    step = training_step(case, options.image_size, images)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
        before = _resident("VmRSS")
    step()
    step()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    """Resident size of this process in bytes: now (VmRSS), or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def table(cases: list[Case], make: Any, options: argparse.Namespace, memory: bool) -> str:
    """Time all cases in turn; one markdown row each, ratios to the first."""
    images, device = _images(options)
    steps = {case.name: make(case, options.image_size, images) for case in cases}
    for step in steps.values():
        step()  # compiles, allocates
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    first = median[cases[0].name]
    rows = ["| case | images/s | times the first |", "| --- | ---: | ---: |"]
    if memory:
        rows = ["| case | images/s | times the first | peak memory |", "| --- | ---: | ---: | ---: |"]
    for case in cases:
        row = f"| {case.name} | {options.batch / median[case.name]:.2f} | {first / median[case.name]:.2f} |"
        if memory:
            command = [sys.executable, __file__, "--memory-of", case.name]
            shared = ["--device", options.device, "--threads", str(options.threads)]
            sizes = ["--batch", str(options.batch), "--image-size", str(options.image_size)]
            output = subprocess.run([*command, *shared, *sizes], capture_output=True, text=True, check=True).stdout
            row += f" {json.loads(output.splitlines()[-1]) / 2**30:.2f} GiB |"
        rows.append(row)
    return "\n".join(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose names match this expression, besides the first")
    parser.add_argument("--skip", help="leave out cases whose names match this expression")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options))
        return
    chosen = [[cases[0], *(case for case in cases[1:] if _wanted(case, options))] for cases in (TRAINING, INFERENCE)]
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, batch {options.batch}\n")
    print(table(chosen[0], training_step, options, memory=True), end="\n\n")
    print(table(chosen[1], inference_step, options, memory=False))


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    return bool(re.search(options.only, case.name)) and not (options.skip and re.search(options.skip, case.name))


def _images(options: argparse.Namespace) -> tuple[Tensor, torch.device]:
    device = torch.device(options.device)
    return torch.rand(options.batch, 3, options.image_size, options.image_size, device=device), device


if __name__ == "__main__":
    main()
