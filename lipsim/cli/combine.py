"""`lipsim combine`: one metric out of two, without training."""

from __future__ import annotations

import argparse

from lipsim.cli.parser import metric_file, share
from lipsim.metric import load, save
from lipsim.metric.combinations import average_weights, checked_share, join
from lipsim.metric.files import read_facts
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim combine photos scattering both.safetensors",
    "lipsim combine photos scattering both.safetensors --share 0.3",
    "lipsim combine early.safetensors late.safetensors mean.safetensors --weights --share 0.75",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim combine` takes."""
    parser.description = (
        "Make one metric of two, without training: their features side by side, so that it sees what either does, or "
        "one network with the mean of both's weights. It is certified as they are. Takes seconds."
    )
    kinds = "a .safetensors file, or the name of a bundled metric"
    parser.add_argument("first", metavar="FIRST", help=f"{kinds}; its anchor is that of the result")
    parser.add_argument("second", metavar="SECOND", help=f"{kinds}, that sees images of the same size")
    parser.add_argument("output", type=metric_file, metavar="OUTPUT.safetensors")
    parser.add_argument(
        "--share",
        type=share,
        default=0.5,
        help="of the second, between 0 and 1: of the squared distances of features, or of the weights (%(default)s)",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="the mean of weights, of two networks of one architecture that one training left or that continue it",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    checked_share(options.share)
    with Progress("combining"):
        facts = [read_facts(name) for name in (options.first, options.second)]
        combine = average_weights if options.weights else join
        metric = combine(load(options.first), load(options.second), options.share)
        origin = {
            "combined": "weights" if options.weights else "features",
            "share": options.share,
            "of": [{"source": fact.file.name, "source_sha256": fact.sha256} for fact in facts],
        }
        file = save(metric, options.output, origin)
    print(f"{'Lipschitz bound':<17}{f'{metric.lipschitz:.9g} (audited)' if metric.has_bound else 'none'}")
    print(f"{'written':<17}{file}")
    return 0
