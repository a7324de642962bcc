"""What using a metric costs: distances beside LPIPS and DreamSim, one command beside `import torch`, search.

    python benchmarks/use.py [--only distances start search] [--rounds 5]

Distances: pairs of photographs a second of the bundled metric against LPIPS with AlexNet and the DreamSim ensemble,
each at its own size and with random weights, whose values do not matter to time, at batches of 1 and 32. LPIPS takes
any size: 224 is its backbone's, 64 that of the patches it was trained on. Start: `lipsim distance A B` from the shell
to its end against `python -c "import torch"`. Search: 100,000 embeddings with the radius of every rank against the
plain matrix product (benchmarks/use_search.py). One thread; what is compared takes turns, a ratio is the median over
rounds of the ratio within the round. About five minutes of one core, nearly all of them DreamSim's; wants a quiet
machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import alexnet

sys.path.insert(0, str(Path(__file__).parent))
from use_search import QUERIES, search_ratio

import lipsim
from lipsim.data.builtin.photographs import load_photograph
from lipsim.metric import PerceptualMetric
from lipsim.metric.deep_distances import FILES, LPIPS
from lipsim.teachers import DreamSim

BATCHES = (1, 32)
NAMES = ("astronaut", "chelsea", "coffee", "rocket")
CASES = ("distances", "start", "search")
_LONGEST = 60.0  # seconds of one part


def main() -> None:
    """Print the tables that the options choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in options.only:
        {"distances": _distances, "start": _start, "search": _search}[case](options.rounds)


@torch.no_grad()
def _distances(rounds: int) -> None:
    metric = lipsim.load()
    dreamsim = PerceptualMetric(DreamSim(weights="random"), 224, anchor=0.0, lipschitz=float("inf")).eval()
    lpips = _random_lpips()
    size = metric.image_size
    cases: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
        f"lipsim, the bundled metric, {size} px": (metric, size),
        "LPIPS (AlexNet), 64 px": (lpips, 64),
        "LPIPS (AlexNet), 224 px": (lpips, 224),
        "DreamSim ensemble, 224 px": (dreamsim, 224),
    }
    print("| metric | batch | distances/s | the bundled metric is faster by |\n| --- | ---: | ---: | ---: |")
    for batch in BATCHES:
        parts = {}
        for name, (distance, side) in cases.items():
            x = photographs(batch, side)
            y = x.roll(1, 0) if batch > 1 else photographs(2, side)[1:]
            parts[name] = lambda distance=distance, x=x, y=y: distance(x, y)
        seconds = alternate(parts, rounds)
        own = next(iter(seconds.values()))
        for name, values in seconds.items():
            ratio = statistics.median(value / ours for value, ours in zip(values, own, strict=False))
            print(f"| {name} | {batch} | {batch / statistics.median(values):.3g} | {ratio:.3g} |", flush=True)


def photographs(count: int, size: int) -> Tensor:
    """Different parts of photographs, ``(N, 3, S, S)``: random images all look alike to a metric of photographs."""
    draw = torch.Generator().manual_seed(0)
    parts = []
    for number in range(count):
        image = torch.from_numpy(load_photograph(NAMES[number % len(NAMES)]).copy()).permute(2, 0, 1)
        top, left = (int(torch.randint(side - 255, (), generator=draw)) for side in image.shape[1:])
        parts.append(image[:, top : top + 256, left : left + 256])
    return F.interpolate(torch.stack(parts), (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def _random_lpips() -> LPIPS:
    """LPIPS as the package loads it, from a file of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(alexnet(weights=None).state_dict(), Path(folder, FILES["alex"]))
        return LPIPS("alex", folder)


def _start(rounds: int) -> None:
    from PIL import Image  # this case alone writes images

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.png") for name in ("astronaut", "coffee")]
        for file in files:
            Image.fromarray((255 * load_photograph(file.stem)).round().astype("uint8")).resize((256, 256)).save(file)
        program = Path(sys.executable).with_name("lipsim")
        commands = {
            'python -c "import torch"': [sys.executable, "-c", "import torch"],
            "lipsim distance A B": [str(program), "distance", *map(str, files)],
        }
        parts = {
            name: lambda command=command: subprocess.run(command, env=environment, check=True, capture_output=True)
            for name, command in commands.items()
        }
        seconds = alternate(parts, rounds)
    print("\n| command | seconds | ratio |\n| --- | ---: | ---: |")
    own = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, own, strict=False))
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} |", flush=True)


def _search(rounds: int) -> None:
    found = search_ratio(rounds=3 * rounds)
    print("\n| queries | matrix product, ms | search with certificates, ms | ratio |\n| ---: | ---: | ---: | ---: |")
    for count in QUERIES:
        product, search = (1000 * found[f"{name}_{count}"] for name in ("product", "search"))
        print(f"| {count} | {product:.1f} | {search:.1f} | {found[f'ratio_{count}']:.2f} |", flush=True)


def alternate(parts: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round, after one that does not count; in a round each runs for 0.2 s at least.

    Who has run for a minute leaves the later rounds to the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    spent = dict.fromkeys(parts, 0.0)
    for round_number in range(rounds + 1):
        for name, part in parts.items():
            if seconds[name] and spent[name] > _LONGEST:
                continue
            times = 0
            start = time.perf_counter()
            while not times or time.perf_counter() - start < 0.2:
                part()
                times += 1
            elapsed = time.perf_counter() - start
            spent[name] += elapsed
            if round_number:
                seconds[name].append(elapsed / times)
                print(f"{name}: round {round_number} of {rounds}", file=sys.stderr, flush=True)
    return seconds


if __name__ == "__main__":
    main()
