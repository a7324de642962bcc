"""`lipsim nullity`: how much of its input each linear operator of a network cannot see."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console

from lipsim.analysis.models import NAMES, load_model
from lipsim.analysis.nullity import Nullity, nullity, published_row, summary
from lipsim.analysis.operator_kernels import OperatorKernel, kernel_row, operator_kernels
from lipsim.cli.parser import output_folder, positive_int
from lipsim.results.formats import remove_table, write_table
from lipsim.results.tables import Row, print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_text
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim nullity quickstart",
    "lipsim nullity torchvision/resnet50 torchvision/squeezenet1_1 --output nullity",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim nullity` takes."""
    parser.description = (
        "The table of Exact Feature Collisions (Ozbulak et al.) for any networks: the number n of weights of "
        "convolutions and linear layers, how many have a kernel (ν) and how many must have one (μ), the sum of their "
        "nullities and that of the first; and beside it the kernel of the first convolution and of every strided one "
        "as an operator on images of the size that the network takes. Seconds for ResNet-50 on one core, a minute for "
        "VGG-16, whose linear layers are large."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=NAMES)
    parser.add_argument("--weights", type=user_path, help="file of the state of one model; default: random weights")
    parser.add_argument(
        "--image-size", type=positive_int, help="side of the images; default: what each model is usually given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (%(default)s)")
    parser.add_argument("--no-operators", action="store_true", help="the published table alone")
    parser.add_argument("--output", type=output_folder, help="folder for nullity.md, .tex, .csv and .json")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.weights is not None and len(options.models) > 1:
        raise LipsimError(f"expected one model for --weights, got {len(options.models)}")
    found: list[tuple[Nullity, list[OperatorKernel]]] = []
    with Progress("nullity") as progress:
        for name in options.models:

            def say(layer: str, name: str = name) -> None:
                progress(f"{name}: {layer}")

            say("building")
            model = load_model(name, options.weights, options.image_size, options.seed)
            counted = nullity(model.network, name, say)
            operators = [] if options.no_operators else operator_kernels(model.module, model.image_size, say)
            found.append((counted, operators))
    content = [
        {**summary(counted), "operators": [{**asdict(kernel), "dimension": kernel.dimension} for kernel in operators]}
        for counted, operators in found
    ]
    rows: list[Row] = [published_row(counted) for counted, _ in found]
    kernels: list[Row] = [kernel_row(counted.model, kernel) for counted, operators in found for kernel in operators]
    tables = {"nullity": ("Nullity of weights", rows), "kernels": ("Kernels of operators", kernels)}
    text = json.dumps(content, indent=1)
    if options.output is not None:
        earlier = (options.output / "nullity.json").is_file()  # which may have had operators, of other networks
        for name, (title, table) in tables.items():
            if table:
                write_table(options.output, name, title, table)
            elif earlier:
                remove_table(options.output, name)
        write_text(options.output / "nullity.json", text + "\n")
    if options.json:
        print(text)
        return 0
    for title, table in tables.values():
        if table:
            print_table(Console(), table, title)
    if options.output is not None:
        print(f"nullity.json and the tables as .md, .tex and .csv are in {options.output}/")
    return 0
