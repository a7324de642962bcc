"""Which image files belong together: one and many, two folders by the names in them, patterns."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from lipsim.data.sets.columns import choose_columns, read_rows, refuse_problems, require_columns
from lipsim.data.sets.folder import list_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

COLUMNS = ("left", "right")


@dataclass(frozen=True)
class FilePairs:
    """Pairs of image files.

    Attributes:
        pairs: the files, left and right.
        names: what each pair is called: its name in both folders, or that of the right file.
        alone: files without a partner in the other folder.
        skipped: what was passed over in folders, in words.
    """

    pairs: tuple[tuple[Path, Path], ...]
    names: tuple[str, ...]
    alone: tuple[Path, ...] = ()
    skipped: str = ""

    def __len__(self) -> int:
        return len(self.pairs)


def pair_files(left: str | Path, right: Sequence[str | Path]) -> FilePairs:
    """The pairs that two arguments of a command mean.

    One image on the left is paired with every image on the right. Many on the left (a folder, or a pattern such as
    ``a/*.png``) are paired with those on the right that have the same name; see :func:`match_names`. A pattern that one
    file matches is one image, but on the left beside many: a folder that has one file today is matched by name as well.

    Args:
        left: an image, a folder or a pattern.
        right: the same; several where the left is one image.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: many images on the left and several arguments on the right, or no two names that match.
    """
    ours = find_images(left)
    if isinstance(ours, FoundImages) and (one := _only_match(left, ours)) is not None:
        if len(right) != 1 or _only_match(right[0], find_images(right[0])) is not None:
            ours = one
    if isinstance(ours, Path):
        found = [find_images(one) for one in right]
        files = [file for one in found for file in ([one] if isinstance(one, Path) else one.files.values())]
        return FilePairs(
            tuple((ours, file) for file in files),
            tuple(map(str, files)),
            skipped="; ".join(one.skipped for one in found if isinstance(one, FoundImages) and one.skipped),
        )
    if len(right) != 1:
        raise LipsimError(
            f"{left} has many images, which are matched by name with those of one folder or one pattern; got "
            f"{len(right)} arguments beside it (put a pattern in quotes, or the shell replaces it)"
        )
    theirs = find_images(right[0])
    if isinstance(theirs, Path):
        raise LipsimError(f"{left} has many images and {right[0]} is one; to compare one with many, give the one first")
    return match_names(ours, theirs)


@dataclass(frozen=True)
class FoundImages:
    """The images of a folder or a pattern.

    Attributes:
        files: name, relative to the folder or to what the pattern has in common, with / → file; sorted.
        skipped: what was passed over, in words.
    """

    files: Mapping[str, Path]
    skipped: str = ""


def find_images(argument: str | Path) -> Path | FoundImages:
    """The image file that an argument names, or the many of a folder or a pattern.

    Raises:
        FileNotFoundError: no such file and no such folder, or nothing matches the pattern.
    """
    path = user_path(argument)
    if path.is_dir():
        return folder_images(path)
    if path.exists() or not glob.has_magic(str(path)):
        if not path.exists():
            raise FileNotFoundError(f"no image file {argument}")
        return path
    matches = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
    if not matches:
        raise FileNotFoundError(f"no image file matches {argument}")
    above = os.path.commonpath([os.path.dirname(file) or "." for file in matches])
    return FoundImages({Path(os.path.relpath(file, above)).as_posix(): Path(file) for file in matches})


def _only_match(argument: str | Path, found: Path | FoundImages) -> Path | None:
    """The image that an argument other than a folder stands for, if it is one."""
    if isinstance(found, Path):
        return found
    return next(iter(found.files.values())) if len(found.files) == 1 and not user_path(argument).is_dir() else None


def folder_images(folder: str | Path) -> FoundImages:
    """The images under a folder, at any depth.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    path = user_path(folder)
    listed = list_images(path)
    names = [os.fsdecode(bytes(name)) for name in listed.names]
    skipped = f"passed over in {folder}: {listed.skipped}" if listed.skipped else ""
    return FoundImages({PurePath(name).as_posix(): path / name for name in names}, skipped)


def match_names(left: FoundImages, right: FoundImages) -> FilePairs:
    """Pairs of the same name; of what is left, those that differ in the ending alone, as ``x.png`` and ``x.jpg``.

    Raises:
        ValueError: no two match.
    """
    names = {name: name for name in left.files if name in right.files}
    ours, theirs = (_stems(side.files, names) for side in (left, right))
    names |= {ours[stem]: theirs[stem] for stem in ours if stem in theirs}
    pairs = {name: (left.files[name], right.files[names[name]]) for name in sorted(names)}
    if not pairs:
        raise LipsimError(
            f"no image on the left has the name of one on the right; the first are {next(iter(left.files))} and "
            f"{next(iter(right.files))}: give them the same names, or say in a CSV file which belong together"
        )
    paired = {file for pair in pairs.values() for file in pair}
    alone = tuple(file for side in (left, right) for file in side.files.values() if file not in paired)
    skipped = "; ".join(side.skipped for side in (left, right) if side.skipped)
    return FilePairs(tuple(pairs.values()), tuple(pairs), alone, skipped)


def read_pairs(file: str | Path) -> FilePairs:
    """The pairs of a CSV file with the columns ``left`` and ``right``; see :func:`read_paths`."""
    pairs = tuple((left, right) for left, right in read_paths(file, COLUMNS))
    folder = user_path(file).parent
    return FilePairs(pairs, tuple(", ".join(path.relative_to(folder).as_posix() for path in pair) for pair in pairs))


def read_paths(file: str | Path, columns: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files in some columns of a CSV file, row by row; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: no such file, or images that it names are missing; the message has the lines.
        ValueError: it is no such table, or anything is wrong with a row.
    """
    names = choose_columns(None, columns)
    rows = read_rows(file, names)
    require_columns(file, rows, names, columns)
    paths = [tuple(row.path(name) for name in columns) for row in rows]
    refuse_problems(file, rows)
    return [tuple(user_path(file).parent / path for path in row) for row in paths]


def _stems(files: Mapping[str, Path], taken: Mapping[str, str]) -> dict[str, str]:
    """Name without its ending → name, of those that are not taken and share it with no other."""
    stems = {name: PurePath(name).with_suffix("").as_posix() for name in files if name not in taken}
    counts = Counter(stems.values())
    return {stem: name for name, stem in stems.items() if counts[stem] == 1}
