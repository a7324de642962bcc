"""The ``lipsim`` command: the functions of this package for one image or one model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.utils.version import __version__

# A command is the module of its name here (- is _), which is imported when the command is given and not before: most
# load torch, some Lightning as well, and `lipsim --help` needs neither.
COMMANDS = {
    "audit": "bound a metric's Lipschitz constant, layer by layer",
    "certify": "certify the answer to one triplet of image files",
    "verify": "attack every certificate of a metric",
    "attack": "attack a metric on one pair or triplet of image files",
    "attack-tables": "many metrics side by side, natural and attacked",
    "correlate": "agreement with the opinion scores of a table of image pairs, and its certified interval",
    "collide": "an image that a model cannot tell from another, exactly or at a layer",
    "nullity": "how much of its input each linear operator of a network cannot see",
    "traverse": "walk from one image towards another while a model's answer stays",
    "report": "tables, curves and one HTML page from the results of several runs",
    "feature-sets": "training sets of the features that one model uses, and what is learned from them",
    "fetch-teacher": "download the weights of a DreamSim model, a backbone or a Hugging Face repository",
    "export-teacher": "write a DreamSim model or a backbone as a metric that distillation takes",
    "cache-teacher": "a teacher's embeddings of a folder of images, computed once",
    "data": "check a data set on disk, or pack its images: decoded and resized once",
    "convert": "a published LipSim checkpoint becomes a metric of this package",
}
# These read all that follows by a parser of their own, LightningCLI's: options by the hundred, named by classes.
STAGES = {
    "train": "train a stage from a config; without options, the quickstart",
    "evaluate": "certify and attack a metric on the test sets of a data module",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lipsim``."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in STAGES:
        importlib.import_module(f"lipsim.cli.{args[0]}").main(args[1:], f"lipsim {args[0]}")
        return
    parser = OneLineParser(prog="lipsim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lipsim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((argument for argument in args if not argument.startswith("-")), None)
    for name, purpose in {**STAGES, **COMMANDS}.items():
        command = commands.add_parser(name, help=purpose)
        if name == chosen and name in COMMANDS:
            importlib.import_module(f"lipsim.cli.{name.replace('-', '_')}").add_arguments(command)
    with one_line_errors():
        options = parser.parse_args(args)
        sys.exit(options.run(options))
