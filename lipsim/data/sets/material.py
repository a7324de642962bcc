"""Human similarity judgements on rendered materials (Lagunas et al. 2019), from a clone of their repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.certificates.numbers import check_count
from lipsim.data.ordinal import implied_votes
from lipsim.data.transforms import Preprocess, load_images
from lipsim.data.triplet import SharedTriplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

IMAGES = "data/havran1_ennis_298x298_LDR"
ANSWERS = "data/answers_processed_{part}.json"
NUM_IMAGES = 100


@dataclass(frozen=True)
class MaterialAnswers:
    """Judgements on images by number, sides shuffled.

    Attributes:
        ids: ``(N, 3)`` int64: reference, left, right, positions among the images of :func:`load_material_images`.
        right_vote: ``(N,)`` float32, the fraction of the judges who chose right.
    """

    ids: Tensor
    right_vote: Tensor

    def select(self, rows: Tensor) -> MaterialAnswers:
        """Some of the judgements, by a mask or by positions."""
        return MaterialAnswers(self.ids[rows], self.right_vote[rows])


class MaterialTriplets(Dataset[Any]):
    """Triplets over the 100 images, fetched in batches that hold each distinct image once.

    Args:
        images: ``(M, 3, S, S)``, see :func:`load_material_images`.
        answers: the judgements to serve.
        preprocess: what the images were made with.

    Attributes:
        groups: none: the parts of the judgements are sets of their own, see :func:`split_material`.
    """

    def __init__(self, images: Tensor, answers: MaterialAnswers, preprocess: Preprocess) -> None:
        self.images, self.answers, self.preprocess = images, answers, preprocess
        self.groups: dict[str, Tensor] = {}

    def with_implied(self, count: int, *, seed: int = 0, progress: Progress | None = None) -> MaterialTriplets:
        """These and ``count`` more triplets of the same images, see :func:`lipsim.data.ordinal.implied_votes`.

        Raises:
            ValueError: as there.
        """
        ids, votes = implied_votes(self.answers.ids, self.answers.right_vote, count, seed=seed, progress=progress)
        both = MaterialAnswers(
            torch.cat([self.answers.ids, ids]), torch.cat([self.answers.right_vote, votes.to(self.answers.right_vote)])
        )
        return MaterialTriplets(self.images, both, self.preprocess)

    def __len__(self) -> int:
        return len(self.answers.ids)

    def manifest(self) -> list[str]:
        """What the set consists of, a line a triplet; see :func:`lipsim.data.loading.data_fingerprint`."""
        votes = self.answers.right_vote.tolist()
        return [f"{ids} {vote}" for ids, vote in zip(self.answers.ids.tolist(), votes, strict=True)]

    def __getitem__(self, index: int) -> SharedTriplet:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> SharedTriplet:
        """A batch for the given positions; ``DataLoader`` calls this with a whole batch at once."""
        rows = torch.tensor(indices)
        used, ids = torch.unique(self.answers.ids[rows], return_inverse=True)
        return SharedTriplet(self.images[used], ids, self.answers.right_vote[rows], rows)


def load_material_images(root: str | Path, preprocess: Preprocess) -> tuple[Tensor, list[str]]:
    """The images by file name, ``(100, 3, S, S)`` float32 in [0, 1], and their names.

    They are resized from 298 × 298 as ``preprocess``, a metric's, has it. The answers count the sorted file names with
    their extension: "chrome-steel.jpg" comes before "chrome.jpg".

    Raises:
        FileNotFoundError: ``root`` is no clone of the repository; the message says where to get it.
        ValueError: an image cannot be read, or some are missing.
    """
    folder = user_path(root) / IMAGES
    files = sorted(folder.glob("[!.]*.jpg")) if folder.is_dir() else []  # without the ._NAME files of macOS
    if not files:
        raise FileNotFoundError(_missing(root, f"{IMAGES}/*.jpg"))
    if len(files) != NUM_IMAGES:
        raise LipsimError(f"expected {NUM_IMAGES} images in {folder}, the answers count them; found {len(files)}")
    return load_images(files, preprocess), [file.name for file in files]


def load_material_answers(
    root: str | Path, part: str = "train", *, ties: bool = False, seed: int = 0
) -> MaterialAnswers:
    """The judgements of one part, with the sides exchanged at random: on disk, the majority's choice comes first.

    Args:
        root: clone of the repository.
        part: "train" or "test".
        ties: whether to keep triplets with a tied vote; no score by majority and no hinge can use them.
        seed: of the exchange, which depends on the position in the file.

    Raises:
        FileNotFoundError: the file of this part is not there.
        ValueError: it is not of the published layout.
    """
    file = user_path(root) / ANSWERS.format(part=part)
    if not file.is_file():
        raise FileNotFoundError(_missing(root, ANSWERS.format(part=part)))
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        suffix = "" if ties else "_diff"
        ids = np.asarray(content[f"answers{suffix}"], dtype=np.int64).reshape(-1, 3)
        votes = np.asarray(content[f"agreement{suffix}"], dtype=np.float64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError) as error:
        raise LipsimError(f"{file} is not in the published layout ({error!r}); clone the repository again") from error
    if len(ids) != len(votes) or not len(ids) or ids.min() < 0 or ids.max() >= NUM_IMAGES or (votes.sum(1) <= 0).any():
        raise LipsimError(f"{file} is not in the published layout (counts or indices do not match); clone it again")
    right_share = votes[:, 1] / votes.sum(1)
    swap = np.random.default_rng(seed).random(len(ids)) < 0.5
    ids = np.where(swap[:, None], ids[:, [0, 2, 1]], ids)
    right_vote = np.where(swap, 1 - right_share, right_share)
    return MaterialAnswers(torch.from_numpy(ids), torch.from_numpy(right_vote.astype(np.float32)))


@dataclass(frozen=True)
class MaterialSplit:
    """Training judgements and two validation sets that are never trained on.

    Attributes:
        train: what is left.
        triplets: triplets drawn at random; their images occur in training, in other triplets.
        materials: all triplets that touch one of the held-out materials, which training never shows.
        unseen: those of ``materials`` that show held-out ones alone.
        held_out: numbers of these materials.
    """

    train: MaterialAnswers
    triplets: MaterialAnswers
    materials: MaterialAnswers
    unseen: MaterialAnswers
    held_out: list[int]


def split_material(
    answers: MaterialAnswers, *, num_triplets: int = 2000, num_materials: int = 20, seed: int = 0
) -> MaterialSplit:
    """Hold out materials first, then triplets among those that are left; the same for a given seed.

    Raises:
        ValueError: impossible counts, or nothing would be left to train on.
    """
    check_count("num_triplets", num_triplets, least=0)
    if check_count("num_materials", num_materials, least=0) > NUM_IMAGES:
        raise LipsimError(f"expected at most {NUM_IMAGES} materials to hold out, got num_materials = {num_materials}")
    rng = np.random.default_rng(seed)
    held_out = sorted(rng.choice(NUM_IMAGES, size=num_materials, replace=False).tolist())
    unseen = torch.isin(answers.ids, torch.tensor(held_out, dtype=torch.int64))
    touched = unseen.any(1)
    rest = torch.from_numpy(rng.permutation((~touched).nonzero().flatten().numpy()))
    if len(rest) <= num_triplets:
        raise LipsimError(f"{num_triplets} validation triplets and {num_materials} materials leave nothing to train on")
    return MaterialSplit(
        train=answers.select(rest[num_triplets:]),
        triplets=answers.select(rest[:num_triplets]),
        materials=answers.select(touched),
        unseen=answers.select(unseen.all(1)),
        held_out=held_out,
    )


def _missing(root: str | Path, what: str) -> str:
    return (
        f"no Material data at {Path(root).absolute()}: {what} is missing; clone the public GitHub repository "
        "mlagunas/material-appearance-similarity and pass its folder as --data.root"
    )
