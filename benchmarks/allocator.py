"""What keeping freed memory is worth on a processor: ``python benchmarks/allocator.py``, three minutes on one core.

EfficientNet-Lite0 with random weights at 160 × 160 pixels and the default student at 224 × 224, batches of 48, one
thread, wall time. Each case is a fresh Python, since an allocator is of a whole process; cases take turns; the median
of each is compared with the first. The baseline is the process as it starts, with images in memory channel by channel.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from lipsim.students import OrthogonalShiftNetwork
from lipsim.teachers import BranchConfig
from lipsim.teachers.build import build_branch
from lipsim.utils.allocator import keep_freed_memory

# Case: whether freed memory is kept, and whether channels are innermost.
CASES = {"as it starts": (0, 0), "channels innermost": (0, 1), "memory kept": (1, 0), "both": (1, 1)}
BATCH, STEPS = 48, 3


def measure(keep: bool, channels_last: bool) -> dict[str, float]:
    """Images per second of each task, and the peak of the process in GiB."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    branch = build_branch(BranchConfig("efficientnet_lite0", "random"), 160).eval()
    student = OrthogonalShiftNetwork(224, 256)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def images(side: int) -> torch.Tensor:
        return torch.rand(BATCH, 3, side, side).contiguous(memory_format=layout)

    small, large = images(160), images(224)
    # Tokens of the teacher: the branch itself would choose the layout.
    found = {
        "teacher, embedding": _speed(branch.tokens, branch, small, train=False),
        "teacher, training step": _speed(branch.tokens, branch, small, train=True),
        "default student, training step": _speed(student, student, large, train=True),
    }
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _speed(
    function: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, images: torch.Tensor, train: bool
) -> float:
    module.train(train)

    def step() -> None:
        with torch.set_grad_enabled(train):
            features = function(images)
        if train:
            features.square().mean().backward()

    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * len(images) / (time.perf_counter() - start)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is started (%(default)s)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*map(bool, CASES[options.case]))))
        return
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(options.rounds):
        for case in CASES:
            command = [sys.executable, __file__, "--case", case]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[case].append(json.loads(run.stdout))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    medians = {
        case: {name: statistics.median(r[name] for r in runs) for name in runs[0]} for case, runs in found.items()
    }
    first = medians["as it starts"]
    tasks = [name for name in first if name != "peak"]
    print("| case | " + " | ".join(f"{name}, images/s | times the first" for name in tasks) + " | peak, GiB |")
    print("| --- |" + " ---: |" * (2 * len(tasks) + 1))
    for case, median in medians.items():
        cells = [f"{median[name]:.0f} | {median[name] / first[name]:.2f}" for name in tasks]
        print(f"| {case} | " + " | ".join(cells) + f" | {median['peak']:.2f} |")


if __name__ == "__main__":
    main()
