"""What distilling on ImageNet costs on 1, 8 and 64 GPUs: a model of it, from figures of a single device.

    python benchmarks/scaling.py                                              # the figures of benchmarks/scaling.json
    python benchmarks/scaling.py --measure mine.json --device cuda --images FOLDER    # measure them on this machine
    python benchmarks/scaling.py --figures mine.json --gpus 4 16 --batch 64 --epochs 20
    python benchmarks/scaling.py --check --image-size 64                      # predictions against trainings, here

A step takes as long as the slowest of: what the GPU computes and then sends, what the cores of the node read, what its
disk gives. docs/scaling.md has the formulas, and how far predictions were from trainings. A file of figures has, for
each, its value, how it came about ("measured", "derived", "assumed", "given") and the source.

The model costs nothing; --measure 13 seconds at 64 pixels on a CPU core and more at 224; --check trains six times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from scaling_model import Cluster, Figures, Run, cost, load_figures

FIGURES = Path(__file__).with_suffix(".json")
GIGA = 1e9


def hours(seconds: float) -> str:
    """Hours with three digits that count."""
    return f"{seconds / 3600:,.3g}" if seconds < 999.5 * 3600 else f"{seconds / 3600:,.0f}"


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
        made: dict[str, None] = {}  # from files and from a pack, where that makes a difference
        for packed in sorted({run.packed for run in cached}):
            some = {run.gpus: cost(figures, cluster, run).caching for run in cached if run.packed == packed}
            made[", ".join(f"{hours(seconds)} h on {gpus}" for gpus, seconds in some.items())] = None
        lines.append(
            f"cache of embeddings: {cost(figures, cluster, cached[0]).cache / GIGA:.1f} GB; made in "
            f"{' GPUs from files, and from a pack in '.join(made)} GPUs, which is in the hours in all"
        )
    for packed in sorted({run.packed for run in runs}):
        run = next(run for run in runs if run.packed == packed)
        name = "pack" if packed else "files"
        lines.append(f"read in an epoch from {name}: {cost(figures, cluster, run).read_epoch / GIGA:,.0f} GB")
    most = max(runs, key=lambda run: run.gpus)
    lines.append(f"gradients: {4 * figures.parameters / 1e6:,.0f} MB; a GPU of {most.gpus} sends "
                 f"{cost(figures, cluster, most).sent / 1e6:,.0f} MB a step")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


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
        from scaling_measure import check, measure  # which need all of the package; the model needs nothing

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
    main()
