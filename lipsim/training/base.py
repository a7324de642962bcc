"""What the three stages share: optimisation, checks of their input, resuming."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lipsim.data import Preprocess, Triplet
from lipsim.data.check import check_images
from lipsim.data.skipping import NothingRead
from lipsim.evaluation.module import EvaluationModule, weights_are_finite
from lipsim.layers.base import evaluation_mode
from lipsim.metric import PerceptualMetric
from lipsim.metric.files import FORMAT, describe
from lipsim.training import global_batch
from lipsim.training.acceleration import Acceleration
from lipsim.training.checkpoints import fits_moments
from lipsim.training.global_batch import RateScaling
from lipsim.training.losses import TripletLoss
from lipsim.training.place import (
    Draws,
    batch_size_of,
    continue_at,
    in_mid_epoch,
    is_broken_off,
    place_of,
    samples_in_a_step,
    steps_ahead,
    training_loader_of,
    uncount_epoch,
)
from lipsim.training.schedules import Schedule
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_safetensors

DIVERGED = (
    "resume from the last checkpoint with a lower rate (--model.optimizer.lr; Muon has an adam_lr besides) or "
    "--trainer.gradient_clip_val 1"
)
# Keys in a checkpoint.
_RESIZE, _FRAMING, _ANCHOR, _PLACE = "lipsim-resize", "lipsim-framing", "lipsim-anchor", "lipsim-place"
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class Stage(EvaluationModule):
    """A stage that trains the encoder of a metric and scores it on triplets.

    Args:
        metric: the metric in training.
        optimizer: makes the optimizer from the trainable parameters.
        schedule: factor of the learning rate over the whole run.
        acceleration: how training runs the encoder; default plainly.
        rate_scaling: scales the learning rate by the global batch; default not at all.
    """

    def __init__(
        self,
        metric: PerceptualMetric,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        acceleration: Acceleration | None = None,
        rate_scaling: RateScaling | None = None,
    ) -> None:
        super().__init__(metric)
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self._configured: list[dict[str, Any]] = []
        self._batch: Any = None  # the one in training, for a message about it
        self.acceleration = acceleration or Acceleration()
        self._run_encoder = _EncoderRunner(self.acceleration)
        self.rate_scaling = rate_scaling
        self._configured_rates: list[float] = []  # before they are scaled
        self._draws = Draws()
        self._saved_place: dict[str, int] | None = None  # of the checkpoint that training resumes from
        self._resumed = False  # until its first batch
        self.steps_ahead = 0  # of global_step, see place.steps_ahead
        self._share: float | None = None  # of max_time, at the start of this batch
        self._own_loss: Tensor | None = None  # of this process, where the loss is that of all
        self._accumulated = 0  # batches whose gradients wait for a step
        self._nobody_read = False  # whether no process has a sample of this batch

    def embed(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` of images in a training step, computed as the acceleration says.

        In float32 at least, in which losses take their differences, also where autocast has them in bfloat16.
        """
        self.metric.check_images(x, check_range=False)  # checked with the batch
        features = self._run_encoder(self.metric.encoder, x)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of its steps, or of its time where these have no end.

        1 where neither ends. It may be read on one process alone.
        """
        total = self._total_steps()
        if total is not None:
            return min(1.0, (self.trainer.global_step + self.steps_ahead) / total)
        return 1.0 if self._share is None else self._share

    def _total_steps(self) -> int | None:
        """Steps of the whole training; None without an end (``max_epochs`` −1, data of unknown length)."""
        total = self.trainer.estimated_stepping_batches
        return None if total < 0 or math.isinf(total) else max(1, int(total))

    def _share_of_time(self) -> float | None:
        """Share of ``max_time`` that has passed, in [0, 1], the same on every process; None without such a limit.

        Every process has to ask for it.
        """
        for timer in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
                elapsed = timer.time_elapsed()
                share = min(1.0, elapsed / (elapsed + left)) if elapsed + left > 0 else 1.0
                return share if self.trainer.world_size == 1 else self.trainer.strategy.broadcast(share)
        return None

    def _schedule_factor(self, step: int) -> float:
        total = self._total_steps()
        if total is None and self.schedule.needs_end:
            share = self._share_of_time()
            if share is None:
                raise LipsimError(
                    f"{type(self.schedule).__name__} is a schedule over the whole training, and this one has no end; "
                    "give --trainer.max_time, .max_steps or .max_epochs, or take --model.schedule Constant"
                )
            # As many steps as there will be at the pace so far.
            total = max(step + 1, round(step / share)) if share > 0 else sys.maxsize
            return self.schedule(step, total)
        return self.schedule(step + self.steps_ahead, total or 1)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._saved_place, self.steps_ahead, self._accumulated = None, 0, 0  # those of an earlier training

    def make_optimizer(self) -> Optimizer:
        """A new optimizer of what is trained."""
        return self.optimizer_factory(self._trained())

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by steps: of their number, or of the pace so far where time is the limit.

        Raises:
            ValueError: a schedule that needs an end, and training without one.
        """
        optimizer = self.make_optimizer()
        self._configured_rates = [float(group["lr"]) for group in optimizer.param_groups]
        if self.rate_scaling is not None:
            self.trainer.fit_loop.setup_data()  # as estimated_stepping_batches does
            samples = samples_in_a_step(self.trainer)
            if samples is None:
                raise LipsimError(
                    "nobody knows how many samples are in a batch of the loader (an item of its data set may be one); "
                    "leave rate_scaling out"
                )
            for group in optimizer.param_groups:
                group["lr"] *= self.rate_scaling.factor(samples)
        scheduler = LambdaLR(optimizer, lambda step: self._schedule_factor(step))
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """After resuming: keep the moments and the step, take the hyper-parameters of the present configuration.

        What the user says now wins over what was saved; each difference is logged.
        """
        found, place = training_loader_of(self.trainer), self._saved_place
        if found is not None and place is not None:
            continue_at(self.trainer, place)
            self.steps_ahead = steps_ahead(self.trainer, place)
        elif in_mid_epoch(self.trainer):
            rank_zero_info(
                "continuing in the middle of an epoch, of which "
                + ("the checkpoint" if place is None else "the training loader")
                + " does not say what was served: some samples may be trained on twice"
            )
        (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        scheduler = cast(LambdaLR, schedule.scheduler)
        scheduler.base_lrs = [group["initial_lr"] for group in self._configured]
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):
            for name in configured.keys() - {"lr"}:
                if group.get(name) != configured[name]:
                    rank_zero_info(f"resuming with {name} = {configured[name]}; the checkpoint had {group.get(name)}")
                    group[name] = configured[name]
            group["lr"] = group["initial_lr"] * factor
        self._resumed, self._saved_place = place is not None, None
        self._draws.seed = torch.initial_seed() if found is None else found[1].seed
        for line in self._rates_and_batches():
            rank_zero_info(line)

    def on_train_epoch_start(self) -> None:
        found = training_loader_of(self.trainer)
        if found is not None:
            found[1].seed = self._draws.seed  # also of a loader that is made anew for each epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the metric, so that :func:`lipsim.load` takes the checkpoint as well.

        Raises:
            ValueError: weights are not finite; the files that are there stay.
        """
        (finite,) = self._everywhere(weights_are_finite(self))
        if not finite:
            raise LipsimError(
                f"weights are NaN or infinite at step {self.trainer.global_step}, so no checkpoint is written over the "
                f"last one; {DIVERGED}"
            )
        preprocess = self.metric.preprocess
        # Also of an encoder that cannot be described.
        checkpoint[_RESIZE], checkpoint[_FRAMING] = preprocess.resize, preprocess.framing
        checkpoint[_ANCHOR] = self.metric.anchor
        if (place := place_of(self.trainer)) is not None:
            checkpoint[_PLACE] = {**place, "ahead": self.steps_ahead}
            if is_broken_off(self.trainer):
                uncount_epoch(checkpoint)
        try:
            checkpoint[FORMAT] = json.dumps(describe(self.metric, self.metric.encoder))
        except ValueError:  # an encoder of the user's own, or LoRA layers: the checkpoint resumes, and no more
            return

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In an evaluation, be the metric that was trained; in training, what the configuration says now.

        That is about how images come to it, and its anchor.
        """
        if self.trainer.training:
            self._saved_place = checkpoint.get(_PLACE)
            self._drop_moments_of_another(checkpoint)
        # Checkpoints of earlier versions have both in the description alone, where there is one.
        described = json.loads(checkpoint[FORMAT]) if FORMAT in checkpoint else {}
        anchor = checkpoint.get(_ANCHOR, described.get("anchor"))
        if anchor is not None and anchor != self.metric.anchor:
            if self.trainer.training:
                rank_zero_info(f"resuming with the anchor {self.metric.anchor:g}; before it was {anchor:g}")
            else:
                self.metric.anchor = anchor
        saved = checkpoint.get(_RESIZE, described.get("resize"))
        if saved is None:
            return
        now = self.metric.preprocess
        before = Preprocess(self.metric.image_size, saved, checkpoint.get(_FRAMING, "stretch"))
        if before.way == now.way:
            return
        if self.trainer.training:
            rank_zero_info(f"resuming on images resized by {now.way!r}; before it was {before.way!r}")
        else:
            self.metric.preprocess = before

    def _drop_moments_of_another(self, checkpoint: dict[str, Any]) -> None:
        """Begin with an optimizer's first step where the moments of a checkpoint are another optimizer's."""
        states = checkpoint.get("optimizer_states", [])
        if all(fits_moments(state, self.optimizer_factory, self._trained()) for state in states):
            return
        optimizer = self.make_optimizer()
        rank_zero_info(
            f"resuming with {type(optimizer).__name__}, which cannot go on from the moments in the checkpoint: it "
            "begins with none"
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # as a schedule leaves it
        checkpoint["optimizer_states"] = [optimizer.state_dict()]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, NothingRead):
            check_images(batch)
        self._batch = batch
        # Here, where all processes are: in its step one that could read nothing has no loss to ask for it.
        self._share = self._share_of_time() if self._total_steps() is None else None
        self._draws.seed_noise(self.trainer)
        if self._resumed:
            # Lightning 2.6 counts the steps of its log from one too few, or too many, after some checkpoints.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
            self._resumed = False

    def nothing_learned(self) -> Tensor | None:
        """The loss of a batch of which nothing could be read: none, or on several processes that of the others.

        All of them have to take part when losses and gradients are averaged; the gradient of this one is 0.
        """
        if self.trainer.world_size == 1:
            return None
        with ExitStack() as stack:
            for module in self.metric.encoder.modules():
                if isinstance(module, _NormBase):  # a blank image is none of those that batch statistics are of
                    stack.enter_context(evaluation_mode(module))
            features = self.embed(self.blank_image())[:0]
        self._own_loss = features.detach().sum()  # 0: where the loss of all is not finite it is another process's
        return self.loss_of_no_rows(features)

    def loss_of_no_rows(self, features: Tensor) -> Tensor:
        """What a process adds to the loss of a step for which it has no sample: nothing, by the same exchange.

        Args:
            features: ``(0, D)``, which every trained parameter has a part in.
        """
        return global_batch.weighted_mean(features.sum(), features.new_zeros(()))

    def blank_image(self) -> Tensor:
        """A gray image in place of those that could not be read, ``(1, 3, S, S)``; nothing of it counts."""
        size = self.metric.image_size
        return torch.full((1, 3, size, size), 0.5, device=self.device)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        self._accumulated += not self._nobody_read
        super().backward(loss, *args, **options)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """As Lightning's, which divides by the batches that a step should have; but the mean of those that it has.

        It has fewer where an epoch ends or is continued within a step, and where nothing of a batch could be read.
        """

        def closure() -> Any:
            result = None if optimizer_closure is None else optimizer_closure()
            there, self._accumulated = self._accumulated, 0
            if result is not None and not there:  # as on one process, whose optimizer finds no gradient
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
                return None
            if 0 < there < (expected := self.trainer.accumulate_grad_batches):
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(expected / there)
            # The step is that of the batches before this one. Without any loss, float16 would take none.
            return torch.zeros((), device=self.device) if result is None and there else result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at the first loss that is not finite, before it reaches a weight.

        Raises:
            ValueError: on every process, when the loss of one of them is NaN or infinite.
        """
        trainer = self.trainer
        own, self._own_loss = loss if self._own_loss is None else self._own_loss, None
        own_finite, nothing_read = bool(torch.isfinite(own).all()), isinstance(self._batch, NothingRead)
        finite, self._nobody_read, all_own_finite = self._everywhere(
            bool(torch.isfinite(loss).all()), nothing_read, own_finite
        )
        if finite:
            return
        # Where each part is finite, it is what the loss makes of them together, on every process.
        if own_finite and (nothing_read or not all_own_finite):
            raise LipsimError(f"the loss of another process is not finite at step {trainer.global_step}; {DIVERGED}")
        rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        path = save_batch(self._batch, Path(trainer.default_root_dir) / f"not_finite{rank}.safetensors")
        cause = "" if weights_are_finite(self) else " as weights are already"
        raise LipsimError(
            f"the loss is {float(loss.detach())} at step {trainer.global_step}{cause}; its batch is in {path}; "
            f"{DIVERGED}"
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = None

    def mean_over_processes(self, loss: Tensor, of: TripletLoss, right_vote: Tensor) -> Tensor:
        """The mean over the triplets of all processes of a loss, of which this process has those with these votes."""
        self._own_loss = loss.detach()
        return global_batch.weighted_mean(loss, of.weights(right_vote).sum())

    def sample_keys(self, count: int) -> Tensor:
        """Keys of what is drawn for each of the ``count`` rows of the batch in training, ``(count,)`` int64 on the CPU.

        They depend on seed, epoch and position in the data set alone, whatever process and worker has the sample, and
        before or after resuming: see :mod:`lipsim.data.order`. Of loaders that do not tell positions: on seed, step,
        process and row.
        """
        return self._draws.samples(self._trainer, count)

    def row_keys(self, count: int) -> Tensor:
        """Keys of what is drawn for ``count`` rows that are no samples, of step, process and row."""
        return self._draws.rows(self._trainer, count)

    def batch_key(self) -> int:
        """Key of what is drawn once for the batch in training on all processes, in the range of an int64."""
        return self._draws.batch(self._trainer)

    def _rates_and_batches(self) -> Iterator[str]:
        """What a step is of, in words: processes, batch, accumulation; and its learning rate."""
        trainer, found = self.trainer, training_loader_of(self.trainer)
        each, total, batches = batch_size_of(trainer), samples_in_a_step(trainer), trainer.num_training_batches
        served = "1 batch" if each is None else f"{each} samples"
        processes = "1 process" if trainer.world_size == 1 else f"{trainer.world_size} processes"
        text = f"a step: {processes} × {served} × {trainer.accumulate_grad_batches} accumulated"
        if each is not None and total is not None:
            full = each * trainer.world_size * trainer.accumulate_grad_batches
            text += f" = {total}" if total == full else f", of which an epoch has {total}"
        if math.isfinite(batches):
            text += f"; {math.ceil(batches / trainer.accumulate_grad_batches)} steps in an epoch"
        if found is not None:
            order = found[1]
            left_out = order.size - min(order.served, int(batches) * order.global_batch)
            text += f" of {order.size} {'batches' if each is None else 'samples'}, of which {left_out} are left out"
        yield text
        (optimizer,) = trainer.optimizers
        for configured, group in zip(self._configured_rates, optimizer.param_groups, strict=True):
            of = f" of {len(group['params'])} parameters" if len(self._configured_rates) > 1 else ""
            text = f"learning rate{of}: {configured:g} as configured"
            if self.rate_scaling is not None:
                rule, reference = self.rate_scaling.rule, self.rate_scaling.reference_batch
                text += f", scaled to {group['initial_lr']:g} ({rule}, for {reference} samples)"
            yield f"{text}, {group['lr']:g} at this step of {type(self.schedule).__name__}"

    def _everywhere(self, *hold: bool) -> list[bool]:
        """Which of several things hold on every process; each has to ask."""
        if self.trainer.world_size == 1:
            return list(hold)
        count = torch.tensor(hold, dtype=torch.int32, device=self.device)
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        return [bool(number == self.trainer.world_size) for number in count]


class _EncoderRunner:
    """Runs an encoder as an acceleration says, wrapped at its first use.

    A copy wraps anew: that of a stage must not train the encoder of the original.
    """

    def __init__(self, acceleration: Acceleration) -> None:
        self._acceleration = acceleration
        self._encoder: nn.Module | None = None
        self._run: Callable[[Tensor], Tensor] | None = None

    def __call__(self, encoder: nn.Module, x: Tensor) -> Tensor:
        if self._run is None or self._encoder is not encoder:
            self._encoder, self._run = encoder, self._acceleration.wrap(encoder)
        return self._run(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> _EncoderRunner:
        return _EncoderRunner(copy.deepcopy(self._acceleration, memo))


def save_batch(batch: Any, path: Path) -> Path:
    """Write the tensors of a batch, images and votes by name, so that what happened on it can be looked into."""
    if isinstance(batch, Triplet):
        names = ("reference", "left", "right", "right_vote", "index")
        tensors = {name: getattr(batch, name) for name in names}
    elif isinstance(batch, Tensor):
        tensors = {"images": batch}
    else:  # (images, labels) of a folder, or images with embeddings
        names = getattr(batch, "_fields", None) or ("images", *(f"item{i}" for i in range(1, len(batch))))
        tensors = {name: item for name, item in zip(names, batch, strict=True) if isinstance(item, Tensor)}
    write_safetensors(path, tensors)
    return path
