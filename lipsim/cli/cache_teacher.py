"""`python scripts/cache_teacher.py`: a teacher's embeddings of a folder of images, computed once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.data.embeddings.cache import DTYPES, PRECISIONS
from lipsim.data.sets.folder import VIEWS
from lipsim.training.teacher_cache import build, verify
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

_DESCRIPTION = """Run a teacher once over a folder of images and keep its embeddings for distillation, for example
cache_teacher.py --teacher TEACHER.safetensors --images data/imagenet --output runs/cache --devices 8
Killed, it continues where it was when the same command is given again, on any number of processes; torchrun and srun
work as for training. Distillation reads the cache by --model.cache. --verify checks one instead of writing it."""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="cache_teacher.py", description=_DESCRIPTION)
    parser.add_argument("--teacher", type=user_path, required=True, help="exported metric, a .safetensors file")
    parser.add_argument(
        "--images", type=user_path, required=True, help="folder of images, the data.root of distillation"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder of the cache")
    parser.add_argument("--views", nargs="+", default=["plain", "flip"], help=f"of {', '.join(VIEWS)} (plain flip)")
    parser.add_argument("--resize", type=int, help="resize the short side to this before the crop, as data.resize does")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the teacher (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=8, help="loading processes of each process (%(default)s)")
    parser.add_argument(
        "--shard-size", type=int, default=2048, help="images in a shard; a kill costs one (%(default)s)"
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, … (%(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="processes on each machine (%(default)s)")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument("--verify", action="store_true", help="check the cache; exit status 1 where it is not sound")
    parser.add_argument("--sample", type=int, default=64, help="images that --verify embeds again (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (%(default)s)")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of scripts/cache_teacher.py."""
    with one_line_errors():
        options = _parser().parse_args(args)
        for name in ("batch_size", "shard_size", "devices", "num_nodes"):
            if getattr(options, name) < 1:
                raise LipsimError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
        if not options.verify:
            build(options)
        elif verify(options):
            sys.exit(1)
