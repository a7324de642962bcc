"""`python scripts/convert_checkpoint.py`: a published LipSim checkpoint becomes a metric of this package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.data.transforms import RESIZES
from lipsim.metric import save
from lipsim.metric.published import convert
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="convert_checkpoint.py", description="Convert a published LipSim checkpoint, strictly.")
    parser.add_argument("published", type=user_path, metavar="PUBLISHED.pth")
    parser.add_argument("output", type=user_path, metavar="OUTPUT.safetensors")
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the input; the weights fix it up to 16 neighbouring sizes, the default is the multiple of 16",
    )
    parser.add_argument(
        "--out-features",
        type=int,
        default=1792,
        help="features to keep, the dimension of the teacher (default: %(default)s, the DreamSim ensemble)",
    )
    parser.add_argument(
        "--anchor",
        type=float,
        default=1.0,
        help="constant coordinate of the embedding; the published evaluation has none, which is 0. With 1 (default) "
        "distances differ slightly and are Lipschitz everywhere, for features of any length",
    )
    parser.add_argument(
        "--resize",
        choices=RESIZES,
        default="pil",
        help="how images come to the input size: pil (default) in 8 bits as in the published evaluation, float by a "
        "map of known norm",
    )
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of scripts/convert_checkpoint.py."""
    with one_line_errors():
        options = _parser().parse_args(args)
        if options.output.suffix != ".safetensors" or options.output.is_dir():
            raise LipsimError(f"expected an output file ending in .safetensors, got {options.output}")
        conversion = convert(
            options.published, options.image_size, options.out_features, options.anchor, options.resize
        )
        file = save(conversion.metric, options.output, conversion.notes(options.published))
        print(conversion)
        print(f"{'written':<17}{file}")
