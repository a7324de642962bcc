"""`lipsim attack-tables`: many metrics under the same attacks on the same triplets."""

from __future__ import annotations

import argparse

from rich.console import Console

from lipsim.cli.parser import budget, named_file, natural_int, output_folder, positive_int, refuse_wide_linf
from lipsim.data import registry
from lipsim.evaluation.side_by_side import Settings, attack_tables, load_metrics
from lipsim.results.tables import print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim attack-tables student=runs/m.safetensors quickstart --samples 50",
    "lipsim attack-tables quickstart --eps 36/255 108/255 --output tables",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim attack-tables` takes."""
    parser.description = (
        "Natural and attacked 2AFC scores of exported metrics and of pixel l2, SSIM and MS-SSIM, each "
        "attack alone, the distances d(x, x + δ) that an attack reaches, and how attacks transfer. Writes tables.md, "
        "tables.tex and results.json (section attack_tables). LPIPS and DISTS join where their backbone's weights are "
        "given. A metric costs some hundreds of forward and backward passes over the triplets: minutes for "
        "the bundled one on two cores, far more for a ViT."
    )
    parser.add_argument(
        "metrics", nargs="+", type=named_file, metavar="NAME=FILE", help="exported metrics of one image size"
    )
    parser.add_argument("--data", choices=registry.DATA, default="builtin", help="triplets (%(default)s)")
    parser.add_argument("--root", type=user_path, help="folder of the data")
    parser.add_argument(
        "--division",
        nargs="+",
        type=_division,
        default=[],
        metavar="NAME=NUMBER",
        help="how a training has divided Material, where not by the defaults seed=0 num_triplets=2000 "
        "num_materials=20: else triplets are attacked that it has seen",
    )
    parser.add_argument("--samples", type=positive_int, default=200, help="how many triplets (%(default)s)")
    parser.add_argument("--eps", nargs="+", type=budget, default=list(Settings.eps), help="ℓ2 budgets of the suite")
    parser.add_argument(
        "--alone-eps",
        type=budget,
        default=Settings.alone_eps,
        help="ℓ2 budget of each attack alone, of distances and of transfer (%(default)s)",
    )
    parser.add_argument("--linf", type=budget, default=Settings.linf, help="ℓ∞ budget of the suite (4/255)")
    parser.add_argument("--steps", type=positive_int, default=Settings.steps, help="of gradient attacks (%(default)s)")
    parser.add_argument("--queries", type=positive_int, default=Settings.queries, help="of Square (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=Settings.batch_size, help="triplets at a time (64)")
    parser.add_argument("--lpips", type=user_path, metavar="FILE", help="torchvision's AlexNet weights; adds LPIPS")
    parser.add_argument("--dists", type=user_path, metavar="FILE", help="torchvision's VGG-16 weights; adds DISTS")
    parser.add_argument("--seed", type=int, default=1, help="of triplets and attacks (%(default)s)")
    parser.add_argument("--output", type=output_folder, default="attack-tables", help="folder to write (%(default)s)")
    parser.set_defaults(run=_run)


def _division(text: str) -> tuple[str, int]:
    """``NAME=NUMBER`` of :func:`lipsim.data.sets.material.split_material`."""
    name, _, number = text.partition("=")
    if name not in ("seed", "num_triplets", "num_materials"):
        raise argparse.ArgumentTypeError(f"expected seed, num_triplets or num_materials = a number, got {text!r}")
    return name, natural_int(number)


def _run(options: argparse.Namespace) -> int:
    refuse_wide_linf([options.linf])
    if options.division and options.data != "material":
        raise LipsimError(f"--division is of Material, whose parts are drawn here; --data is {options.data}")
    files = dict(options.metrics)
    if len(files) < len(options.metrics):
        raise LipsimError(f"expected metrics of different names, got {', '.join(name for name, _ in options.metrics)}")
    settings = Settings(
        eps=tuple(sorted(options.eps)),
        alone_eps=options.alone_eps,
        linf=options.linf,
        steps=options.steps,
        queries=options.queries,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    with Progress("attacking") as progress:
        progress("loading the metrics")
        metrics = load_metrics(files, lpips=options.lpips, dists=options.dists)
        tables = attack_tables(
            metrics,
            options.output,
            data=options.data,
            root=options.root,
            samples=options.samples,
            division=dict(options.division),
            settings=settings,
            progress=progress,
        )
    console = Console()
    for title, rows in tables.items():
        print_table(console, rows, title)
    console.print(f"tables.md, tables.tex and results.json are in {options.output}/")
    return 0
