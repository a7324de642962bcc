"""BAPPS 2AFC: human judgements on distorted patches (Zhang et al., CVPR 2018), from a local folder."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.data.images import image_source
from lipsim.data.pack import ImagePack
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import read_array, sha256
from lipsim.utils.paths import user_path

SUBSETS = {
    "train": ("traditional", "cnn", "mix"),
    "val": ("traditional", "cnn", "superres", "deblur", "color", "frameinterp"),
}
_PARTS = ("ref", "p0", "p1", "judge")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm")
_READ_THREADS = 16  # which wait for a network disk, not for a processor


class BappsTriplets(Dataset[Triplet]):
    """Triplets of some subsets, one subset after the other and sorted by name; files are read when they are asked for.

    Left is ``p0`` and right ``p1``; the vote is the fraction of judges who chose ``p1``, never rounded. The published
    score is ``TwoAFCScore("vote")`` of each subset (its code resizes to a short side of 64, bilinear).

    Args:
        root: folder that has ``2afc/{train,val}/{subset}/{ref,p0,p1,judge}/``.
        part: "train" or "val".
        preprocess: a metric's ``preprocess``, from image files to ``(3, S, S)`` in [0, 1].
        subsets: names of the subsets; None: all that were published (:data:`SUBSETS`).
        pack: a pack of ``root`` to read the images from, or its folder; None: from their files. The folder is listed
            all the same, and has the judgements.
        eight_bit: serve images in eight bits where nothing is lost, see :class:`lipsim.data.images.EightBitImages`.

    Attributes:
        files: reference, p0, p1 and judgement of each triplet, relative to ``root``.
        groups: the subsets by name, ``(N,)`` bool masks.

    Raises:
        FileNotFoundError: a subset or one of its files is missing, where the message says where to get them; or an
            image is not in the pack.
        ValueError: an unknown part, no subset, or an image of two files.
    """

    def __init__(
        self,
        root: str | Path,
        part: str,
        preprocess: Preprocess,
        subsets: Sequence[str] | None = None,
        pack: str | Path | ImagePack | None = None,
        *,
        eight_bit: bool = False,
    ) -> None:
        if part not in SUBSETS:
            raise LipsimError(f"expected a part among {', '.join(SUBSETS)}, got {part!r}")
        names = list(dict.fromkeys(SUBSETS[part] if subsets is None else subsets))
        if not names:
            raise LipsimError("expected at least one subset of BAPPS, got none")
        self.root, self.preprocess = user_path(root), preprocess
        self.images = image_source(self.root, preprocess, pack, eight_bit=eight_bit)
        by_subset = [_list_subset(self.root, part, name) for name in names]
        self.files = [files for listed in by_subset for files in listed]
        # Folders were listed; a pack may be older.
        if pack is not None and (missing := self.images.missing(n for *names, _ in self.files for n in names)):
            raise FileNotFoundError(f"{len(missing)} images ({missing[0]}, …) are not in the pack {pack}")
        self._subset_names = names
        self._subset = torch.arange(len(names)).repeat_interleave(torch.tensor([len(listed) for listed in by_subset]))

    @property
    def groups(self) -> dict[str, Tensor]:
        masks = {name: self._subset == number for number, name in enumerate(self._subset_names)}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def select(self, rows: Tensor) -> Self:
        """The triplets at some positions ``(M,)``, in that order, as a set of their own."""
        chosen = copy.copy(self)
        chosen.files = [self.files[row] for row in rows.tolist()]
        chosen._subset = self._subset[rows]
        return chosen

    def __len__(self) -> int:
        return len(self.files)

    def manifest(self) -> list[str]:
        """What the set consists of, a line a triplet; see :func:`lipsim.data.loading.data_fingerprint`.

        The files of the judgements, which are of some hundred bytes, are read for it.
        """
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            judges = [self.root / judge for *_, judge in self.files]
            votes = list(threads.map(lambda path: sha256(path.read_bytes()), judges))
        return [" ".join((*files, vote)) for files, vote in zip(self.files, votes, strict=True)]

    def __getitem__(self, index: int) -> Triplet:
        """One triplet: images ``(3, S, S)``, scalar vote and index."""
        index = range(len(self))[index]  # IndexError past the end, and negative indices count from it
        *names, judge = self.files[index]
        reference, left, right = map(self.images.load, names)
        vote = torch.tensor(read_judge(self.root / judge), dtype=torch.float32)
        return Triplet(reference, left, right, vote, torch.tensor(index))


def read_judge(path: str | Path) -> float:
    """Fraction of the judges who chose ``p1``, from a .npy file of one number.

    Raises:
        ValueError: the file cannot be read without unpickling, or holds no fraction.
    """
    try:
        value = read_array(Path(path))
        vote = float(value.astype(float).item())
    except (ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        raise LipsimError(f"cannot read the judgement {path} ({error}); download it again") from error
    if not 0 <= vote <= 1:
        raise LipsimError(f"expected a fraction of the judges in {path}, got {vote}; download it again")
    return vote


def scan_subset(root: Path, part: str, subset: str) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """What is there of a subset, what is not, and what is there twice.

    Returns:
        Files of each whole triplet by sorted name (reference, p0, p1, judgement); the files and folders that are
        missing, and the files beside which there is another of another ending; all relative to ``root``, the last two
        without their ending.
    """
    folder = f"2afc/{part}/{subset}"
    stems: dict[str, dict[str, str]] = {}
    missing, twice = [], []
    for kind in _PARTS:
        endings = (".npy",) if kind == "judge" else _IMAGES
        path = root / folder / kind
        if not path.is_dir():
            missing.append(f"{folder}/{kind}/")
            continue
        files = (entry for entry in path.iterdir() if entry.suffix.lower() in endings and entry.name[0] != ".")
        named = [(entry.stem, f"{folder}/{kind}/{entry.name}") for entry in files]
        stems[kind] = dict(named)
        twice += sorted(f"{folder}/{kind}/{stem}" for stem, count in Counter(s for s, _ in named).items() if count > 1)
    names = sorted(set().union(*stems.values()))
    missing += [f"{folder}/{kind}/{name}" for name in names for kind in stems if name not in stems[kind]]
    whole = [name for name in names if all(name in stems.get(kind, {}) for kind in _PARTS)]
    return [tuple(stems[kind][name] for kind in _PARTS) for name in whole], missing, twice


def _list_subset(root: Path, part: str, subset: str) -> list[tuple[str, ...]]:
    """Files of each triplet of a subset, by sorted name: reference, p0, p1, judgement."""
    triplets, missing, twice = scan_subset(root, part, subset)
    if twice:  # which of them was judged is not known
        raise LipsimError(f"{len(twice)} images of BAPPS have two files, such as {twice[0]}; keep the published ones")
    absent = [path for path in missing if path.endswith("/")]
    if absent:
        raise FileNotFoundError(_missing(root, f"the folder {absent[0].removesuffix('/')} is"))
    if missing:
        raise FileNotFoundError(_missing(root, f"{len(missing)} files ({missing[0]}, …) are"))
    if not triplets:
        raise FileNotFoundError(_missing(root, f"every file in 2afc/{part}/{subset} is"))
    return triplets


def _missing(root: Path, what: str) -> str:
    return (
        f"no BAPPS data at {root.absolute()}: {what} missing; run scripts/download_dataset.sh of the public GitHub "
        "repository richzhang/PerceptualSimilarity and pass the folder that has 2afc/ as --data.root"
    )
