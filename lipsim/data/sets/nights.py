"""NIGHTS: human 2AFC judgements on synthetic variations of images (Fu et al., NeurIPS 2023), from a local folder."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch.utils.data import Dataset

from lipsim.data.images import image_source
from lipsim.data.pack import ImagePack
from lipsim.data.sets.columns import path_fault
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Split, Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

TABLE = "data.csv"
MIN_VOTES = 6
COLUMNS = ("id", "left_vote", "right_vote", "votes", "ref_path", "left_path", "right_path", "split", "is_imagenet")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class NightsRow:
    """One line of data.csv.

    Attributes:
        id: as the file has it.
        right_vote: 1 where right won, 0 where left did.
        votes: number of judges who agreed.
        paths: reference, left and right, relative to the folder, as given.
        is_imagenet: whether the reference is an image of ImageNet.
    """

    id: str
    right_vote: float
    votes: int
    paths: tuple[str, str, str]
    is_imagenet: bool


class NightsTriplets(Dataset[Triplet]):
    """The triplets of one split in the order of data.csv; images are read when they are asked for.

    Args:
        root: folder with data.csv, ref/ and distort/.
        split: "train", "val" or "test".
        preprocess: a metric's ``preprocess``, from image files to ``(3, S, S)`` in [0, 1].
        min_votes: triplets with fewer agreeing judges are left out; the published benchmark keeps 6 and more.
        pack: a pack of ``root`` to read the images from, or its folder; None: from their files.
        eight_bit: serve images in eight bits where nothing is lost, see :class:`lipsim.data.images.EightBitImages`.

    Attributes:
        rows: what data.csv says of each triplet, by the index of the triplet.
        right_vote: ``(N,)`` float32, the winner; the file has no fractions.
        groups: the published parts of the split that are not empty, "imagenet" and "non_imagenet", ``(N,)`` bool masks.

    Raises:
        FileNotFoundError: the folder, its table or an image is missing; the message says where to get them.
        ValueError: an unknown split, a table of another layout, a row that contradicts itself, or an empty split.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        preprocess: Preprocess,
        *,
        min_votes: int = MIN_VOTES,
        pack: str | Path | ImagePack | None = None,
        eight_bit: bool = False,
    ) -> None:
        if split not in get_args(Split):
            raise LipsimError(f"expected a split among {', '.join(get_args(Split))}, got {split!r}")
        self.root, self.split, self.preprocess = user_path(root), split, preprocess
        self.rows = read_nights(root, split, min_votes)
        if not self.rows:
            raise LipsimError(f"{self.root / TABLE} has no row of the split {split!r} with {min_votes} votes or more")
        self.images = image_source(self.root, preprocess, pack, eight_bit=eight_bit)
        missing = self.images.missing(path for row in self.rows for path in row.paths)
        if missing and pack is not None:
            raise FileNotFoundError(f"{len(missing)} images ({missing[0]}, …) are not in the pack {pack}")
        if missing:
            raise FileNotFoundError(_missing(self.root, f"{len(missing)} images ({missing[0]}, …)"))
        self.right_vote = torch.tensor([row.right_vote for row in self.rows], dtype=torch.float32)
        is_imagenet = torch.tensor([row.is_imagenet for row in self.rows])
        parts = {"imagenet": is_imagenet, "non_imagenet": ~is_imagenet}
        self.groups = {name: mask for name, mask in parts.items() if mask.any()}

    def __len__(self) -> int:
        return len(self.rows)

    def manifest(self) -> list[str]:
        """What the set consists of, a line a triplet; see :func:`lipsim.data.loading.data_fingerprint`."""
        return [f"{row.id} {row.right_vote} {' '.join(row.paths)} {row.is_imagenet}" for row in self.rows]

    def __getitem__(self, index: int) -> Triplet:
        """One triplet: images ``(3, S, S)``, scalar vote and index."""
        index = range(len(self))[index]  # IndexError past the end, and negative indices count from it
        reference, left, right = map(self.images.load, self.rows[index].paths)
        return Triplet(reference, left, right, self.right_vote[index], torch.tensor(index))


def read_nights(
    root: str | Path, split: Split, min_votes: int = MIN_VOTES, refused: list[str] | None = None
) -> list[NightsRow]:
    """The rows of one split of data.csv with at least ``min_votes`` agreeing judges, columns by their names.

    Args:
        root: folder with data.csv.
        split: "train", "val" or "test".
        min_votes: rows with fewer are left out.
        refused: takes what is wrong with lines, which are left out then; None: the first of them is an error.

    Raises:
        FileNotFoundError: there is no data.csv.
        ValueError: it is not in the published layout; the message names column or line.
    """
    file = user_path(root) / TABLE
    if not file.is_file():
        raise FileNotFoundError(_missing(root, TABLE))
    rows = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise LipsimError(f"it has no column {', '.join(missing)}")
            for line in reader:
                try:
                    if line["split"] not in get_args(Split):
                        raise LipsimError(f"split is {line['split']!r}")
                    votes = float(line["votes"])
                    if not 0 <= votes < math.inf:
                        raise LipsimError(f"votes is {line['votes']!r}")
                    if line["split"] == split and votes >= min_votes:
                        rows.append(_row(line))
                except (ValueError, TypeError) as error:  # TypeError: the line is short, its cells are None
                    if refused is None:
                        raise LipsimError(f"line {reader.line_num}: {error}") from error
                    refused.append(f"line {reader.line_num}: {error}")
    except (ValueError, csv.Error) as error:
        raise LipsimError(f"{file} is not in the published layout ({error}); download it again") from error
    return rows


def _row(line: dict[str, str]) -> NightsRow:
    if None in line.values():
        raise LipsimError("the line ends early")
    left, right = float(line["left_vote"]), float(line["right_vote"])
    if {left, right} != {0.0, 1.0}:
        raise LipsimError(f"expected one winner, got left_vote {line['left_vote']} and right_vote {line['right_vote']}")
    is_imagenet = _BOOLEANS.get(line["is_imagenet"].lower())
    if is_imagenet is None:
        raise LipsimError(f"is_imagenet is {line['is_imagenet']!r}")
    reference, left_path, right_path = line["ref_path"], line["left_path"], line["right_path"]
    if not (reference and left_path and right_path):
        raise LipsimError("a path is empty")
    for path in (reference, left_path, right_path):
        if (fault := path_fault(path)) is not None:
            raise LipsimError(f"a path is {fault}")
    return NightsRow(line["id"], right, int(float(line["votes"])), (reference, left_path, right_path), is_imagenet)


def _missing(root: str | Path, what: str) -> str:
    return (
        f"no NIGHTS data at {Path(root).absolute()}: {what} missing; download and unpack "
        "https://data.csail.mit.edu/nights/nights.zip (58 GB, see the public GitHub repository ssundaram21/dreamsim) "
        "and pass the folder that has data.csv as --data.root"
    )
