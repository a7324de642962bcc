"""Images with opinion scores: pairs of a reference and a distorted image in a CSV file beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipsim.data.sets.columns import choose_columns, read_rows, refuse_problems, require_columns
from lipsim.data.transforms import Preprocess, load_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

COLUMNS = ("reference", "distorted", "mos", "dmos")
IMAGES = ("reference", "distorted")
SCORES = ("mos", "dmos")


@dataclass(frozen=True)
class PairTable:
    """Pairs of images with the opinion of people on each.

    Attributes:
        file: the table.
        images: the distinct images, paths relative to the folder of the table, sorted.
        pairs: ``(N, 2)`` int64: reference and distorted image of each pair, positions among the images.
        kind: "mos" (high: similar, good) or "dmos" (high: different, bad), the column of the scores.
        scores: ``(N,)`` float64, as the table has them.
    """

    file: Path
    images: tuple[str, ...]
    pairs: Tensor
    kind: str
    scores: np.ndarray

    @classmethod
    def read(cls, file: str | Path, columns: Mapping[str, str] | None = None) -> PairTable:
        """Read a table with the columns ``reference``, ``distorted``, and ``mos`` or ``dmos``; others are ignored.

        Args:
            file: a CSV file; its paths are relative to its folder.
            columns: what columns are called in the file: our name → its name; None: by our names.

        Raises:
            FileNotFoundError: no such file, or images that it names are missing; the message has the lines.
            ValueError: no such table, or rows with anything wrong in them (each is told with its line).
        """
        names = choose_columns(columns, COLUMNS)
        rows = read_rows(file, names, columns)
        kinds = [kind for kind in SCORES if kind in rows[0].cells]
        kinds = [kind for kind in kinds if kind in (columns or {})] or kinds
        if len(kinds) > 1:
            raise LipsimError(f"{file} has both mos and dmos; name the one that counts, as mos=mos or dmos=dmos")
        require_columns(file, rows, names, IMAGES)
        if not kinds:
            raise LipsimError(
                f"{file} has no scores: expected a column mos (high: similar) or dmos (high: different); name the one "
                "that stands for it, as dmos=COLUMN"
            )
        (kind,) = kinds
        paths = [tuple(row.path(name) for name in IMAGES) for row in rows]
        scores = [row.number(kind) for row in rows]
        refuse_problems(file, rows)
        images = tuple(sorted({path for pair in paths for path in pair}))
        place = {path: position for position, path in enumerate(images)}
        pairs = torch.tensor([[place[path] for path in pair] for pair in paths])
        return cls(user_path(file), images, pairs, kind, np.array(scores))

    @property
    def difference(self) -> np.ndarray:
        """``(N,)`` scores that are high where people see a difference, as distances are: DMOS, or MOS negated."""
        return self.scores if self.kind == "dmos" else -self.scores

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, positions: Sequence[int], preprocess: Preprocess) -> Tensor:
        """Some of the distinct images, ``(M, 3, S, S)`` in [0, 1].

        Raises:
            ValueError: one cannot be read.
        """
        return load_images((self.file.parent / self.images[i] for i in positions), preprocess)
