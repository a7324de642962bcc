"""What the parts of benchmarks/device.py share: a figure, its table, and timing on any device."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

TOLERANCE = 1e-5  # of certificates, as a share of the largest of their kind


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        part: of the benchmark.
        case: what was measured.
        value: as it is printed; None where it was not.
        number: the value as a number, where it is one.
        unit: of that.
        ratio: times the baseline of the part, in the same run.
        passed: whether it is as it has to be; None where nothing has to be.
        note: what else there is to say.
    """

    part: str
    case: str
    value: str | None = None
    number: float | None = None
    unit: str = ""
    ratio: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        triplets: that are certified on the device and on the CPU.
        student_size: side of the images that students train on.
        student_batch: images of a training step.
        teacher: variant and number of blocks of the teacher; None: all.
        teacher_batch: images that it embeds at once.
        attacked: triplets that are attacked.
        attack_steps: of each attack.
        certified: images of a batch that is certified.
        gallery: items that are searched.
        steps: of the two trainings that are compared.
        rounds: of whatever is timed.
        test_seconds: for the tests.
    """

    triplets: int
    student_size: int
    student_batch: int
    teacher: tuple[str, int | None]
    teacher_batch: int
    attacked: int
    attack_steps: int
    certified: int
    gallery: int
    steps: int
    rounds: int
    test_seconds: int


SCALES = {
    "accelerator": Scale(16, 224, 32, ("ensemble", None), 128, 256, 50, 1024, 100_000, 60, 5, 150),
    "cpu": Scale(4, 64, 4, ("clip_vitb32", 2), 2, 8, 10, 32, 20_000, 20, 3, 240),
    "quick": Scale(2, 32, 2, ("clip_vitb32", 1), 1, 2, 2, 4, 200, 6, 1, 20),
}


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default the accelerator, and the CPU where there is none that can certify."""
    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type == "mps":
        say("Apple's GPUs have no float64, which every certificate is computed in; going on with the CPU")
        found = None
    return torch.device("cpu") if found is None else found


def synchronize(device: torch.device) -> None:
    """Wait for what the device was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(
    steps: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, least: float = 0.2
) -> dict[str, float]:
    """Median seconds of each step; they take turns, and a turn lasts for ``least`` seconds, a step at least.

    On a CPU it is the processor time of all threads, which other programs have no part in; elsewhere the clock, between
    two moments at which the device has nothing left to do.
    """
    now = time.process_time if device.type == "cpu" else time.perf_counter
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        step()  # compiles, allocates
        repeats[name] = max(1, round(least / max(_timed(step, device, now, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_timed(step, device, now, repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(step: Callable[[], object], device: torch.device, now: Callable[[], float], repeats: int) -> float:
    synchronize(device)
    start = now()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (now() - start) / repeats


def speeds(part: str, seconds: Mapping[str, float], count: int, unit: str, notes: Mapping[str, str]) -> list[Figure]:
    """Figures of what :func:`alternate` measured, ``count`` of something a step; the first is the baseline."""
    first = next(iter(seconds.values()))
    return [
        Figure(part, name, f"{count / value:,.4g}", count / value, unit, first / value, note=notes.get(name, ""))
        for name, value in seconds.items()
    ]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def markdown(figures: Iterable[Figure]) -> str:
    """One table of all figures."""
    rows = ["| part | case | figure | times the baseline | check | |", "| --- | --- | ---: | ---: | --- | --- |"]
    for figure in figures:
        verdict = {None: "", True: "passed", False: "**failed**"}[figure.passed]
        value = "not measured" if figure.value is None else f"{figure.value} {figure.unit}".strip()
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        rows.append(f"| {figure.part} | {figure.case} | {value} | {ratio} | {verdict} | {figure.note} |")
    return "\n".join(rows)
