"""What the three stages share: optimisation, checks of their input, resuming."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lipsim.data import Preprocess, Triplet
from lipsim.data.check import check_images
from lipsim.data.skipping import NothingRead
from lipsim.evaluation.module import EvaluationModule, weights_are_finite
from lipsim.layers.encoder import ResizingEncoder, declared_image_size
from lipsim.metric import PerceptualMetric, TiledMetric, load
from lipsim.metric.files import FORMAT, describe
from lipsim.training.acceleration import Acceleration
from lipsim.training.schedules import Schedule
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_safetensors

DIVERGED = "resume from the last checkpoint with a lower rate (--model.optimizer.lr) or --trainer.gradient_clip_val 1"
_RESIZE, _FRAMING = "lipsim-resize", "lipsim-framing"  # keys in a checkpoint
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class Stage(EvaluationModule):
    """A stage that trains the encoder of a metric and scores it on triplets.

    Args:
        metric: the metric in training.
        optimizer: makes the optimizer from the trainable parameters.
        schedule: factor of the learning rate over the whole run.
        acceleration: how training runs the encoder; default plainly.
    """

    def __init__(
        self,
        metric: PerceptualMetric,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        acceleration: Acceleration | None = None,
    ) -> None:
        super().__init__(metric)
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self._configured: list[dict[str, Any]] = []
        self._batch: Any = None  # the one in training, for a message about it
        self.acceleration = acceleration or Acceleration()
        self._run_encoder = _EncoderRunner(self.acceleration)

    def embed(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` of images in a training step, computed as the acceleration says."""
        self.metric.check_images(x, check_range=False)  # checked with the batch
        return self._run_encoder(self.metric.encoder, x)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of its steps, or of its time where these have no end.

        1 where neither ends.
        """
        total = self._total_steps()
        if total is not None:
            return min(1.0, self.trainer.global_step / total)
        share = self._share_of_time()
        return 1.0 if share is None else share

    def _total_steps(self) -> int | None:
        """Steps of the whole training; None without an end (``max_epochs`` −1, data of unknown length)."""
        total = self.trainer.estimated_stepping_batches
        return None if total < 0 or math.isinf(total) else max(1, int(total))

    def _share_of_time(self) -> float | None:
        """Share of ``max_time`` that has passed, in [0, 1], the same on every process; None without such a limit."""
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
        return self.schedule(step, total or 1)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by steps: of their number, or of the pace so far where time is the limit.

        Raises:
            ValueError: a schedule that needs an end, and training without one.
        """
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = LambdaLR(optimizer, lambda step: self._schedule_factor(step))
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """After resuming: keep the moments and the step, take the hyper-parameters of the present configuration.

        What the user says now wins over what was saved; each difference is logged.
        """
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the metric, so that :func:`lipsim.load` takes the checkpoint as well.

        Raises:
            ValueError: weights are not finite; the files that are there stay.
        """
        if not self._everywhere(weights_are_finite(self)):
            raise LipsimError(
                f"weights are NaN or infinite at step {self.trainer.global_step}, so no checkpoint is written over the "
                f"last one; {DIVERGED}"
            )
        preprocess = self.metric.preprocess
        # Also of an encoder that cannot be described.
        checkpoint[_RESIZE], checkpoint[_FRAMING] = preprocess.resize, preprocess.framing
        try:
            checkpoint[FORMAT] = json.dumps(describe(self.metric, self.metric.encoder))
        except ValueError:  # an encoder of the user's own, or LoRA layers: the checkpoint resumes, and no more
            return

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In an evaluation, expect images as the weights were trained on; in training, as the data module has them."""
        saved = checkpoint.get(_RESIZE)
        if saved is None and FORMAT in checkpoint:  # of an earlier version
            saved = json.loads(checkpoint[FORMAT])["resize"]
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, NothingRead):
            check_images(batch)
        self._batch = batch

    def nothing_learned(self) -> Tensor | None:
        """The loss of a batch of which nothing could be read: none, or on several processes one without a gradient.

        All of them have to take part when gradients are averaged.
        """
        if self.trainer.world_size == 1:
            return None
        return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at the first loss that is not finite, before it reaches a weight.

        Raises:
            ValueError: on every process, when the loss of one of them is NaN or infinite.
        """
        trainer, finite = self.trainer, bool(torch.isfinite(loss).all())
        if self._everywhere(finite):
            return
        if finite:
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

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds on every process; each has to ask."""
        return holds if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(holds)


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


def encoder_from(module: nn.Module | None, path: str | Path | None, role: str) -> tuple[nn.Module, Preprocess]:
    """The encoder that a stage trains: one given by class, or one loaded from an exported metric.

    Returns:
        The encoder, and how images come to it, stretched and by a resize in "float" where nobody says.

    Raises:
        ValueError: both are given, or none; or a metric of tiles, which are not trained on.
    """
    if (module is None) == (path is None):
        raise LipsimError(
            f"expected either a {role} (class_path and init_args) or a file to start from, not both or none"
        )
    if module is not None:
        resize = module.resize if isinstance(module, ResizingEncoder) else "float"
        return module, Preprocess(image_size_of(module), resize)
    assert path is not None
    metric = load(path)
    if isinstance(metric, TiledMetric):
        raise LipsimError(
            f"{path} is a metric of tiles, and stages train on whole images; save the metric of a tile first: "
            "lipsim.metric.save(lipsim.load(path, framing='stretch'), other_path)"
        )
    return metric.encoder.train().requires_grad_(True), metric.preprocess


def image_size_of(encoder: nn.Module) -> int:
    """Side of the images that an encoder takes, its attribute ``image_size``.

    Raises:
        ValueError: it has none.
    """
    size = declared_image_size(encoder)
    if not isinstance(size, int):
        raise LipsimError(f"{type(encoder).__name__} needs an attribute image_size, the side of the images it takes")
    return size
