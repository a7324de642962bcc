"""Which positions a loader serves, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lipsim.data import Triplet, collate_triplets
from lipsim.data.loading import (
    Finished,
    check_count,
    data_fingerprint,
    read_batch,
    remaining,
    served_batches,
)
from lipsim.data.plan import Plan, plan


class Triplets(Dataset[Triplet]):
    """Made-up triplets whose images say which they are."""

    def __init__(self, count: int, offset: int = 0) -> None:
        self.count, self.offset = count, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Triplet:
        image = torch.full((3, 2, 2), (index + self.offset) / 1000)
        return Triplet(image, image, image, torch.tensor(1.0), torch.tensor(index))


class Stream(IterableDataset[Triplet]):
    def __iter__(self) -> Iterator[Triplet]:
        return iter([Triplets(1)[0]])


class Buckets:
    """A batch sampler of the user's own."""

    def __init__(self, batches: list[list[int]], shuffle: bool = False) -> None:
        self.batches, self.shuffle = batches, shuffle

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(9).tolist() if self.shuffle else None
        return iter([order[:5], order[5:]] if order else self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _loader(count: int = 9, **options: Any) -> DataLoader[Any]:
    return DataLoader(Triplets(count), collate_fn=collate_triplets, **options)


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"batch_size": 4}, [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),
        ({"batch_size": 4, "drop_last": True}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"batch_size": 4, "shuffle": True}, [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),  # the order of the set
        ({"batch_size": 2, "sampler": [5, 3, 8]}, [[5, 3], [8]]),
        ({"batch_size": 2, "sampler": SubsetRandomSampler([5, 3, 8])}, [[3, 5], [8]]),
        (
            {"batch_size": 5, "sampler": DistributedSampler(Triplets(9), 1, 0, shuffle=False)},
            [[*range(5)], [*range(5, 9)]],
        ),
        ({"batch_sampler": Buckets([[0, 2], [7, 1, 3]])}, [[0, 2], [7, 1, 3]]),
        ({"batch_sampler": BatchSampler(SequentialSampler(Triplets(9)), 5, False)}, [[*range(5)], [*range(5, 9)]]),
    ],
)
def test_samplers_are_followed(options: dict[str, Any], batches: list[list[int]]) -> None:
    assert plan(_loader(**options)).batches == batches


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (_loader(sampler=WeightedRandomSampler([1.0] * 3, 9)), "WeightedRandomSampler of set serves"),
        (
            _loader(sampler=RandomSampler(range(9), num_samples=4)),
            "RandomSampler of set serves other triplets each time",
        ),
        (_loader(sampler=[1, 2, 1]), r"list of set serves positions \[1\] more than once"),
        (_loader(sampler=[1, 9]), r"positions from 0 to 8 from the sampler of set, got \[9\]"),
        (_loader(sampler=["a"]), "positions .whole numbers. from the sampler of set"),
        (_loader(sampler=itertools.count()), "positions from 0 to 8"),
        (_loader(sampler=itertools.repeat(0)), "more than once"),
        (_loader(sampler=DistributedSampler(range(9), 2, 0)), "DistributedSampler of set serves a share"),
        (_loader(batch_sampler=Buckets([], shuffle=True)), "Buckets of set makes other batches each time"),
        (_loader(batch_sampler=Buckets([[0, 1], [1]])), r"Buckets of set serves positions \[1\] more than once"),
        (_loader(batch_size=None), "batch_size=None"),
        (DataLoader(Stream()), r"set is an IterableDataset \(Stream\)"),
        ([], "expected a DataLoader for set, got list"),
    ],
)
def test_what_has_no_positions_is_refused_by_name(loader: Any, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        plan(loader, "set")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("planned", [Plan([[0, 1, 2, 3], [4, 5, 6, 8]], 4, 9), Plan([[0, 2], [7, 1, 3], [4]], None, 9)])
def test_processes_share_every_position_once(planned: Plan, world_size: int) -> None:
    shares = [planned.share(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # as many batches on each
    served = [position for share in shares for batch in share for position in batch]
    assert sorted(served) == sorted(planned.positions)
    if planned.batch_size is None:  # the user's batches stay together
        assert sorted(batch for share in shares for batch in share if batch) == sorted(planned.batches)
    else:
        assert max(len(batch) for share in shares for batch in share) <= planned.batch_size


def test_limits_and_samples() -> None:
    planned = plan(_loader(100, batch_size=8))
    assert planned.limit(2).positions == list(range(16)) and planned.limit(1.0) == planned
    assert planned.limit(0.5).positions == list(range(48))  # 6 of 13 batches, as Lightning counts
    with pytest.raises(ValueError, match=r"limit_test_batches = 0\.01 leaves none of 13 batches"):
        planned.limit(0.01)
    small, large = planned.sample(10, seed=0).positions, planned.sample(30, seed=0).positions
    assert len(small) == 10 and len(large) == 30 and set(small) < set(large) and large == sorted(large)
    assert planned.sample(10, seed=1).positions != small and planned.sample(1000, seed=0) == planned
    own = Plan([[0, 2], [7, 1, 3]], None, 9).sample(3, seed=0)
    assert len(own.positions) == 3 and own.batch_size is None
    assert planned.fingerprint("data") == "data" != planned.limit(2).fingerprint("data")
    assert planned.sample(10, 0).fingerprint("data") != planned.sample(10, 1).fingerprint("data")


def test_what_is_finished_is_not_loaded() -> None:
    loader = _loader(batch_size=4)
    batches = list(remaining(loader, {0, 1, 2, 3, 4}))
    assert isinstance(batches[0], Finished) and [b.index.tolist() for b in batches[1:]] == [[4, 5, 6, 7], [8]]
    second = remaining(loader, (), plan(loader), rank=1, world_size=2)
    first, last = second
    assert first.index.tolist() == [1, 3, 5, 7] and isinstance(last, Finished)
    assert served_batches(second) == [[1, 3, 5, 7], []]
    assert read_batch(second, [8, 0]).index.tolist() == [8, 0]
    assert data_fingerprint(second) == data_fingerprint(loader)


def test_a_collate_fn_that_drops_triplets_is_refused() -> None:
    loader = DataLoader(Triplets(9), batch_size=4, collate_fn=lambda batch: collate_triplets(batch[:3]))
    with pytest.raises(ValueError, match=r"expected 4 triplets at positions \[0, 1, 2, 3\].*collate_fn returned 3"):
        list(remaining(loader, ()))


def test_only_a_loader_in_order_tells_what_it_serves() -> None:
    assert served_batches(_loader(5, batch_size=3)) == [[0, 1, 2], [3, 4]]
    shared = DistributedSampler(range(5), 2, 1, shuffle=False)
    assert served_batches(_loader(5, batch_size=2, sampler=shared)) == [[1, 3], [0]]  # it repeats one
    for options in ({"shuffle": True}, {"sampler": [0, 1]}, {"batch_size": None}, {"batch_sampler": Buckets([[0]])}):
        assert served_batches(_loader(5, **options)) is None
    assert served_batches(DataLoader(Stream())) is None and served_batches([1]) is None


def test_subsets_and_concatenations_have_fingerprints_of_their_own() -> None:
    class Named(Triplets):
        def manifest(self) -> list[str]:
            return [f"{self.offset} {i}" for i in range(self.count)]

    def fingerprint(dataset: Dataset[Any]) -> str:
        return data_fingerprint(DataLoader(dataset, collate_fn=collate_triplets))

    many, others = list(range(100)), [*range(49), 50, 49, *range(51, 100)]  # of 100, 32 are looked at
    assert fingerprint(Subset(Triplets(200), many)) != fingerprint(Subset(Triplets(200), others))
    first, second = Named(100), Named(100, offset=1)
    assert fingerprint(Subset(first, many)) != fingerprint(Subset(second, many))
    assert fingerprint(ConcatDataset([first, second])) != fingerprint(ConcatDataset([second, first]))


def test_the_count_must_add_up() -> None:
    check_count("set", [0, 1, 2], {0, 1, 2})
    check_count("set", [7, 8], None)
    with pytest.raises(ValueError, match=r"for 3 triplets of set, got 2 \(missing positions \[2\], unexpected \[\]\)"):
        check_count("set", [0, 1], {0, 1, 2})
    with pytest.raises(
        ValueError, match="only 2 of 3 triplets of set have an index of their own; serve the set in order"
    ):
        check_count("set", [0, 1, 1], None)
