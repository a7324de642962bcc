"""`lipsim verify`: attack every certificate of a metric."""

from __future__ import annotations

import argparse
import json

from lipsim.cli.parser import add_metric_argument, device, load_metric, positive_int
from lipsim.data.registry import DATA, sample_triplets
from lipsim.evaluation.verify import verify
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim verify",
    "lipsim verify runs/m.safetensors --samples 2 --steps 10",
    "lipsim verify quickstart --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim verify` takes."""
    parser.description = (
        "Attack every kind of certificate of an exported metric in float64, without and with the box "
        "[0, 1], and the Lipschitz bound it stands on. Faults planted in the metric, radii that are 2 % too large on a "
        "linear encoder, and certificates whose truth is known have to come out right in the same run. The bundled "
        "metric takes 2.5 minutes of processor time, nearly all of it gradients in float64; more with --samples and "
        "--steps. Exit status 1 where a certificate breaks or a planted fault is missed."
    )
    add_metric_argument(parser)
    parser.add_argument("--data", choices=DATA, default="builtin", help="triplets (%(default)s)")
    parser.add_argument("--root", type=user_path, help="folder of the data")
    parser.add_argument("--samples", type=positive_int, default=4, help="how many triplets (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=20, help="of the attack from each start (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images attacked at a time (%(default)s)")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1,
        help="of the processor; more pay off on large networks only (%(default)s)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu, or a GPU with float64 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of triplets, starts and controls (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("verifying") as progress:
        progress("loading the metric and the triplets")
        metric = load_metric(options).to(options.device)
        triplets = sample_triplets(
            options.data,
            options.samples,
            metric.image_size,
            resize=metric.preprocess.resize,
            framing=metric.preprocess.framing,
            root=options.root,
            seed=options.seed,
        )
        verification = verify(
            metric,
            triplets,
            steps=options.steps,
            seed=options.seed,
            batch_size=options.batch_size,
            threads=options.threads,
            progress=progress,
        )
    if options.json:
        print(json.dumps(verification.facts(), indent=1))
    else:
        print(verification)
        print("\n".join(f"FAILED: {line}" for line in verification.failures) or "sound: every certificate held")
    return int(not verification.sound)
