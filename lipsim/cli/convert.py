"""`lipsim convert`: a published LipSim checkpoint becomes a metric of this package."""

from __future__ import annotations

import argparse

from lipsim.cli.parser import metric_file, positive_int
from lipsim.data.transforms import RESIZES
from lipsim.metric import save
from lipsim.metric.published import convert
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim convert lipsim.pth converted.safetensors",
    "lipsim convert lipsim.pth converted.safetensors --image-size 224 --anchor 0",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim convert` takes."""
    parser.description = (
        "Convert a published LipSim checkpoint, strictly: every key is accounted for, and nothing is unpickled but "
        "tensors. The small published network takes half a minute of processor time, nearly all of it for the audit."
    )
    parser.add_argument("published", type=user_path, metavar="PUBLISHED.pth")
    parser.add_argument("output", type=metric_file, metavar="OUTPUT.safetensors")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        help="side of the input; the weights fix it up to 16 neighbouring sizes, the default is the multiple of 16",
    )
    parser.add_argument(
        "--out-features",
        type=positive_int,
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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("converting"):
        conversion = convert(
            options.published, options.image_size, options.out_features, options.anchor, options.resize
        )
        file = save(conversion.metric, options.output, conversion.notes(options.published))
    print(conversion)
    print(f"{'written':<17}{file}")
    return 0
