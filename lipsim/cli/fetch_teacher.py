"""`lipsim fetch-teacher`: download the weights of a public teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from lipsim.teachers.catalogue import BACKBONES, VARIANTS
from lipsim.teachers.download import fetch_teacher
from lipsim.utils.paths import user_path

EXAMPLES = (
    "lipsim fetch-teacher ensemble",
    "lipsim fetch-teacher dino_vitb16 --to ~/weights",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim fetch-teacher` takes."""
    parser.description = (
        "Download weights with progress, 1.6 GB for the DreamSim ensemble; a broken download is continued by the same "
        "command. DreamSim "
        f"models: {', '.join(VARIANTS)}. Backbones: "
        f"{', '.join(n for n, b in BACKBONES.items() if n not in VARIANTS and b.sources)}. Anything "
        "else is a Hugging Face repository, such as timm/vit_base_patch16_clip_224.openai."
    )
    parser.add_argument("name")
    parser.add_argument("--to", type=user_path, default=Path("checkpoints/dreamsim"), help="folder (%(default)s)")
    parser.add_argument("--archive", type=user_path, help="unpack this copy of the zip file in place of a download")
    parser.add_argument("--sha256", default="", help="refuse a (first) file with another checksum")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for path in fetch_teacher(options.name, options.to, options.archive, options.sha256):
        print(path)
    return 0
