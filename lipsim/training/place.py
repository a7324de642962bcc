"""Where in the data a training is: what is saved of that, how it is continued, and the keys of what is drawn there."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lipsim.data.order import TrainingLoader, TrainingOrder
from lipsim.utils.sampling import subkey, subkeys

_ROWS, _NOISE = range(2)  # numbers of a batch's keys


def training_loader_of(trainer: L.Trainer | None) -> tuple[TrainingLoader, TrainingOrder] | None:
    """The loader that a trainer trains on, and its order; None where that is another's loader."""
    loader = None if trainer is None else trainer.train_dataloader
    if not isinstance(loader, TrainingLoader) or loader.order is None:
        return None
    return loader, loader.order


def batch_size_of(trainer: L.Trainer) -> int | None:
    """Samples in a batch of one process; None where nobody knows, as of data sets whose items are batches."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else None


def samples_in_a_step(trainer: L.Trainer) -> int | None:
    """Samples that a step of the optimizer is of, on all processes: no more than an epoch has; None as above."""
    size = batch_size_of(trainer)
    if size is None:
        return None
    batches = int(min(trainer.accumulate_grad_batches, trainer.num_training_batches))
    samples = size * trainer.world_size * batches
    there = getattr(trainer.train_dataloader, "dataset", None)
    return min(samples, len(there)) if isinstance(there, Sized) else samples


def place_of(trainer: L.Trainer) -> dict[str, int] | None:
    """Which samples training has taken up to the last step of the optimizer; None where the loader does not tell.

    Batches whose gradients wait for a step are taken again: a checkpoint does not have their gradients.
    """
    found = training_loader_of(trainer)
    if found is None:
        return None
    loader, order = found
    epoch, progress = _epoch(trainer) - is_broken_off(trainer), trainer.fit_loop.epoch_loop.batch_progress
    current: Any = progress.current  # mypy takes its class for one with fewer counters
    samples = 0
    if epoch == order.epoch:
        batch = order.first_batch
        if loader.batch is not None:
            batch = loader.batch + (current.processed == current.ready)
        if not progress.is_last_batch:
            batch = max(order.first_batch, batch - batch % trainer.accumulate_grad_batches)
        samples = order.samples_before(batch)
    return {
        "seed": order.seed,
        "epoch": epoch,
        "samples": samples,
        "size": order.size,
        "processes": trainer.world_size,
        "batch_size": order.batch_size,
        "accumulated": trainer.accumulate_grad_batches,
    }


def continue_at(trainer: L.Trainer, place: dict[str, int]) -> None:
    """Have a trainer that has restored a checkpoint go on where that was, also with batches of another size.

    To be called when training starts, before its first epoch does. The order of the data stays that of the checkpoint's
    seed, so that no sample of the epoch is trained on twice.
    """
    found = training_loader_of(trainer)
    if found is None:
        return
    order = found[1]
    if order.seed != place["seed"]:
        rank_zero_info(f"the order of the data stays that of seed {place['seed']}, which the checkpoint is of")
        order.seed = place["seed"]
    if order.size != place["size"]:
        rank_zero_info(f"there are {order.size} training samples now, {place['size']} before: their order is another")
    before = place["processes"] * place["batch_size"] * place["accumulated"]
    now = order.global_batch * trainer.accumulate_grad_batches
    if before != now:
        rank_zero_info(f"resuming with a global batch of {now}; the checkpoint had {before}")
    # Also where the epoch had begun without a step: its batches are counted, and their gradients are in no checkpoint.
    if place["epoch"] == _epoch(trainer) and (place["samples"] or in_mid_epoch(trainer)):
        order.continue_at(place["epoch"], place["samples"])
        _count_batches(trainer, order.first_batch)
    elif place["epoch"] < _epoch(trainer):  # of which the last batch was trained on
        _count_batches(trainer, int(trainer.num_training_batches))


def is_broken_off(trainer: L.Trainer) -> bool:
    """Whether Lightning has counted an epoch that it broke off: for ``max_time``, ``max_steps`` or ``should_stop``."""
    found, loop = training_loader_of(trainer), trainer.fit_loop
    if found is None or found[0].batch is None or loop.epoch_loop.batch_progress.is_last_batch:
        return False
    return _epoch(trainer) == found[1].epoch + 1


def uncount_epoch(checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint be one of the middle of its epoch, whose other samples would be left out when it is resumed."""
    counters = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for progress in counters.values():
        progress["processed"] -= 1
        progress["completed"] = min(progress["completed"], progress["processed"])
    checkpoint["epoch"] = counters["current"]["completed"]


def steps_ahead(trainer: L.Trainer, place: dict[str, int]) -> int:
    """How much further training is than its number of steps says, in steps of the present size; below 0: less far.

    The steps before were of another size where the global batch or the data have changed. A training of so many epochs
    is as far as its share of these, which its schedules follow; one of so many steps is as far as its steps.

    Args:
        trainer: after :func:`continue_at`.
        place: that it continues from.
    """
    found, accumulated = training_loader_of(trainer), trainer.accumulate_grad_batches
    if found is None:
        return 0
    order = found[1]
    before = place["processes"] * place["batch_size"], place["accumulated"], place["size"]
    if before == (order.global_batch, accumulated, order.size):
        return place.get("ahead", 0)
    each = math.ceil(trainer.num_training_batches / accumulated)
    if trainer.max_epochs in (None, -1) or 0 <= trainer.max_steps <= each * trainer.max_epochs:
        return 0
    batches = order.first_batch if order.epoch == _epoch(trainer) else 0
    return _epoch(trainer) * each + min(each, math.ceil(batches / accumulated)) - trainer.global_step


def in_mid_epoch(trainer: L.Trainer) -> bool:
    """Whether a trainer that has restored a checkpoint goes on with an epoch that had begun."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.current.ready) and not progress.is_last_batch


def _epoch(trainer: L.Trainer) -> int:
    current: Any = trainer.fit_loop.epoch_progress.current
    number: int = current.processed
    return number


def _count_batches(trainer: L.Trainer, done: int) -> None:
    """Have Lightning count its batches of this epoch from another one than the checkpoint says.

    It counts one of them as completed only when it has dealt with where the checkpoint was written.
    """
    loop = trainer.fit_loop.epoch_loop
    completed = done - int(loop.restarted_on_train_batch_end)
    shift = completed - loop.batch_progress.current.completed
    counters: tuple[Any, Any] = loop.batch_progress.current, loop.batch_progress.total
    for progress in counters:
        progress.completed += shift
        progress.ready = progress.started = progress.processed = progress.completed + (done - completed)


class Draws:
    """Keys of the random numbers of a training step: functions of the seed and of what is in the batch.

    Where the loader does not tell what it serves, they depend on the step, the process and the row.

    Attributes:
        seed: of the run.
    """

    def __init__(self) -> None:
        self.seed = 0

    def samples(self, trainer: L.Trainer | None, count: int) -> Tensor:
        """A key for each of the ``count`` rows of the batch in training, ``(count,)`` int64 on the CPU."""
        found = training_loader_of(trainer)
        positions = None if found is None else found[0].positions()
        if found is not None and positions is not None:
            keys = found[1].keys(positions)
            if len(keys) == count:
                return keys
            if len(keys) == 1:  # an item of the data set is a batch
                return subkeys(keys, torch.arange(count))
        return self.rows(trainer, count)

    def rows(self, trainer: L.Trainer | None, count: int) -> Tensor:
        """A key for each of ``count`` rows that are no samples of the data set, ``(count,)`` int64 on the CPU."""
        return subkeys(self._of_process(trainer, _ROWS), torch.arange(count))

    def batch(self, trainer: L.Trainer | None) -> int:
        """A key of the batch, the same on all processes."""
        found = training_loader_of(trainer)
        if found is not None and found[0].batch is not None:
            return found[1].batch_key(found[0].batch)
        return subkey(self.seed, 0 if trainer is None else trainer.fit_loop.total_batch_idx)

    def seed_noise(self, trainer: L.Trainer) -> None:
        """Give torch's generators, of dropout and noise within encoders, a seed of the batch and the process."""
        torch.manual_seed(self._of_process(trainer, _NOISE))

    def _of_process(self, trainer: L.Trainer | None, purpose: int) -> int:
        return subkey(subkey(self.batch(trainer), purpose), 0 if trainer is None else trainer.global_rank)
