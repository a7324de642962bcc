"""What should be in a folder of data: files and counts, by the published layout or by a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from lipsim.data.sets import bapps, material, nights
from lipsim.data.sets.folder import list_images
from lipsim.data.sets.table import read_triplet_rows, too_many_groups
from lipsim.utils.errors import LipsimError

# Fu et al. 2023, the rows of data.csv; Zhang et al. 2018, whose authors round to hundreds; Lagunas et al. 2019, the
# judgements without a tied vote.
PUBLISHED_NIGHTS = 20_019
PUBLISHED_BAPPS = {
    "train": {"traditional": 56_600, "cnn": 38_100, "mix": 56_600},
    "val": {
        "traditional": 4_700,
        "cnn": 4_700,
        "superres": 10_900,
        "deblur": 9_400,
        "color": 4_700,
        "frameinterp": 1_900,
    },
}
PUBLISHED_MATERIAL = {"train": 21_406, "test": 2_738}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: of the file, relative to the folder; of a table, with the line.
        kind: "missing", "empty", "truncated", "unreadable", "twice", "table" or "count".
        reason: in words.
    """

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Count:
    """How many there are of something.

    Attributes:
        name: of what.
        found: how many.
        published: how many there should be; None: nobody says.
        rounded_to: of the published number.
    """

    name: str
    found: int
    published: int | None = None
    rounded_to: int = 1

    @property
    def agrees(self) -> bool:
        """Whether the number is the published one, as far as that says."""
        return self.published is None or abs(self.found - self.published) <= self.rounded_to // 2


@dataclass(frozen=True, eq=False)
class Expected:
    """What a folder of data should have.

    Attributes:
        folder: that the files are relative to.
        files: ``(N,)`` bytes, sorted, each once.
        counts: of triplets or images.
        problems: that show without reading a file.
        passed_over: what is there and is no part of it, in words.
    """

    folder: Path
    files: np.ndarray
    counts: tuple[Count, ...] = ()
    problems: tuple[Problem, ...] = ()
    passed_over: str = ""


def guess_kind(root: Path) -> str:
    """What kind of data is there, by its layout: one of :data:`KINDS`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it could be of several kinds.
    """
    if root.is_file():
        return "table"
    if not root.is_dir():
        raise FileNotFoundError(f"no data at {root.absolute()}: there is no such folder or table")
    layouts = {
        "nights": (root / nights.TABLE).is_file() and ((root / "ref").is_dir() or (root / "distort").is_dir()),
        "bapps": (root / "2afc").is_dir(),
        "material": (root / material.IMAGES).is_dir() or (root / material.ANSWERS.format(part="train")).is_file(),
    }
    found = [kind for kind, is_there in layouts.items() if is_there]
    if len(found) > 1:
        raise LipsimError(f"{root} has the layout of {' and of '.join(found)}; name one as --kind")
    return found[0] if found else "folder"


def expect(root: Path, kind: str, columns: Mapping[str, str] | None = None) -> Expected:
    """What should be at ``root``, of a kind of :data:`KINDS`.

    Raises:
        FileNotFoundError: the folder or the table is not there.
        ValueError: an unknown kind, columns of what is no table, or a table that cannot be understood at all.
    """
    if kind not in _READERS:
        raise LipsimError(f"expected a kind among {', '.join(KINDS)}, got {kind!r}")
    if kind == "table":
        return _table(root, columns)
    if columns:
        raise LipsimError(f"a table alone has columns to name, got {', '.join(columns)} for data of the kind {kind!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"no data at {root.absolute()}: there is no such folder")
    return _READERS[kind](root)


def _nights(root: Path) -> Expected:
    refused: list[str] = []
    splits = {split: nights.read_nights(root, split, 0, refused) for split in ("train", "val", "test")}
    rows = [row for split in splits.values() for row in split]
    files = _sorted(str(PurePosixPath(path)) for row in rows for path in row.paths)
    problems = [Problem(nights.TABLE, "table", reason) for reason in dict.fromkeys(refused)]
    twice = [name for name, times in Counter(row.id for row in rows).items() if times > 1]
    problems += [Problem(nights.TABLE, "table", f"the id {name} is there more than once") for name in twice]
    counts = [Count("triplets", len(rows), PUBLISHED_NIGHTS)]
    counts += [
        Count(f"{split}, {nights.MIN_VOTES} votes or more", sum(row.votes >= nights.MIN_VOTES for row in found))
        for split, found in splits.items()
    ]
    return Expected(root, files, tuple(counts), tuple(problems))


def _bapps(root: Path) -> Expected:
    counts, problems, files = [], [], []
    for part, subsets in PUBLISHED_BAPPS.items():
        for subset, published in subsets.items():
            whole, missing, twice = bapps.scan_subset(root, part, subset)
            files += [file for triplet in whole for file in triplet]
            problems += [Problem(path, "missing", "no such file or folder") for path in missing]
            problems += [Problem(path, "twice", "two files of one name") for path in twice]
            counts.append(Count(f"{part}/{subset}", len(whole), published, rounded_to=100))
    return Expected(root, _sorted(files), tuple(counts), tuple(problems))


def _material(root: Path) -> Expected:
    folder = root / material.IMAGES
    names = [path.name for path in folder.glob("[!.]*.jpg")] if folder.is_dir() else []
    counts, problems = [Count("images", len(names), material.NUM_IMAGES)], []
    for part, published in PUBLISHED_MATERIAL.items():
        try:
            found = len(material.load_material_answers(root, part).ids)
        except FileNotFoundError:
            problems.append(Problem(material.ANSWERS.format(part=part), "missing", "no such file"))
        except LipsimError as error:
            problems.append(Problem(material.ANSWERS.format(part=part), "unreadable", str(error)))
        else:
            counts.append(Count(f"{part} judgements without a tie", found, published))
    return Expected(root, _sorted(f"{material.IMAGES}/{name}" for name in names), tuple(counts), tuple(problems))


def _folder(root: Path) -> Expected:
    listed = list_images(root)
    # By the first folder: train and val of an ImageNet, classes elsewhere, of which there may be thousands.
    parts = Counter(os.fsdecode(name).split("/")[0] if b"/" in name else "." for name in listed.names.tolist())
    counts = [Count("images", len(listed.names))]
    if 1 < len(parts) <= 20:
        counts += [Count(f"images in {part}", number) for part, number in sorted(parts.items())]
    return Expected(root, listed.names, tuple(counts), passed_over=listed.skipped)


def _table(file: Path, columns: Mapping[str, str] | None) -> Expected:
    if file.is_dir():
        raise LipsimError(f"expected the CSV file of a table, got the folder {file}")
    rows, triplets = read_triplet_rows(file, columns)
    problems = [Problem(f"{file.name}:{row.line}", "table", problem) for row in rows for problem in row.problems]
    if (problem := too_many_groups(triplets, columns)) is not None:
        problems.append(Problem(f"{file.name}:1", "table", problem))
    splits = Counter(triplet.split for triplet in triplets if triplet.split)
    counts = [Count("triplets", len(triplets)), *(Count(split, number) for split, number in sorted(splits.items()))]
    return Expected(file.parent, _sorted(path for row in rows for path in row.paths), tuple(counts), tuple(problems))


_READERS: dict[str, Callable[..., Expected]] = {
    "nights": _nights,
    "bapps": _bapps,
    "material": _material,
    "folder": _folder,
    "table": _table,
}
KINDS = tuple(_READERS)


def _sorted(paths: Iterable[str]) -> np.ndarray:
    names = sorted({os.fsencode(path) for path in paths})
    return np.array(names) if names else np.empty(0, dtype="S1")
