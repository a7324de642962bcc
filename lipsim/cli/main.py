"""The ``lipsim`` command: the functions of this package for one image or one model."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.utils.allocator import keep_freed_memory
from lipsim.utils.version import __version__

# A command is the module of its name here (- is _), which is imported when the command is given and not before: most
# load torch, some Lightning as well, and `lipsim --help` needs neither.
COMMANDS = {
    "distance": "how alike two images look, one and many, or two folders",
    "same": "whether two images are the same, by a calibrated threshold, and how far that cannot change",
    "rank": "the images of a folder by their distance from one",
    "certify": "certify which of two images is more like a reference",
    "info": "what a metric is, and what it can prove",
    "calibrate": "choose the threshold of `same` on labelled pairs",
    "audit": "bound a metric's Lipschitz constant, layer by layer",
    "index": "embed the images of a folder, to search in them",
    "search": "the images of an index that are most like one, and how far that answer is certified",
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
    "export": "a metric for other runtimes: folded safetensors, ONNX or torch.export",
    "demo": "a page in the browser: an answer, its certificate, and an attack on it",
    "data": "check a data set on disk, or pack its images: decoded and resized once",
    "combine": "one metric out of two, without training",
    "convert": "a published LipSim checkpoint becomes a metric of this package",
}
# These read all that follows by a parser of their own, LightningCLI's: options by the hundred, named by classes.
STAGES = {
    "train": "train a stage from a config; without options, the quickstart",
    "evaluate": "certify and attack a metric on the test sets of a data module",
}
# Whose exit status 1 is an answer, which scripts have to tell from an error.
ANSWERING = ("distance", "same", "rank", "index", "search")
_STATUS = f"""exit status:
  0    done; of `same`: the same
  1    the answer is no (`same`: different), a check failed (`audit`, `verify`),
       or files were left out (`distance`, `rank`, `index`, a table of `certify`);
       of all but {", ".join(ANSWERING)}: bad input or usage too
  2    of {", ".join(ANSWERING)}: bad input or usage
  130  interrupted"""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lipsim``."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in STAGES:
        importlib.import_module(f"lipsim.cli.{args[0]}").main(args[1:], f"lipsim {args[0]}")
        return
    keep_freed_memory()
    chosen = next((argument for argument in args if not argument.startswith("-")), None)
    parser = build_parser([name for name in COMMANDS if name == chosen])
    with one_line_errors(2 if chosen in ANSWERING else 1):
        options = parser.parse_args(args)
        status = options.run(options)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        sys.exit(status)


def build_parser(loaded: Collection[str]) -> argparse.ArgumentParser:
    """The parser of the whole command.

    Args:
        loaded: the commands whose modules are imported, so that their options are known.
    """
    about = "Perceptual similarity metrics that come with a proof."
    parser = OneLineParser(prog="lipsim", description=about, epilog=_STATUS)
    parser.add_argument("--version", action="version", version=f"lipsim {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print what lets a shell complete commands and options, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in {**STAGES, **COMMANDS}.items():
        command = commands.add_parser(name, help=purpose)
        if name in loaded:
            module = importlib.import_module(f"lipsim.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            if examples := getattr(module, "EXAMPLES", ()):
                command.epilog = "\n  ".join(["examples:", *examples])
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the completion of a shell and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from lipsim.cli.completion import completion  # with a package that nothing else needs

        print(completion(build_parser(COMMANDS), str(values)))
        parser.exit()
