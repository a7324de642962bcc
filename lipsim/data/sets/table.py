"""Anyone's 2AFC study: triplets with votes in a CSV file beside the images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.certificates.numbers import check_number
from lipsim.data.images import ImageSource, image_source
from lipsim.data.ordinal import implied_votes
from lipsim.data.pack import ImagePack
from lipsim.data.sets.columns import Row, choose_columns, read_rows, refuse_problems, require_columns
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Split, Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

COLUMNS = ("reference", "left", "right", "right_vote", "left_votes", "right_votes", "split", "group")
IMAGES = ("reference", "left", "right")
COUNTS = ("left_votes", "right_votes")
SPLITS: tuple[str, ...] = get_args(Split)
PARTS = ("all", *SPLITS)
# Each is scored apart; more are nearly always a column that was meant for something else.
MOST_GROUPS = 100


@dataclass(frozen=True)
class TableRow:
    """One judged triplet.

    Attributes:
        line: its number in the file.
        paths: reference, left and right, relative to the folder of the file.
        right_vote: fraction of the judges who chose right.
        split: which part it is in; empty where the table does not say.
        group: which triplets it is scored with apart; empty for none.
    """

    line: int
    paths: tuple[str, str, str]
    right_vote: float
    split: str = ""
    group: str = ""


class TableTriplets(Dataset[Triplet]):
    """The triplets of a CSV file in its order; images are read when they are asked for.

    The columns are ``reference``, ``left`` and ``right``, paths relative to the folder of the file; ``right_vote``, the
    fraction of the judges who chose right, or the counts ``left_votes`` and ``right_votes``; and where they are there,
    ``split`` (train, val or test) and ``group`` (a name; each group is scored apart as well). Others are ignored.

    A table without ``split`` is divided by *reference image*: all triplets of a reference are in one part, so that none
    is judged on a reference that it was trained on. Candidates may occur in several parts.

    Args:
        file: the table.
        preprocess: a metric's ``preprocess``, from image files to ``(3, S, S)`` in [0, 1].
        part: "train", "val", "test", or "all".
        columns: what columns are called in the file: our name → its name; None: by our names.
        val_fraction: share of the references that are for validation, where the table has no ``split``.
        test_fraction: share of those that are for testing, drawn first; 1: all of them.
        seed: of that draw.
        pack: a pack of the table's folder to read the images from, or its folder; None: from their files.
        eight_bit: serve images in eight bits where nothing is lost, see :class:`lipsim.data.images.EightBitImages`.

    Attributes:
        rows: what the table says of each triplet, by the index of the triplet.
        groups: ``(N,)`` bool masks, by name.

    Raises:
        FileNotFoundError: no such file, or images that it names are missing; the message has the lines.
        ValueError: no such table, rows with anything wrong in them (each is told with its line), shares above 1
            together (but for a ``test_fraction`` of 1), or an empty part.
    """

    def __init__(
        self,
        file: str | Path,
        preprocess: Preprocess,
        part: str = "all",
        *,
        columns: Mapping[str, str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        pack: str | Path | ImagePack | None = None,
        eight_bit: bool = False,
    ) -> None:
        self.file, self.preprocess = user_path(file), preprocess
        self.images = image_source(self.file.parent, preprocess, pack, eight_bit=eight_bit)
        self.rows = read_triplets(file, columns, self.images)
        self._fractions = (
            check_number("val_fraction", val_fraction, most=1),
            check_number("test_fraction", test_fraction, most=1),
        )
        if sum(self._fractions) > 1 + 1e-9 and test_fraction < 1:  # 1: all of them, whatever was for validation
            raise LipsimError(
                f"expected val_fraction and test_fraction of at most 1 together, got {val_fraction:g} and "
                f"{test_fraction:g}"
            )
        # Of the whole table, so that a part of a part is no other division.
        self._split_of = {} if self.rows[0].split else self._divided(seed)
        if part != "all":
            self.rows = self.part(part).rows

    @property
    def groups(self) -> dict[str, Tensor]:
        names = sorted({row.group for row in self.rows} - {""})
        numbers = {name: number for number, name in enumerate(names)}
        each = torch.tensor([numbers.get(row.group, -1) for row in self.rows])
        return {name: each == number for name, number in numbers.items()}

    def part(self, name: str) -> Self:
        """The triplets of one of :data:`PARTS` as a set of their own.

        Raises:
            ValueError: there is no such part, or nothing is in it.
        """
        if name not in PARTS:
            raise LipsimError(f"expected a part among {', '.join(PARTS)}, got {name!r}")
        if name == "all":
            return self.select(range(len(self)))
        divided = bool(self._split_of)
        splits = [self._split_of[row.paths[0]] if divided else row.split for row in self.rows]
        rows = [position for position, split in enumerate(splits) if split == name]
        if not rows:
            count = len({row.paths[0] for row in self.rows})
            val, test = self._fractions
            raise LipsimError(
                f"nothing of {self.file} is for {name!r}: "
                + (
                    f"its {count} references are divided by val_fraction = {val:g} and test_fraction = {test:g}"
                    if divided
                    else f"its column split has {', '.join(sorted(set(splits)))}"
                )
            )
        return self.select(rows)

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """The triplets at some positions ``(M,)``, in that order, as a set of their own."""
        chosen = copy.copy(self)
        chosen.rows = [self.rows[int(row)] for row in rows]
        return chosen

    def with_implied(self, count: int, *, seed: int = 0, progress: Progress | None = None) -> Self:
        """These and ``count`` more triplets of the same images, see :func:`lipsim.data.ordinal.implied_votes`.

        Those have the line 0, and no group.

        Raises:
            ValueError: as there.
        """
        names = sorted({path for row in self.rows for path in row.paths})
        number = {name: position for position, name in enumerate(names)}
        ids = torch.tensor([[number[path] for path in row.paths] for row in self.rows])
        votes = torch.tensor([row.right_vote for row in self.rows])
        triplets, implied = implied_votes(ids, votes, count, seed=seed, progress=progress)
        both = copy.copy(self)
        both.rows = [
            *self.rows,
            *(
                TableRow(0, (names[reference], names[left], names[right]), vote)
                for (reference, left, right), vote in zip(triplets.tolist(), implied.tolist(), strict=True)
            ),
        ]
        return both

    def _divided(self, seed: int) -> dict[str, str]:
        """Reference → split, drawn; each split that has a share has a reference at least."""
        references = sorted({row.paths[0] for row in self.rows})
        order = torch.randperm(len(references), generator=torch.Generator().manual_seed(seed)).tolist()
        val, test = (round(fraction * len(references)) or int(fraction > 0) for fraction in self._fractions)
        names = ["test"] * test + ["val"] * val + ["train"] * len(references)
        return {references[position]: name for position, name in zip(order, names, strict=False)}

    def __len__(self) -> int:
        return len(self.rows)

    def manifest(self) -> list[str]:
        """What the set consists of, a line a triplet; see :func:`lipsim.data.loading.data_fingerprint`."""
        return [f"{row.right_vote} {' '.join(row.paths)} {row.group}" for row in self.rows]

    def __getitem__(self, index: int) -> Triplet:
        """One triplet: images ``(3, S, S)``, scalar vote and index."""
        index = range(len(self))[index]  # IndexError past the end, and negative indices count from it
        row = self.rows[index]
        reference, left, right = map(self.images.load, row.paths)
        vote = torch.tensor(row.right_vote, dtype=torch.float32)
        return Triplet(reference, left, right, vote, torch.tensor(index))


def read_triplets(
    file: str | Path, columns: Mapping[str, str] | None = None, images: ImageSource | None = None
) -> list[TableRow]:
    """The rows of a table of triplets, checked; see :class:`TableTriplets`.

    Args:
        file: the table.
        columns: what columns are called in the file.
        images: where its images are; None: in its folder.

    Raises:
        FileNotFoundError: no such file, or images that it names are missing.
        ValueError: it is no such table, or anything is wrong with a row.
    """
    rows, found = read_triplet_rows(file, columns)
    refuse_problems(file, rows, images)
    if (problem := too_many_groups(found, columns)) is not None:
        raise LipsimError(f"{file}: {problem}")
    return found


def too_many_groups(found: Sequence[TableRow], columns: Mapping[str, str] | None = None) -> str | None:
    """What is wrong with the groups of a table, if anything is."""
    groups = {triplet.group for triplet in found}
    if len(groups) <= MOST_GROUPS:
        return None
    name = choose_columns(columns, COLUMNS)["group"]
    return (
        f"the column {name} has {len(groups)} values, each of which would be scored apart; expected at most "
        f"{MOST_GROUPS}"
    )


def read_triplet_rows(file: str | Path, columns: Mapping[str, str] | None = None) -> tuple[list[Row], list[TableRow]]:
    """The rows of a table of triplets with what is wrong with each, and what they say; no image is looked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table.
    """
    names = choose_columns(columns, COLUMNS)
    rows = read_rows(file, names, columns)
    counted = any(name in rows[0].cells for name in COUNTS)
    if counted and "right_vote" in rows[0].cells:
        raise LipsimError(f"{file} has both right_vote and counts of votes; keep one of them")
    require_columns(file, rows, names, [*IMAGES, *(COUNTS if counted else ["right_vote"])])
    return rows, [_triplet(row, counted) for row in rows]


def _triplet(row: Row, counted: bool) -> TableRow:
    reference, left, right = (row.path(name) for name in IMAGES)
    if counted:
        # Of judges, or of their weights.
        left_votes, right_votes = (row.number(name, least=0) for name in COUNTS)
        total = left_votes + right_votes
        if total == 0:
            row.refuse("nobody voted: left_votes and right_votes are 0")
        elif total == math.inf:
            row.refuse("left_votes and right_votes have a sum beyond the largest number")
        right_vote = right_votes / total if total else math.nan
    else:
        right_vote = row.number("right_vote", 0, 1)
    split = row.cells.get("split", "")
    if "split" in row.cells and split not in SPLITS:
        row.refuse(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    return TableRow(row.line, (reference, left, right), right_vote, split, row.cells.get("group", ""))
