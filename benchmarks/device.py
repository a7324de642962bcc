"""Everything that depends on the device, in one command: certificates, training, speed and memory, with verdicts.

    python benchmarks/device.py [--device cuda] [--only certificates …] [--markdown FILE] [--json FILE]

On the accelerator that torch finds, or with smaller sizes on the CPU where there is none (Apple's GPUs have no float64,
and nothing is certified on them). Nothing is downloaded and no data set is needed. Parts:

    tests          the tests of the numerical rooms, which run on the CPU, of as many rooms as fit in their time
    certificates   radii, distances, thresholds, ranks, pixels, smoothing's counts, segments and tiles of the bundled
                   metrics and of a random student of each family, against the CPU's, with TF32 and autocast set in 15
                   ways: they have to agree to 1e-5 of the largest value of their kind
    precision      training in bf16 and with torch.compile: the loss of float32, maps as orthonormal, the same bound
    processes      two processes train and certify as one: nccl on two GPUs, gloo on a CPU
    train          images/s of a training step, and memory, beside the published network
    teacher        images/s of DreamSim's ensemble, beside the original way
    attack         triplets/s of PGD and APGD, beside the published way
    certification  triplets/s, beside the forward passes
    search         queries/s, beside the product of matrices
    compile        torch.compile of the metric

Costs, meant: under eight minutes on one large GPU, which was not tried; measured on two CPU cores: 269 s, 186 of them
for the tests. Speed is the clock's on an accelerator and the processor time of all threads on a CPU; ratios are within
this run. Progress goes to stderr, one table to stdout. Exit status 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from device_checks import arithmetic_figures, certificate_figures
from device_figures import SCALES, Figure, Scale, choose_device, markdown, say
from device_speed import (
    attack_figures,
    certification_figures,
    compile_figures,
    search_figures,
    teacher_figures,
    training_figures,
)
from device_training import precision_figures, processes_figures

from lipsim.results.environment import commit, versions
from lipsim.utils.files import write_text

ROOT = Path(__file__).parents[1]
ROOMS = ("audit", "students", "certificates", "layers", "attacks", "metric")
Part = Callable[[torch.device, Scale], Iterator[Figure]]


def test_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """Passed, failed and skipped tests of each room, until the time is over."""
    end = time.monotonic() + scale.test_seconds
    for room in ROOMS:
        left = end - time.monotonic()
        if left < 5 or not (ROOT / "tests" / room).is_dir():
            yield Figure("tests", room, note="no time left" if left < 5 else "no tests here")
            continue
        say(f"tests of {room}")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            run = subprocess.run(
                [*command, *_parallel(), f"tests/{room}"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            yield Figure("tests", room, note=f"not done in the {left:.0f} s that were left")
            continue
        if "No module named pytest" in run.stderr:
            yield Figure("tests", room, note="pytest is not installed")
            continue
        counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout)}
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or run.stderr.strip()[-100:]
        yield Figure("tests", room, text, counts.get("passed"), passed=run.returncode == 0)


def _parallel() -> list[str]:
    """Options of pytest for as many processes as there are cores; without its plugin, that it is not to ask for it."""
    cores = os.cpu_count() or 1
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode:
        return ["-o", "addopts=--import-mode=importlib"]  # pyproject.toml has options of the plugin, too
    return ["-n", str(min(cores, 16))] if cores > 2 else []


PARTS: dict[str, tuple[Part, ...]] = {
    "certificates": (certificate_figures, lambda device, scale: arithmetic_figures(device)),
    "precision": (precision_figures,),
    "processes": (processes_figures,),
    "train": (training_figures,),
    "teacher": (teacher_figures,),
    "attack": (attack_figures,),
    "certification": (certification_figures,),
    "search": (search_figures,),
    "compile": (compile_figures,),
    "tests": (test_figures,),
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "device": accelerator,
        "memory": memory,
        "devices": torch.accelerator.device_count() if device.type != "cpu" else 0,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "commit": commit(),
    }


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="such as cuda, cuda:1, cpu; default: what torch finds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: does it run? Figures say nothing then")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--json", type=Path, help="file for machine, versions and every figure")
    options = parser.parse_args(args)
    device = choose_device(options.device)
    scale = SCALES["quick" if options.quick else "cpu" if device.type == "cpu" else "accelerator"]
    about, start = machine(device), time.monotonic()
    title = f"{about['device']}, {about['cores']} cores, torch {about['versions']['torch']}, commit {about['commit']}"
    say(title)
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    try:
        for name in PARTS:
            if name not in options.only:
                continue
            began = time.monotonic()
            for run in PARTS[name]:
                figures += run(device, scale)
            seconds[name] = time.monotonic() - began
            say(f"{name}: {seconds[name]:.0f} s, {time.monotonic() - start:.0f} s in all")
    finally:  # a part that breaks off does not cost the others their figures
        table = f"{title}; {time.monotonic() - start:.0f} s\n\n{markdown(figures)}\n"
        print(table)
        if options.markdown is not None:
            write_text(options.markdown, table)
        if options.json is not None:
            content = {"machine": about, "seconds": seconds, "figures": [asdict(figure) for figure in figures]}
            write_text(options.json, json.dumps(content, indent=1) + "\n")
    failed = [f"{figure.part}: {figure.case}" for figure in figures if figure.passed is False]
    say(f"failed: {'; '.join(failed)}" if failed else "every check passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
