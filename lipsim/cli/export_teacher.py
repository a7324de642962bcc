"""`lipsim export-teacher`: write a DreamSim model as a metric that distillation takes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from lipsim.cli.parser import metric_file
from lipsim.metric import PerceptualMetric, save
from lipsim.teachers import DreamSim
from lipsim.teachers.catalogue import VARIANTS
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim export-teacher` takes."""
    parser.description = (
        "Read a DreamSim model from its weights folder, merge its adapter, and write the metric to one "
        "file, which needs neither the folder nor any download. Takes as long as reading and writing the weights."
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("output", type=metric_file, metavar="OUTPUT.safetensors")
    parser.add_argument("--weights", type=user_path, default=Path("checkpoints/dreamsim"), help="folder (%(default)s)")
    parser.add_argument("--no-adapter", action="store_true", help="the backbones before DreamSim's tuning")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("reading, merging and writing weights"):
        teacher = DreamSim(options.variant, options.weights, adapter=not options.no_adapter)
        metric = PerceptualMetric(teacher, teacher.image_size, anchor=0.0, lipschitz=math.inf, resize=teacher.resize)
        file = save(metric, options.output, {"source": str(options.weights)})
    print(file)
    return 0
