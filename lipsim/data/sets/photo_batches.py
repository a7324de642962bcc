"""Training batches of photographs that share their images: few images to embed, many triplets among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.augment import random_views
from lipsim.data.contracts import TripletSet
from lipsim.data.distortions import DISTORTIONS, distort
from lipsim.data.loading import fetch
from lipsim.data.sets.photos import KINDS, PhotoTriplets, strengths
from lipsim.data.triplet import SharedTriplet, Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_stream


@dataclass(frozen=True)
class SharedImages:
    """How training batches share their images, see :class:`PhotoBatches`.

    Attributes:
        num_batches: in an epoch.
        num_images: pictures in a batch, a multiple of ``per_class``.
        per_class: pictures of each class, 2 at least.
        num_triplets: triplets in a batch, of all kinds.
        num_distorted: pictures of a batch that are distorted twice, which are two more images to embed each.
        num_human: triplets with human votes of a batch, where there are some; each is listed as often as its share
            of ``num_triplets`` takes.
    """

    num_batches: int = 110
    num_images: int = 256
    per_class: int = 8
    num_triplets: int = 16384
    num_distorted: int = 32
    num_human: int = 512


@dataclass(frozen=True)
class HumanVotes:
    """Triplets that people judged, to be mixed into others.

    Attributes:
        triplets: the set.
        share: of a batch, in [0, 1].
        collate: the set's ``collate_fn``: of a list of triplets, or of what its ``__getitems__`` returns.
    """

    triplets: TripletSet
    share: float
    collate: Callable[[Any], Triplet]


class PhotoBatches(Dataset[SharedTriplet]):
    """Whole batches of triplets over few distinct photographs, each seen in a random view.

    A batch draws classes and some pictures of each. Among these are hundreds of thousands of triplets, of which a batch
    lists as many as it is told: an image is embedded once and takes part in hundreds of them, so a step learns far more
    than one of separate triplets at the same cost. Of the kinds of :mod:`lipsim.data.sets.photos`,

    * ``semantic``: two pictures of a class, and one of another class;
    * ``teacher``: any three pictures, judged by the teacher's embeddings of their plain views;
    * ``distortion``: some pictures of the batch, each with a weaker and a stronger distortion of its own.

    A batch is a function of the pictures, ``(seed, index)`` and the arguments but for ``num_batches``.

    Args:
        triplets: the pictures, shares of the kinds and seed; the pictures need classes.
        batches: their sizes.
        human: votes that are mixed in; the shares of the kinds are of the rest.

    Raises:
        ValueError: a size outside its range, or fewer classes of two pictures than a batch has.
    """

    def __init__(self, triplets: PhotoTriplets, batches: SharedImages, human: HumanVotes | None = None) -> None:
        check_count("num_batches", batches.num_batches)
        check_count("per_class", batches.per_class, least=2)
        check_count("num_triplets", batches.num_triplets)
        check_count("num_distorted", batches.num_distorted)
        check_count("num_human", batches.num_human)
        num_images, per_class = batches.num_images, batches.per_class
        labels = triplets.store.classes()
        sizes = torch.bincount(labels)
        self._members = [members for members in labels.argsort(stable=True).split(sizes.tolist()) if len(members) > 1]
        classes = num_images // per_class
        if num_images % per_class or classes < 2 or classes > len(self._members) or batches.num_distorted > num_images:
            raise LipsimError(
                f"expected num_images a multiple of per_class = {per_class}, from 2 to {len(self._members)} times that "
                f"(a class of two pictures at least each) and num_distorted at most as many, got {num_images} and "
                f"{batches.num_distorted}"
            )
        self.triplets, self.batches, self.human = triplets, batches, human
        human_share = 0.0 if human is None else check_number("human_share", human.share, most=1.0)
        if human is not None:
            check_count("number of human votes", len(human.triplets))
        self.num_human = round(human_share * batches.num_triplets)
        self.counts = _counts(triplets.kinds, batches.num_triplets - self.num_human)
        self.preprocess = triplets.preprocess

    def __len__(self) -> int:
        return self.batches.num_batches

    def __getitem__(self, index: int) -> SharedTriplet:
        index = range(len(self))[index]  # IndexError past the end
        generator = torch.Generator().manual_seed(int(sample_stream(self.triplets.seed, index).integers(2**63)))
        ids = self._pictures(generator)
        images = random_views(self.triplets.store.floats(ids), generator)
        parts: list[tuple[Tensor, Tensor]] = []
        if count := self.counts["semantic"]:
            parts.append((self._semantic(count, generator), torch.zeros(count)))
        if count := self.counts["teacher"]:
            parts.append(self._judged(count, ids, generator))
        if count := self.counts["distortion"]:
            rows, votes, distorted = self._distorted(count, images, index, generator)
            images = torch.cat([images, distorted])
            parts.append((rows, votes))
        if self.num_human:
            rows, votes, judged = self._human(generator)
            parts.append((rows + len(images), votes))
            images = torch.cat([images, judged])
        rows, votes = (torch.cat(part) for part in zip(*parts, strict=True))
        # The side says nothing: losses treat both alike, and a batch is as they would be drawn.
        swap = torch.rand(len(rows), generator=generator) < 0.5
        rows = torch.where(swap.unsqueeze(1), rows[:, [0, 2, 1]], rows)
        return SharedTriplet(images, rows, torch.where(swap, 1 - votes, votes), torch.arange(len(rows)))

    def _pictures(self, generator: torch.Generator) -> Tensor:
        """Numbers of the pictures, those of a class side by side; one twice only where its class has too few."""
        classes = torch.randperm(len(self._members), generator=generator)[
            : self.batches.num_images // self.batches.per_class
        ]
        ids = []
        for number in classes.tolist():
            members = self._members[number]
            order = torch.cat(
                [
                    torch.randperm(len(members), generator=generator)
                    for _ in range(-(-self.batches.per_class // len(members)))
                ]
            )
            ids.append(members[order[: self.batches.per_class]])
        return torch.cat(ids)

    def _semantic(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows ``(count, 3)``: an image, another one of its class, one of another class."""
        size, total = self.batches.per_class, self.batches.num_images
        reference = torch.randint(total, (count,), generator=generator)
        start = reference // size * size
        same = start + (reference - start + torch.randint(1, size, (count,), generator=generator)) % size
        other = (start + size + torch.randint(total - size, (count,), generator=generator)) % total
        return torch.stack([reference, same, other], dim=1)

    def _judged(self, count: int, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows ``(count, 3)`` of distinct images, and the teacher's votes; pictures that are the same have none."""
        assert self.triplets.embeddings is not None
        z = self.triplets.embeddings[ids]
        similarity = z @ z.mT
        total = self.batches.num_images
        reference = torch.randint(total, (count,), generator=generator)
        step = torch.randint(1, total, (count,), generator=generator)
        other = torch.randint(1, total - 1, (count,), generator=generator)
        left, right = (reference + step) % total, (reference + other + (other >= step)) % total
        votes = self.triplets.votes(similarity[reference, right] - similarity[reference, left])
        distinct = (ids[reference] != ids[left]) & (ids[reference] != ids[right]) & (ids[left] != ids[right])
        return torch.stack([reference, left, right], dim=1), torch.where(distinct, votes, 0.5)

    def _distorted(
        self, count: int, images: Tensor, index: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``(count, 3)``, each triplet as often as it takes, votes, and images distorted weakly, then strongly."""
        number = self.batches.num_distorted
        chosen = torch.randperm(len(images), generator=generator)[:number]
        family = torch.randint(len(DISTORTIONS), (number,), generator=generator)
        weak, strong = strengths(torch.rand(number, 2, generator=generator)).unbind(1)
        distorted = distort(
            images[chosen].repeat(2, 1, 1, 1),
            family.repeat(2),
            torch.cat([weak, strong]),
            seed=self.triplets.seed,
            index=(index * number + torch.arange(number)).repeat(2),
        )
        place = len(images) + torch.arange(number)
        rows = torch.stack([chosen, place, place + number], dim=1)
        # As in PhotoTriplets: candidates that are equal have no answer.
        equal = (distorted[:number] == distorted[number:]).flatten(1).all(1)
        times = torch.arange(count) % number
        return rows[times], torch.where(equal, 0.5, 0.0)[times], distorted

    def _human(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of ``num_human`` triplets, each as often as it takes, their votes, and the images they are rows of."""
        assert self.human is not None
        total = len(self.human.triplets)
        count = min(self.batches.num_human, self.num_human, total)
        drawn = torch.randint(total, (count,), generator=generator).tolist()
        batch = self.human.collate(fetch(self.human.triplets, drawn))
        rows = batch.ids if isinstance(batch, SharedTriplet) else torch.arange(3 * count).view(3, count).mT
        times = torch.arange(self.num_human) % count
        return rows[times], batch.right_vote[times], torch.cat(batch.images())


def _counts(kinds: Mapping[str, float], total: int) -> dict[str, int]:
    """Triplets of each kind by their shares, ``total`` in all."""
    ends = [round(total * sum(kinds.get(kind, 0.0) for kind in KINDS[:number])) for number in range(1, len(KINDS) + 1)]
    return {kind: end - start for kind, start, end in zip(KINDS, [0, *ends], ends, strict=False)}
