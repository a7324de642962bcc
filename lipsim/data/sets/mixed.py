"""Two sets of triplets in one, for training: photographs' triplets among which human votes are strewn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.contracts import TripletSet
from lipsim.data.loading import fetch
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet
from lipsim.utils.sampling import sample_uniform


class MixedTriplets(Dataset[Any]):
    """A set in which another set takes some of the places, fetched in batches.

    Whose place one is depends on ``(seed, index)`` alone. A triplet of the other set is drawn for each of its places.

    Args:
        triplets: the set, whose length stays.
        other: the set of which triplets are drawn.
        share: of the places of the other set, in [0, 1].
        collate: the other set's ``collate_fn``: of a list of triplets, or of what its ``__getitems__`` returns.
        seed: of the draws.

    Attributes:
        groups: none.

    Raises:
        ValueError: a share outside [0, 1], or an empty set.
    """

    def __init__(
        self,
        triplets: TripletSet,
        other: TripletSet,
        share: float,
        collate: Callable[[Any], Any],
        seed: int = 0,
    ) -> None:
        self.share = check_number("share of the other set", share, most=1.0)
        check_count("size of the other set", len(other))
        self.triplets, self.other, self.collate, self.seed = triplets, other, collate, seed
        self.preprocess: Preprocess | None = triplets.preprocess
        self.groups: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.triplets)

    def manifest(self) -> list[str]:
        """Both manifests, and how they are mixed."""
        mixture = f"{self.share} {self.seed} of {len(self.other)}"
        return [*self.triplets.manifest(), mixture, *self.other.manifest()]

    def __getitem__(self, index: int) -> Triplet:
        """A batch of one triplet."""
        return self.__getitems__([range(len(self))[index]])  # IndexError past the end

    def __getitems__(self, indices: list[int]) -> Triplet:
        """A batch for the given positions; ``DataLoader`` calls this with a whole batch at once."""
        index = torch.tensor(indices)
        # Of other seeds than those of the sets, which are at least 0: else a place would be taken by its kind.
        numbers = sample_uniform(torch.empty(len(index), 2), seed=~self.seed, index=index).double()
        others = numbers[:, 0] < self.share
        rows = (numbers[:, 1] * len(self.other)).long()[others].tolist()
        parts: list[Triplet] = []
        if not others.all():
            parts.append(cast(Triplet, fetch(self.triplets, index[~others].tolist())))
        if rows:
            parts.append(self.collate(fetch(self.other, rows)))
        order = torch.cat([(~others).nonzero().flatten(), others.nonzero().flatten()]).argsort()
        return Triplet(
            torch.cat([part.reference for part in parts])[order],
            torch.cat([part.left for part in parts])[order],
            torch.cat([part.right for part in parts])[order],
            torch.cat([part.right_vote for part in parts])[order],
            index,
        )
