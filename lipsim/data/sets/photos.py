"""Triplets made of the photographs of a folder, whose answers are known or a teacher's; nothing is downloaded.

Three kinds, each drawn without end:

``semantic``
    A picture, another one of its class, and one of another class: the first is more alike.
``distortion``
    A picture, and the same picture distorted weakly and strongly in one way (:mod:`lipsim.data.distortions`).
``teacher``
    Three pictures, judged by the distances of a teacher's embeddings. For half of them one candidate is the nearest of
    64 pictures: of three pictures drawn at random, two are hardly ever alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.distortions import DISTORTIONS, distort
from lipsim.data.sets.image_store import ImageStore
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_uniform

KINDS = ("semantic", "distortion", "teacher")
POOL = 64  # pictures of which the nearest becomes a candidate
MIN_STRENGTH, MIN_EXTRA_STRENGTH = 0.05, 0.2  # of the weaker distortion, and by how much the other one is stronger
# Streams of random numbers of one seed: they must not be those of each other.
_CHOICES, _POOLS, _DISTORTIONS, _STREAMS = range(4)


@dataclass(frozen=True)
class PhotoRecipes:
    """What triplets are made from, a row each.

    Attributes:
        index: ``(N,)`` int64, positions in the set.
        kind: ``(N,)`` int64, positions in :data:`KINDS`.
        ids: ``(N, 3)`` int64, numbers of the pictures: reference, left, right.
        family: ``(N,)`` int64, positions in :data:`lipsim.data.distortions.DISTORTIONS`; −1 where nothing is distorted.
        strength: ``(N, 2)`` of the distortion of left and right; 0 where nothing is distorted.
        right_vote: ``(N,)`` float32.
    """

    index: Tensor
    kind: Tensor
    ids: Tensor
    family: Tensor
    strength: Tensor
    right_vote: Tensor


class PhotoTriplets(Dataset[Any]):
    """Triplets of the photographs of a folder, fetched in batches.

    A triplet is a function of the pictures, ``(seed, index)`` and the arguments but for ``num_triplets``: nothing is
    kept, and a long set costs no more than a short one. To train on new draws all the time, take a set as long as the
    training.

    Args:
        store: the pictures.
        num_triplets: how many; a shorter set is the beginning of a longer one.
        kinds: share of each of :data:`KINDS`, in any unit; None: equal shares of all that can be, "teacher" with
            embeddings and "semantic" with classes.
        embeddings: ``(M, D)`` of unit norm, a teacher's of the pictures, see :meth:`ImageStore.embeddings`.
        near_share: share of the triplets of the teacher whose one candidate is the nearest of a pool.
        temperature: of the teacher's votes, ``1/(1 + exp((d_right − d_left)/temperature))`` of its cosine distances;
            0: all judges choose the nearer one.
        seed: another seed is another set.

    Attributes:
        kinds: share of each kind, of sum 1.
        preprocess: how image files became the pictures.

    Raises:
        ValueError: an argument outside its range, a kind that these pictures do not have, or pictures of no class
            beside others where there are semantic triplets.
    """

    def __init__(
        self,
        store: ImageStore,
        num_triplets: int = 2000,
        *,
        kinds: Mapping[str, float] | None = None,
        embeddings: Tensor | None = None,
        near_share: float = 0.5,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_count("num_triplets", num_triplets)
        check_count("seed", seed, least=0)
        check_number("near_share", near_share, most=1.0)
        check_number("temperature", temperature)
        self.store, self.num_triplets, self.seed = store, num_triplets, seed
        self.embeddings, self.near_share, self.temperature = embeddings, near_share, temperature
        semantic = kinds is None or kinds.get("semantic", 0) != 0
        self._classes = _Classes(store.classes() if semantic else torch.zeros(len(store), dtype=torch.int64))
        possible = {
            "semantic": len(self._classes.references) > 0,
            "distortion": True,
            "teacher": embeddings is not None and len(store) >= 3,
        }
        self.kinds = _shares(kinds, possible, store)
        self.preprocess: Preprocess | None = store.preprocess

    def only(self, kind: str, num_triplets: int) -> PhotoTriplets:
        """The triplets of one kind over the same pictures."""
        return PhotoTriplets(
            self.store,
            num_triplets,
            kinds={kind: 1.0},
            embeddings=self.embeddings,
            near_share=self.near_share,
            temperature=self.temperature,
            seed=self.seed,
        )

    def __len__(self) -> int:
        return self.num_triplets

    @cached_property
    def groups(self) -> dict[str, Tensor]:
        """The kinds, where there are several, and the families of distortions: parts that are scored apart as well."""
        recipes = self.recipes(torch.arange(len(self)))
        groups = {kind: recipes.kind == KINDS.index(kind) for kind in self.kinds if len(self.kinds) > 1}
        families = {name: recipes.family == number for number, name in enumerate(DISTORTIONS)}
        return groups | {name: mask for name, mask in families.items() if mask.any()}

    def manifest(self) -> list[str]:
        """What the set consists of, a line a triplet; see :func:`lipsim.data.loading.data_fingerprint`."""
        recipes = self.recipes(torch.arange(len(self)))
        names = [self.store.names[column] for column in recipes.ids.unbind(1)]
        rows = zip(*names, recipes.family.tolist(), recipes.strength.tolist(), recipes.right_vote.tolist(), strict=True)
        return [" ".join(map(str, row)) for row in rows]

    def __getitem__(self, index: int) -> Triplet:
        """A batch of one triplet."""
        return self.__getitems__([range(len(self))[index]])  # IndexError past the end

    def __getitems__(self, indices: list[int]) -> Triplet:
        """A batch for the given positions; ``DataLoader`` calls this with a whole batch at once."""
        recipes = self.recipes(torch.tensor(indices))
        reference, left, right = (self.store.floats(ids) for ids in recipes.ids.unbind(1))
        rows = (recipes.family >= 0).nonzero().flatten()
        if len(rows):
            # Both at once, of one index: on one path, the stronger further along.
            family, index = recipes.family[rows].repeat(2), recipes.index[rows].repeat(2)
            strength = recipes.strength[rows].t().flatten()
            seed = self.seed * _STREAMS + _DISTORTIONS
            left[rows], right[rows] = distort(
                reference[rows].repeat(2, 1, 1, 1), family, strength, seed=seed, index=index
            ).chunk(2)
        # Black stays black, whatever its contrast: candidates that are equal have no answer.
        equal = (left == right).flatten(1).all(1)
        right_vote = torch.where(equal, 0.5, recipes.right_vote)
        return Triplet(reference, left, right, right_vote, recipes.index)

    def recipes(self, index: Tensor) -> PhotoRecipes:
        """What the triplets at some positions ``(N,)`` are made from."""
        numbers = sample_uniform(torch.empty(len(index), 8), seed=self.seed * _STREAMS + _CHOICES, index=index).double()
        ends = torch.tensor([self.kinds.get(kind, 0.0) for kind in KINDS], dtype=torch.float64).cumsum(0)
        kind = torch.searchsorted(ends / ends[-1], numbers[:, 0].contiguous(), right=True)
        ids = torch.empty(len(index), 3, dtype=torch.int64)
        family = torch.full((len(index),), -1)
        strength = torch.zeros(len(index), 2)
        right_vote = torch.zeros(len(index))
        for number, name in enumerate(KINDS):
            rows = (kind == number).nonzero().flatten()
            if not len(rows):
                continue
            own = numbers[rows]
            if name == "semantic":
                ids[rows] = self._classes.draw(own[:, 1:4])
            elif name == "distortion":
                ids[rows] = _pick(own[:, 1], len(self.store)).unsqueeze(1)
                family[rows] = _pick(own[:, 2], len(DISTORTIONS))
                strength[rows] = strengths(own[:, 3:5])
            else:
                ids[rows], right_vote[rows] = self._judged(own[:, 1:4], index[rows])
        swap = numbers[:, 7] < 0.5
        ids = torch.where(swap.unsqueeze(1), ids[:, [0, 2, 1]], ids)
        strength = torch.where(swap.unsqueeze(1), strength.flip(1), strength)
        return PhotoRecipes(index, kind, ids, family, strength, torch.where(swap, 1 - right_vote, right_vote))

    def _judged(self, numbers: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures ``(N, 3)`` and the teacher's votes ``(N,)``."""
        assert self.embeddings is not None
        count = len(self.store)
        reference = _pick(numbers[:, 0], count)
        pools = sample_uniform(torch.empty(len(index), POOL), seed=self.seed * _STREAMS + _POOLS, index=index)
        pool = _pick(pools.double(), count - 1)
        pool += (pool >= reference.unsqueeze(1)).long()
        nearest = self._similarity(reference.unsqueeze(1), pool).argmax(1, keepdim=True)
        place = torch.where(numbers[:, 1:2] < self.near_share, nearest, 0)
        left = pool.gather(1, place).flatten()
        right = _pick(numbers[:, 2], count - 2)
        for taken in torch.stack([reference, left]).sort(0).values:
            right += (right >= taken).long()
        difference = self._similarity(reference, right) - self._similarity(reference, left)
        return torch.stack([reference, left, right], dim=1), self.votes(difference)

    def votes(self, difference: Tensor) -> Tensor:
        """The teacher's votes for right ``(N,)``, by how much more similar it finds right than left."""
        if self.temperature:
            return torch.sigmoid(difference / self.temperature)
        return (torch.sign(difference) + 1) / 2

    def _similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosines of pictures by number. A product of matrices would round them by what else is in the batch."""
        assert self.embeddings is not None
        return (self.embeddings[first] * self.embeddings[second]).sum(-1)


class _Classes:
    """Pictures by class.

    Args:
        labels: ``(M,)`` int64, numbers of classes from 0.

    Attributes:
        references: numbers of the pictures that have another one of their class and some of another one.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.sizes = torch.bincount(labels)
        self.order = labels.argsort(stable=True)
        self.place = self.order.argsort()  # of each picture in the order
        self.starts = self.sizes.cumsum(0) - self.sizes
        size = self.sizes[labels]
        self.references = ((size > 1) & (size < len(labels))).nonzero().flatten()

    def draw(self, numbers: Tensor) -> Tensor:
        """Reference, one of its class, one of another class ``(N, 3)``, by numbers in [0, 1) ``(N, 3)``."""
        reference = self.references[_pick(numbers[:, 0], len(self.references))]
        label = self.labels[reference]
        start, size = self.starts[label], self.sizes[label]
        same = start + _pick(numbers[:, 1], size - 1)
        same += (same >= self.place[reference]).long()
        other = _pick(numbers[:, 2], len(self.labels) - size)
        other += torch.where(other >= start, size, 0)
        return torch.stack([reference, self.order[same], self.order[other]], dim=1)


def strengths(numbers: Tensor) -> Tensor:
    """Strengths of the weaker and of the stronger distortion, ``(N, 2)`` float32, by numbers in [0, 1) ``(N, 2)``."""
    weak = MIN_STRENGTH + numbers[:, 0] * (1 - MIN_EXTRA_STRENGTH - MIN_STRENGTH)
    strong = weak + MIN_EXTRA_STRENGTH + numbers[:, 1] * (1 - MIN_EXTRA_STRENGTH - weak)
    return torch.stack([weak, strong], dim=1).float()


def _pick(numbers: Tensor, count: int | Tensor) -> Tensor:
    """Numbers in [0, 1), float64, to whole numbers below ``count``."""
    return (numbers * count).long()


def _shares(kinds: Mapping[str, float] | None, possible: Mapping[str, bool], store: ImageStore) -> dict[str, float]:
    if kinds is None:
        kinds = {kind: 1.0 for kind in KINDS if possible[kind]}
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise LipsimError(f"expected kinds of triplets among {', '.join(KINDS)}, got {', '.join(unknown)}")
    shares = {kind: check_number(f"share of {kind}", kinds[kind]) for kind in KINDS if kind in kinds}
    shares = {kind: share for kind, share in shares.items() if share > 0}
    if not shares:
        raise LipsimError(f"expected a positive share of one of {', '.join(KINDS)}, got none")
    if "semantic" in shares and not possible["semantic"]:
        raise LipsimError(
            f"semantic triplets need a class of two images and another class, and {store.folder} has none; expected "
            "CLASS/IMAGE there, or leave the kind out"
        )
    if "teacher" in shares and not possible["teacher"]:
        raise LipsimError(
            "triplets judged by a teacher need its embeddings of three images or more; give the cache that "
            "lipsim cache-teacher writes, or leave the kind out"
        )
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}
