"""`lipsim search`: the images of an index that are most like one."""

from __future__ import annotations

import argparse
import json
import math

from lipsim.cli.index import OUTPUT
from lipsim.cli.parser import UsageError, add_metric_argument, add_output, load_metric, positive_int
from lipsim.data.transforms import load_image, read_image
from lipsim.metric.image_files import original_radii
from lipsim.metric.index import ImageIndex
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import print_csv, text_table

EXAMPLES = ("lipsim search x.png", "lipsim search x.png --index photos.safetensors --top 20 --csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim search` takes."""
    parser.description = (
        "The nearest images of an index, and certified ℓ2 radii for the image searched with, for values in [0, 1]: of "
        "each rank (every shorter change leaves this image at this rank; rank 1 is the top-1 answer) and of the whole "
        "set. They are about all images of the index. The bundled metric takes a fifth of a second besides loading "
        "torch, and 100,000 images hundredths of a second more."
    )
    parser.add_argument("image", type=user_path, help="an image file")
    parser.add_argument("--index", type=user_path, default=OUTPUT, help="of `lipsim index` (%(default)s)")
    parser.add_argument("--top", type=positive_int, default=5, help="how many (%(default)s)")
    add_metric_argument(
        parser, option=True, default=None, otherwise="the one, and the framing, that the index was made with"
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="look at candidates that faiss finds; the radii are about these alone, and neighbours may be missed",
    )
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.image.is_dir():
        raise LipsimError(f"expected an image file to search with, got the folder {options.image}")
    if options.metric is None and (options.framing or options.grid):
        raise UsageError("--framing and --grid go with --metric; the index knows those that it was made with")
    with Progress("searching") as progress:
        progress("reading the index")
        index = ImageIndex.load(options.index, None if options.metric is None else load_metric(options))
        metric = index.metric
        picture = read_image(options.image)
        image = load_image(options.image, metric.preprocess)
        progress(f"comparing with {len(index)} images")
        found = index.search(image[None], options.top, approximate=options.approximate)
    rows = [
        {"rank": rank, "file": name, "distance": distance, "radius": radius}
        for rank, (name, distance, radius) in enumerate(
            zip(found.names[0], found.distance[0].tolist(), found.rank_radius[0].tolist(), strict=True), start=1
        )
    ]
    radii = {"top-1": float(found.top_radius), "set": float(found.set_radius)}
    known = {name: radius for name, radius in radii.items() if math.isfinite(radius)}
    original = original_radii(metric, {"query": picture}, known)
    if options.json:
        facts = {
            "image": str(options.image),
            "index": str(options.index),
            "nearest": [{**row, "radius": _finite(row["radius"])} for row in rows],
            "radius": {name: _finite(radius) for name, radius in radii.items()},
            "original_radius": original,
            "images": found.total,
            "compared": found.compared,
            "approximate": options.approximate,
            "image_size": metric.image_size,
            "lipschitz": _finite(metric.lipschitz),
        }
        print(json.dumps(facts, indent=1))
        return 0
    if options.csv:
        print_csv(list(rows[0]), [list(row.values()) for row in rows])
        return 0
    cells = [[str(r["rank"]), str(r["file"]), f"{r['distance']:.6g}", f"{r['radius']:.6g}"] for r in rows]
    print(text_table(["rank", "file", "distance", "R of the rank"], cells))
    what = "the nearest image" if len(rows) == 1 else f"these {len(rows)}, in any order"
    for name, subject in (("top-1", "rank 1"), ("set", what)):
        line = f"{subject}: R = {radii[name]:.6g} at {metric.image_size}×{metric.image_size}"
        print(
            line if original is None or name not in original else f"{line}, {original[name]:.6g} in the file's pixels"
        )
    if options.approximate:
        print(f"certified among {found.compared} candidates of {found.total} images: others may be nearer")
    else:
        print(f"certified among all {found.total} images")
    return 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
