"""The commands of ``lipsim`` that bring public teachers to this machine: fetch-teacher and export-teacher."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from lipsim.metric import PerceptualMetric, save
from lipsim.teachers import DreamSim
from lipsim.teachers.catalogue import BACKBONES, VARIANTS
from lipsim.teachers.download import fetch_teacher
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_commands(commands: Any) -> None:
    """Add both to the subcommands of a parser."""
    fetch = commands.add_parser(
        "fetch-teacher",
        help="download the weights of a DreamSim model, a backbone or a Hugging Face repository",
        description="Download weights with progress; a broken download is continued by the same command. DreamSim "
        f"models: {', '.join(VARIANTS)}. Backbones: {', '.join(n for n in BACKBONES if n not in VARIANTS)}. Anything "
        "else is a Hugging Face repository, such as timm/vit_base_patch16_clip_224.openai.",
    )
    fetch.add_argument("name")
    fetch.add_argument("--to", type=user_path, default=Path("checkpoints/dreamsim"), help="folder (%(default)s)")
    fetch.add_argument("--archive", type=user_path, help="unpack this copy of the zip file in place of a download")
    fetch.add_argument("--sha256", default="", help="refuse a (first) file with another checksum")
    fetch.set_defaults(run=_fetch)
    convert = commands.add_parser(
        "export-teacher",
        help="write a DreamSim model as a metric that distillation takes",
        description="Read a DreamSim model from its weights folder, merge its adapter, and write the metric to one "
        "file, which needs neither the folder nor any download.",
    )
    convert.add_argument("variant", choices=VARIANTS)
    convert.add_argument("output", type=user_path, metavar="OUTPUT.safetensors")
    convert.add_argument("--weights", type=user_path, default=Path("checkpoints/dreamsim"), help="folder (%(default)s)")
    convert.add_argument("--no-adapter", action="store_true", help="the backbones before DreamSim's tuning")
    convert.set_defaults(run=_export)


def _fetch(options: argparse.Namespace) -> int:
    for path in fetch_teacher(options.name, options.to, options.archive, options.sha256):
        print(path)
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.output.suffix != ".safetensors":
        raise ValueError(f"expected an output file ending in .safetensors, got {options.output}")
    with Progress("reading, merging and writing weights"):
        teacher = DreamSim(options.variant, options.weights, adapter=not options.no_adapter)
        metric = PerceptualMetric(teacher, teacher.image_size, anchor=0.0, lipschitz=math.inf, resize=teacher.resize)
        file = save(metric, options.output, {"source": str(options.weights)})
    print(file)
    return 0
