"""`lipsim attack-tables`: many metrics under the same attacks on the same triplets."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lipsim.cli.parser import budget
from lipsim.data import registry
from lipsim.evaluation.side_by_side import Metric, Settings, measure, tables
from lipsim.metric import PerceptualMetric, load
from lipsim.metric.deep_distances import DISTS, LPIPS
from lipsim.metric.distances import BASELINES
from lipsim.results import update_results
from lipsim.results.tables import latex_table, markdown_table, print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim attack-tables` takes."""
    parser.description = (
        "Natural and attacked 2AFC scores of exported metrics and of pixel l2, SSIM and MS-SSIM, each "
        "attack alone, the distances d(x, x + δ) that an attack reaches, and how attacks transfer. Writes tables.md, "
        "tables.tex and results.json (section attack_tables). LPIPS and DISTS join where their backbone's weights are "
        "given. A metric costs some hundreds of forward and backward passes over the triplets: minutes for "
        "the bundled one on two cores, far more for a ViT."
    )
    parser.add_argument("metrics", nargs="+", metavar="NAME=FILE", help="exported metrics of one image size")
    parser.add_argument("--data", choices=registry.DATA, default="builtin", help="triplets (%(default)s)")
    parser.add_argument("--root", type=user_path, help="folder of the data")
    parser.add_argument("--samples", type=int, default=200, help="how many triplets (%(default)s)")
    parser.add_argument("--eps", nargs="+", type=budget, default=list(Settings.eps), help="ℓ2 budgets of the suite")
    parser.add_argument("--one", type=budget, default=Settings.eps_alone, help="ℓ2 budget of the rest (%(default)s)")
    parser.add_argument("--linf", type=budget, default=Settings.linf, help="ℓ∞ budget of the suite (4/255)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of attacks with gradients (%(default)s)")
    parser.add_argument("--queries", type=int, default=Settings.queries, help="of Square (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="triplets at a time (%(default)s)")
    parser.add_argument("--lpips", type=user_path, metavar="FILE", help="torchvision's AlexNet weights; adds LPIPS")
    parser.add_argument("--dists", type=user_path, metavar="FILE", help="torchvision's VGG-16 weights; adds DISTS")
    parser.add_argument("--seed", type=int, default=1, help="of triplets and attacks (%(default)s)")
    parser.add_argument("--output", type=user_path, default=Path("attack-tables"), help="folder to write (%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for name in ("samples", "steps", "queries", "batch_size"):
        if getattr(options, name) < 1:
            raise LipsimError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
    metrics: dict[str, Metric] = {}
    for given in options.metrics:
        name, _, file = given.rpartition("=")
        metrics[name or Path(file).stem] = load(file)
    sizes = {metric.image_size for metric in metrics.values() if isinstance(metric, PerceptualMetric)}
    if len(sizes) > 1 or len(metrics) < len(options.metrics):
        raise LipsimError(f"expected metrics of different names and one image size, got {list(metrics)} at {sizes}")
    metrics |= BASELINES
    if options.lpips:
        metrics["LPIPS (AlexNet)"] = LPIPS("alex", options.lpips)
    if options.dists:
        metrics["DISTS"] = DISTS(options.dists)
    triplets = registry.sample_triplets(options.data, options.samples, sizes.pop(), options.root, options.seed)
    settings = Settings(
        eps=tuple(sorted(options.eps)),
        eps_alone=options.one,
        linf=options.linf,
        steps=options.steps,
        queries=options.queries,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    console = Console()
    with Progress("attacking") as progress:
        found = measure(metrics, triplets, settings, progress)
    update_results(options.output / "results.json", "attack_tables", {"data": options.data, **found})
    shown = tables(found, options.data)
    for title, rows in shown.items():
        print_table(console, rows, title)
    text = [part for title, rows in shown.items() for part in (f"{title}:", markdown_table(rows))]
    (options.output / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    title, rows = next(iter(shown.items()))
    latex = latex_table(rows, title, list(rows[0])[2:], "Score under attack")
    (options.output / "tables.tex").write_text(f"% \\usepackage{{booktabs,multirow}}\n\n{latex}\n", encoding="utf-8")
    console.print(f"tables.md, tables.tex and results.json are in {options.output}/")
    return 0
