"""The order of training data: of seed and epoch alone, on any number of processes, and from any sample on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lipsim.data.order import Place, TrainingLoader, TrainingOrder, training_loader
from lipsim.data.sets.folder import FolderImages


def _orders(size: int, batch_size: int, processes: int, seed: int = 0) -> list[TrainingOrder]:
    dataset = TensorDataset(torch.zeros(size))
    return [TrainingOrder(dataset, batch_size, seed=seed, rank=r, world_size=processes) for r in range(processes)]


def _global_batches(orders: list[TrainingOrder]) -> list[list[int]]:
    """What all processes together take at each step, in the order in which one process would."""
    served = [list(map(int, order)) for order in orders]
    steps = orders[0].num_batches - orders[0].first_batch
    size = orders[0].batch_size
    return [sorted(i for own in served for i in own[step * size : (step + 1) * size]) for step in range(steps)]


@pytest.mark.parametrize("size", [24, 29, 7])
def test_a_global_batch_is_the_same_samples_however_it_is_spread(size: int) -> None:
    for epoch in (0, 3):
        spread = []
        for processes in (1, 2, 3):
            orders = _orders(size, 12 // processes, processes)
            for order in orders:
                order.set_epoch(epoch)
                numbers = [int(i) for b in range(order.num_batches) for i in order.positions(b)]
                assert list(map(int, order)) == numbers and len(numbers) == len(order)
            assert {order.num_batches for order in orders} == {max(1, size // 12)}
            spread.append(_global_batches(orders))
        assert spread[0] == spread[1] == spread[2]
        taken = [i for batch in spread[0] for i in batch]
        assert len(set(taken)) == len(taken) == (size - size % 12 if size > 12 else size) and max(taken) < size


def test_orders_differ_by_epoch_and_by_seed_and_are_random() -> None:
    found = {}
    for seed in (0, 1):
        (order,) = _orders(40, 8, 1, seed)
        for epoch in (0, 1):
            order.set_epoch(epoch)
            found[seed, epoch] = list(map(int, order))
    assert len({tuple(numbers) for numbers in found.values()}) == 4
    (order,) = _orders(29, 12, 1)
    left_out = set()
    for epoch in range(20):
        order.set_epoch(epoch)
        left_out |= set(range(29)) - set(map(int, order))
    assert len(left_out) > 25  # not always the same ones
    with pytest.raises(ValueError, match="expected at least one training sample a process, got 2 for 3 processes"):
        _orders(2, 4, 3)


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 2), (1, 2), (3, 2), (1, 5), (2, 30)])
def test_an_epoch_goes_on_after_any_of_its_samples(processes: int, batch_size: int) -> None:
    """Eight of 30 samples have been taken, by batches of four: the others are served once, but what fills no batch."""
    (first,) = _orders(30, 4, 1, seed=5)
    first.set_epoch(2)
    before = list(map(int, first))[: first.samples_before(2)]
    orders = _orders(30, batch_size, processes, seed=5)
    for order in orders:
        order.continue_at(2, first.samples_before(2))
        order.set_epoch(2)  # as Lightning does when the epoch begins
    after = [int(i) for order in orders for i in order]
    served = 22 - 22 % (processes * batch_size)
    assert len(before) == 8 and len(set(after)) == len(after) == served and not set(before) & set(after)
    # Its last batch has the number that the last one of any epoch has; the numbers tell where it is.
    order, steps = orders[0], served // (processes * batch_size)
    assert order.first_batch == order.num_batches - steps
    if steps:
        assert [int(i) for i in order.positions(order.first_batch)] == list(map(int, order))[:batch_size]
        assert order.samples_before(order.first_batch + 1) == 8 + processes * batch_size
    whole = _orders(30, batch_size, processes, seed=5)
    for order, other in zip(orders, whole, strict=True):  # the next epoch begins at its beginning
        order.set_epoch(3)
        other.set_epoch(3)
        assert list(order) == list(other) and order.first_batch == 0


class Indices(Dataset[Tensor]):
    """What the loader asks for: position and key."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Tensor:
        assert isinstance(index, Place)
        return torch.tensor([int(index), index.key])


def _epoch(loader: TrainingLoader, epoch: int) -> list[Tensor]:
    cast(TrainingOrder, loader.order).set_epoch(epoch)
    batches = []
    for batch in loader:
        assert torch.equal(batch[:, 0], loader.positions())
        batches.append(batch)
    return batches


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_workers_serve_what_one_process_does_and_go_on_alike() -> None:
    loaders = [training_loader(Indices(), 2, seed=4, num_workers=workers) for workers in (0, 2)]
    plain, working = ([_epoch(loader, epoch) for epoch in (0, 1, 2)] for loader in loaders)
    for one, other in zip(plain, working, strict=True):
        assert len(one) == 5 and torch.equal(torch.cat(one), torch.cat(other))
    assert not torch.equal(plain[0][0], plain[1][0])
    keys = {int(i): int(key) for i, key in torch.cat(plain[1])}  # a sample's, whatever its place
    order = cast(TrainingOrder, loaders[0].order)
    order.set_epoch(1)
    assert all(int(order.keys(torch.tensor(i))) == key for i, key in keys.items()) and len(set(keys.values())) == 10

    for number, loader in enumerate(loaders):
        cast(TrainingOrder, loader.order).set_epoch(1)
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        state = loader.state_dict()
        assert state == {"seed": 4, "epoch": 1, "samples": 6}
        fresh = training_loader(Indices(), 2, seed=9, num_workers=2 * number)
        iterator = iter(fresh)  # before it is told where to go on, as Lightning has it
        fresh.load_state_dict(state)
        assert torch.equal(torch.cat(list(iterator)), torch.cat(plain[1][3:]))
        assert fresh.batch == 4 and torch.equal(torch.cat(_epoch(fresh, 2)), torch.cat(plain[2]))


def test_items_that_are_batches_are_dealt_out_whole() -> None:
    loaders = [
        training_loader(Indices(), None, seed=1, rank=rank, world_size=2, collate=lambda item: item) for rank in (0, 1)
    ]
    served = [[int(item[0]) for item in loader] for loader in loaders]
    assert [len(own) for own in served] == [5, 5] and len(set(served[0] + served[1])) == 10
    assert loaders[0].positions().tolist() == served[0][-1:]  # type: ignore[union-attr]


def test_a_place_is_a_whole_number() -> None:
    place = Place(7, -3)
    copy: Any = pickle.loads(pickle.dumps(place))
    assert (copy, copy.key, type(copy)) == (7, -3, Place) and [1] * 7 == [1] * place
    assert torch.tensor([place]).tolist() == [7] and torch.arange(9)[place] == 7


def test_views_depend_on_the_key_of_the_sample(photos: Path) -> None:
    images = FolderImages(photos / "train", 16, short_side=16, views=("plain", "flip"))
    shown = {key: images[Place(3, key)] for key in range(60)}
    plain = images.load(3)
    flipped = [key for key in shown if not torch.equal(shown[key], plain)]
    assert 15 < len(flipped) < 45 and all(torch.equal(shown[key], plain.flip(-1)) for key in flipped)
    torch.manual_seed(5)
    assert all(torch.equal(images[Place(3, key)], shown[key]) for key in range(60))
