"""The data sets by name: the one list of them, behind every command, every table and the data modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from lipsim.data.builtin.triplets import BuiltinTriplets
from lipsim.data.contracts import TripletSet
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.loading import fetch
from lipsim.data.sets.bapps import BappsTriplets
from lipsim.data.sets.image_store import load_image_store
from lipsim.data.sets.material import MaterialTriplets, load_material_answers, load_material_images, split_material
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.sets.photos import PhotoTriplets
from lipsim.data.sets.table import PARTS, TableTriplets
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet, collate_triplets
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

Sets = dict[str, TripletSet]


@dataclass(frozen=True)
class Source:
    """Where triplets with votes come from.

    Attributes:
        parts: their names.
        held_out: the part that no stage trains on.
        open: ``open(parts, preprocess, root, **options)`` returns some parts by name; options are those of the set.
        on_disk: whether it is a folder, whose images are resized; otherwise it is made to the size that is asked for.
    """

    parts: tuple[str, ...]
    held_out: str
    open: Callable[..., Sets]
    on_disk: bool = True


def _builtin(parts: Sequence[Any], preprocess: Preprocess, root: None, **options: Any) -> Sets:
    return {part: BuiltinTriplets(part, image_size=preprocess.image_size, **options) for part in parts}


def _nights(parts: Sequence[Any], preprocess: Preprocess, root: Path, **options: Any) -> Sets:
    return {part: NightsTriplets(root, part, preprocess, **options) for part in parts}


def _bapps(parts: Sequence[str], preprocess: Preprocess, root: Path, **options: Any) -> Sets:
    return {part: BappsTriplets(root, part, preprocess, **options) for part in parts}


def _material(
    parts: Sequence[str], preprocess: Preprocess, root: Path, *, ties: bool = False, seed: int = 0, **options: Any
) -> Sets:
    """The parts of the answers for training, see :class:`MaterialSplit`, and the "official" ones for testing."""
    split = split_material(load_material_answers(root, ties=ties, seed=seed), seed=seed, **options)
    images, _ = load_material_images(root, preprocess)
    answers = {part: getattr(split, part) for part in ("train", "triplets", "materials", "unseen")}
    if "official" in parts:
        answers["official"] = load_material_answers(root, "test", ties=ties, seed=seed)
    return {part: MaterialTriplets(images, answers[part], preprocess) for part in parts}


def _photos(
    parts: Sequence[str],
    preprocess: Preprocess,
    root: Path,
    *,
    cache: str | Path | None = None,
    num_images: int | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
    image_seed: int | None = None,
    **options: Any,
) -> Sets:
    """Triplets of the images under ``root/PART``, with a teacher's votes where a cache of its embeddings is given.

    ``image_seed`` is of the draw of ``num_images``; None: ``seed``, that of the triplets.
    """
    sets: Sets = {}
    embedded = None if cache is None else EmbeddingCache(cache)
    for part in parts:
        store = load_image_store(
            user_path(root) / part,
            preprocess,
            num_images=num_images,
            seed=seed if image_seed is None else image_seed,
            num_workers=num_workers,
            progress=progress,
        )
        embeddings = None if embedded is None else store.embeddings(embedded, f"{part}/")
        sets[part] = PhotoTriplets(store, embeddings=embeddings, seed=seed, **options)
    return sets


def _table(parts: Sequence[str], preprocess: Preprocess, root: Path, **options: Any) -> Sets:
    """Parts of one table; ``root`` is the file."""
    whole = TableTriplets(root, preprocess, **options)
    return {part: whole.part(part) for part in parts}


SOURCES = {
    "builtin": Source(("train", "val", "test"), "test", _builtin, on_disk=False),
    "material": Source(("train", "triplets", "materials", "unseen", "official"), "triplets", _material),
    "nights": Source(("train", "val", "test"), "test", _nights),
    "bapps": Source(("train", "val"), "val", _bapps),
    "photos": Source(("train", "val"), "val", _photos),
    "table": Source(PARTS, "test", _table),
}
DATA = tuple(SOURCES)


def open_sets(
    data: str,
    parts: Sequence[str],
    *,
    image_size: int,
    resize: str,
    framing: str = "stretch",
    root: Path | None = None,
    **options: Any,
) -> Sets:
    """Some parts of a data set, by name.

    Args:
        data: one of :data:`DATA`.
        parts: which of its :attr:`Source.parts`.
        image_size: side of the images.
        resize: of image files, what ``metric.preprocess.resize`` says of the metric that will see them: "float" or
            "pil", as in :class:`lipsim.data.transforms.Preprocess`.
        framing: likewise, ``metric.preprocess.framing``.
        root: folder of the data, of a table its file; built-in ones have none.
        **options: of :class:`BuiltinTriplets`, :class:`NightsTriplets`, :class:`BappsTriplets` or
            :class:`TableTriplets`; for Material, of :func:`load_material_answers` and :func:`split_material`; for
            photos, of :class:`PhotoTriplets` and :func:`load_image_store`, and ``cache``, the folder of a teacher's
            embeddings of ``root``.

    Raises:
        ValueError: an unknown data set, part, size or resize, or no folder.
        FileNotFoundError: no data at ``root``.
    """
    source = _source(data)
    unknown = [part for part in parts if part not in source.parts]
    if unknown:
        raise LipsimError(f"expected parts of {data} among {', '.join(source.parts)}, got {', '.join(unknown)}")
    if source.on_disk and root is None:
        raise LipsimError(f"the data of {data} lie in a folder: pass it as --root")
    if not source.on_disk and root is not None:
        raise LipsimError(f"the built-in data lie in no folder; say what is in {root} by --data")
    return source.open(parts, Preprocess(image_size, resize, framing), root, **options)


def sample_triplets(
    data: str,
    count: int,
    image_size: int,
    *,
    resize: str,
    framing: str = "stretch",
    root: Path | None = None,
    seed: int = 0,
    division: Mapping[str, Any] | None = None,
) -> Triplet:
    """Some triplets to verify or attack on, drawn from what no stage trains on with the data's default division.

    Material is divided here, by :func:`lipsim.data.sets.material.split_material`: a training with another seed or other
    counts has seen some of the triplets that the default holds out, and says so by ``division``.

    Args:
        data: one of :data:`DATA`: the first built-in test triplets, or some of the held-out triplets of Material, of
            the test split of NIGHTS, of the validation part of BAPPS or of a folder of photographs, or of what the
            column ``split`` of a table calls test, the whole of one without that column.
        count: how many; where a set on disk has fewer, all of them, and a warning says so.
        image_size: side of the images.
        resize: as in :func:`open_sets`.
        framing: as in :func:`open_sets`.
        root: folder of the data, of a table its file; built-in ones have none.
        seed: of the draw.
        division: options of :func:`open_sets` with which a training has divided the data, ``{"seed": 1}`` of Material.

    Raises:
        ValueError: as in :func:`open_sets`, or no samples.
        FileNotFoundError: no data at ``root``.
    """
    if count < 1:
        raise LipsimError(f"expected at least 1 sample, got {count}")
    source = _source(data)
    # What is made to measure is drawn as it is made.
    options: dict[str, Any] = {} if source.on_disk else {"num_triplets": count, "seed": seed}
    if data == "table":
        options = {"test_fraction": 1.0}
    options |= division or {}
    images: dict[str, Any] = {"image_size": image_size, "resize": resize, "framing": framing}
    found = open_sets(data, [source.held_out], root=root, **images, **options)
    triplets = found[source.held_out]
    if data == "photos" and count > len(triplets):  # made as they are asked for; a longer set begins as a shorter one
        triplets = open_sets(data, [source.held_out], root=root, **images, num_triplets=count)[source.held_out]
    if count > len(triplets):
        warn(
            f"{data} has {len(triplets)} of the {count} samples that were asked for; all of them are taken",
            stacklevel=2,
        )
    rows = list(range(count))
    if source.on_disk:
        rows = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    batch = fetch(triplets, rows)
    return batch if isinstance(batch, Triplet) else collate_triplets(batch)


def _source(data: str) -> Source:
    if data not in SOURCES:
        raise LipsimError(f"expected data to be one of {', '.join(DATA)}, got {data!r}")
    return SOURCES[data]
