"""`lipsim data check` and `lipsim data pack`: data sets on disk, whole and fast."""

from __future__ import annotations

import argparse
import dataclasses
import json

from lipsim.cli.parser import column, natural_int, output_folder, positive_int
from lipsim.data.check import KINDS, DataCheck, check_data
from lipsim.data.pack import COMMAND, FRAMES
from lipsim.data.packing import pack_images
from lipsim.data.transforms import RESIZES
from lipsim.utils.files import write_csv
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import text_table

EXAMPLES = (
    "lipsim data check data/nights",
    "lipsim data check study.csv --kind table --columns reference=pivot --json",
    "lipsim data pack data/nights packs/nights-224 --size 224",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim data` takes."""
    parser.description = "Check a data set on disk, or pack its images: decoded and resized once."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands.add_parser("check", help="read every file once; tell all that is wrong"))
    _add_pack(commands.add_parser("pack", help="decode and resize every image once, into shards"))


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read every file of a data set once and tell all that is missing, truncated or unreadable, and counts beside "
        "the published ones. Stopped, it goes on where it was; a second check reads what has changed since, by size "
        "and time. Exit status 1 where anything is wrong."
    )
    parser.add_argument("root", type=user_path, help="folder of the data; of a table of triplets, the CSV file")
    parser.add_argument("--kind", choices=KINDS, help="of the data (by its layout)")
    parser.add_argument(
        "--columns",
        nargs="+",
        type=column,
        default=[],
        metavar="OURS=THEIRS",
        help="what columns are called in a table, such as reference=pivot",
    )
    parser.add_argument(
        "--journal",
        type=output_folder,
        help="folder for the list of files that are whole (beside the data; none where nothing can be written there)",
    )
    parser.add_argument("--num-workers", type=natural_int, default=4, help="processes that read (%(default)s)")
    parser.add_argument("--csv", type=user_path, help="write the problems to this file as well")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_check)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Decode and resize every image under a folder once and keep the pixels in eight bits, by the path of each "
        f"file: {COMMAND} data/nights packs/nights-224 --size 224. Given again, it continues, or reads what has "
        "changed. Sets of triplets take a pack as data.pack; distillation and cache-teacher (--frame crop) and "
        "triplets of photographs (--frame square) as their folder. Where an image was resized, it is rounded by up to "
        "half a grey level: figures on packed and on plain images differ a little, and results and embedding caches "
        "tell the two apart."
    )
    parser.add_argument("root", type=user_path, help="folder of the images, at any depth")
    parser.add_argument("output", type=output_folder, help="folder of the pack")
    parser.add_argument("--size", type=positive_int, required=True, help="side of the images, the metric's")
    parser.add_argument(
        "--resize", choices=RESIZES, default="float", help="what metric.preprocess.resize says (%(default)s)"
    )
    parser.add_argument(
        "--frame",
        choices=FRAMES,
        default="whole",
        help="whole: as triplets show an image; crop: its centre, as distillation and cache-teacher show it; square: "
        "its centred square, as triplets of photographs show it (%(default)s)",
    )
    parser.add_argument("--short-side", type=positive_int, help="of a crop: resize the short side to this first")
    parser.add_argument(
        "--stream",
        metavar="URL",
        help="where shards that are not in the folder are read from, such as s3://bucket/pack",
    )
    parser.add_argument("--num-workers", type=natural_int, default=4, help="processes that decode (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.set_defaults(run=_pack)


def _check(options: argparse.Namespace) -> int:
    with Progress("checking") as progress:
        check = check_data(
            options.root,
            options.kind,
            columns=dict(options.columns),
            journal=options.journal,
            num_workers=options.num_workers,
            progress=progress,
        )
    if options.csv is not None:
        rows = ((problem.path, problem.kind, problem.reason) for problem in check.problems)
        write_csv(options.csv, ("path", "kind", "reason"), rows)
    print(json.dumps(check.to_json(), indent=1) if options.json else check_text(check))
    return int(not check.sound)


def check_text(check: DataCheck) -> str:
    """What a check found, to be read by people."""
    counts = [(count.name, f"{count.found:,}", _published(count.published, count.rounded_to)) for count in check.counts]
    parts = [text_table((check.kind, "found", "published"), counts)]
    if check.problems:
        problems = [(problem.kind, problem.path, problem.reason) for problem in check.problems]
        parts.append(text_table(("problem", "where", "what"), problems))
    if check.passed_over:
        parts.append(f"passed over: {check.passed_over}")
    read = f"{check.files:,} files, {check.read:,} of them read now in {check.seconds:.1f} s"
    if check.journal is None:
        read += "; nothing can be written beside the data, so that the next check reads all again (--journal FOLDER)"
    number = f"{len(check.problems):,} problem{'s' * (len(check.problems) > 1)}"
    verdict = number if check.problems else "sound: every file is there and decodes"
    return "\n\n".join([*parts, f"{read}\n{verdict}"])


def _published(number: int | None, rounded_to: int) -> str:
    if number is None:
        return ""
    return f"{number:,}" if rounded_to == 1 else f"{number:,} (to {rounded_to})"


def _pack(options: argparse.Namespace) -> int:
    with Progress("packing") as progress:
        packed = pack_images(
            options.root,
            options.output,
            options.size,
            frame=options.frame,
            resize=options.resize,
            short_side=options.short_side,
            stream=options.stream,
            num_workers=options.num_workers,
            progress=progress,
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(packed) | {"folder": str(packed.folder)}, indent=1))
    else:
        print(packed)
        if packed.passed_over:
            print(f"passed over: {packed.passed_over}")
    return 0
