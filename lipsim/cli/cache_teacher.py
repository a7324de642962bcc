"""`lipsim cache-teacher`: a teacher's embeddings of a folder of images, computed once."""

from __future__ import annotations

import argparse

from lipsim.cli.parser import natural_int, output_folder, positive_int
from lipsim.data.embeddings.cache import DTYPES, PRECISIONS
from lipsim.data.sets.folder import VIEWS
from lipsim.evaluation.processes import ProcessFailed
from lipsim.training.teacher_cache import cache_teacher, check_cache
from lipsim.utils.paths import user_path

EXAMPLES = (
    "lipsim cache-teacher --teacher teacher.safetensors --images data/imagenet --output runs/cache",
    "lipsim cache-teacher --teacher teacher.safetensors --images data/imagenet --output runs/cache --verify",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim cache-teacher` takes."""
    parser.description = (
        "Run a teacher once over a folder of images and keep its embeddings for distillation, for example "
        "lipsim cache-teacher --teacher TEACHER.safetensors --images data/imagenet --output runs/cache --devices 8. It "
        "costs one forward pass of the teacher for each image and view, and tells how long the rest takes. Killed, it "
        "continues where it was when the same command is given again, on any number of processes; torchrun and srun "
        "work as for training. Distillation reads the cache by --model.cache. --verify checks one instead of writing "
        "it: it reads every image file once."
    )
    parser.add_argument("--teacher", required=True, help="exported metric, a .safetensors file or a bundled name")
    parser.add_argument(
        "--images", type=user_path, required=True, help="folder of images, the data.root of distillation"
    )
    parser.add_argument("--output", type=output_folder, required=True, help="folder of the cache")
    parser.add_argument("--views", nargs="+", default=["plain", "flip"], help=f"of {', '.join(VIEWS)} (plain flip)")
    parser.add_argument(
        "--short-side", type=positive_int, help="resize the short side to this first, as data.short_side does"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the teacher (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images in a batch (%(default)s)")
    parser.add_argument(
        "--num-workers", type=natural_int, default=8, help="loading processes of each process (%(default)s)"
    )
    parser.add_argument(
        "--shard-size", type=positive_int, default=2048, help="images in a shard; a kill costs one (%(default)s)"
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, … (%(default)s)")
    parser.add_argument("--devices", type=positive_int, default=1, help="processes on each machine (%(default)s)")
    parser.add_argument("--num-nodes", type=positive_int, default=1, help="machines (%(default)s)")
    parser.add_argument("--verify", action="store_true", help="check the cache; exit status 1 where it is not sound")
    parser.add_argument("--sample", type=natural_int, default=64, help="images that --verify embeds again (64)")
    parser.add_argument("--seed", type=natural_int, default=0, help="of their choice (%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    where = options.teacher, options.images, options.output
    if options.verify:
        verdict = check_cache(
            *where,
            sample=options.sample,
            seed=options.seed,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            accelerator=options.accelerator,
        )
        print(verdict)
        print(
            "\n".join(f"FAILED: {line}" for line in verdict.failures)
            or "sound: the cache is complete and the teacher's"
        )
        return int(not verdict.sound)
    try:
        cache = cache_teacher(
            *where,
            views=options.views,
            short_side=options.short_side,
            dtype=options.dtype,
            precision=options.precision,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            shard_size=options.shard_size,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
        )
    except ProcessFailed:  # which one has said why
        return 1
    if cache.rank == 0:
        print(cache)
    return 0
