"""Pairs of images that people call the same or different, to choose a threshold on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lipsim.certificates.numbers import check_count
from lipsim.data.sets.columns import Row, choose_columns, read_rows, refuse_problems, require_columns
from lipsim.data.sets.matching import FilePairs, folder_images, match_names
from lipsim.data.transforms import Preprocess, load_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest, file_sha256
from lipsim.utils.paths import user_path

COLUMNS = ("left", "right", "same")
IMAGES = ("left", "right")
_LABELS = {
    **dict.fromkeys(("1", "true", "yes", "same"), True),
    **dict.fromkeys(("0", "false", "no", "different"), False),
}
DIFFERENT_PER_SAME = 10  # pairs drawn across names


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of images, each the same or different.

    Attributes:
        folder: what the names of images are relative to.
        images: the distinct images, sorted.
        pairs: ``(N, 2)`` int64: left and right image of each pair, positions among the images.
        same: ``(N,)`` bool.
        alone: of two folders, files without a partner in the other, which are in no pair.
        skipped: of two folders, what was passed over there, in words.
    """

    folder: Path
    images: tuple[str, ...]
    pairs: Tensor
    same: Tensor
    alone: tuple[Path, ...] = ()
    skipped: str = ""

    @classmethod
    def read(cls, file: str | Path, columns: Mapping[str, str] | None = None) -> Self:
        """Read a CSV file with the columns ``left``, ``right`` and ``same``; others are ignored.

        ``same`` is 1, true, yes or same, or 0, false, no or different, in any case. Paths are relative to the folder of
        the file.

        Args:
            file: the table.
            columns: what columns are called in the file: our name → its name; None: by our names.

        Raises:
            FileNotFoundError: no such file, or images that it names are missing; the message has the lines.
            ValueError: no such table, rows with anything wrong in them (each is told with its line), or pairs of one
                kind alone.
        """
        names = choose_columns(columns, COLUMNS)
        rows = read_rows(file, names, columns)
        require_columns(file, rows, names, COLUMNS)
        pairs = [(row.path("left"), row.path("right")) for row in rows]
        same = [_label(row) for row in rows]
        refuse_problems(file, rows)
        return cls._of(user_path(file).parent, pairs, same, str(file))

    @classmethod
    def from_folders(cls, left: str | Path, right: str | Path, *, different: int | None = None, seed: int = 0) -> Self:
        """Pair two folders: images of one name are the same, pairs drawn across names are different.

        Args:
            left: a folder of images.
            right: another, with other views of the same things under the same names (endings may differ).
            different: how many different pairs to draw; None: ten for each of the same, or all there are.
            seed: of that draw.

        Raises:
            FileNotFoundError: no such folder, or no image in it.
            ValueError: fewer than two names that match, or more different pairs asked for than there are.
        """
        matched: FilePairs = match_names(folder_images(left), folder_images(right))
        count = len(matched)
        possible = count * (count - 1)
        if count < 2:
            raise LipsimError(f"expected two names or more that {left} and {right} share, got {count}")
        drawn = min(DIFFERENT_PER_SAME * count, possible) if different is None else check_count("different", different)
        if drawn > possible:
            raise LipsimError(f"{count} names make {possible} different pairs, got {drawn} to draw")
        pairs = [(str(one.absolute()), str(other.absolute())) for one, other in matched.pairs]
        # The places of (i, j) with i ≠ j in one row, of which any are drawn without a list of all.
        for place in sorted(random.Random(seed).sample(range(possible), drawn)):
            i, j = divmod(place, count - 1)
            pairs.append((pairs[i][0], pairs[j + (j >= i)][1]))
        same = [True] * count + [False] * drawn
        found = cls._of(Path(), pairs, same, f"{left} and {right}")
        return cls(found.folder, found.images, found.pairs, found.same, matched.alone, matched.skipped)

    @classmethod
    def _of(cls, folder: Path, pairs: Sequence[tuple[str, str]], same: Sequence[bool], source: str) -> Self:
        if all(same) or not any(same):
            raise LipsimError(
                f"expected pairs of both kinds, got {sum(same)} the same and {len(same) - sum(same)} different in "
                f"{source}"
            )
        images = tuple(sorted({name for pair in pairs for name in pair}))
        place = {name: position for position, name in enumerate(images)}
        positions = torch.tensor([[place[name] for name in pair] for pair in pairs])
        return cls(folder, images, positions, torch.tensor(same))

    def __len__(self) -> int:
        return len(self.pairs)

    def file(self, position: int) -> Path:
        """The file of one of the distinct images."""
        return self.folder / self.images[position]

    def load(self, positions: Sequence[int], preprocess: Preprocess) -> Tensor:
        """Some of the distinct images, ``(M, 3, S, S)`` in [0, 1].

        Raises:
            ValueError: one cannot be read.
        """
        return load_images((self.file(position) for position in positions), preprocess)

    def sha256(self) -> str:
        """Of the labels and of the bytes of the files, in the order of the pairs; where they lie does not matter."""
        files = [file_sha256(self.file(position)) for position in range(len(self.images))]
        digest = Digest()
        for (left, right), same in zip(self.pairs.tolist(), self.same.tolist(), strict=True):
            digest.add(f"{files[left]} {files[right]} {int(same)}\n")
        return digest.hexdigest()


def _label(row: Row) -> bool:
    text = row.cells["same"]
    if text.lower() not in _LABELS:
        row.refuse(f"same is {text!r}, expected 1, true, yes or same, or 0, false, no or different")
    return _LABELS.get(text.lower(), False)
