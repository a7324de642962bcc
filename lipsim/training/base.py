"""What the three stages share: optimisation, checks of their input, 2AFC scores, resuming."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lipsim import export
from lipsim.data import Triplet
from lipsim.data.transforms import Preprocess
from lipsim.layers import freeze, unfreeze
from lipsim.metric import PerceptualMetric
from lipsim.metrics import TwoAFCScore
from lipsim.precision import full_precision
from lipsim.training.acceleration import Acceleration
from lipsim.training.schedules import Schedule

DIVERGED = "resume from the last checkpoint with a lower rate (--model.optimizer.lr) or --trainer.gradient_clip_val 1"
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
Features = tuple[Tensor, Tensor, Tensor]
Evaluation = dict[str, Features]


class MetricModule(L.LightningModule):
    """A stage that trains the encoder of a metric and scores it on triplets.

    Validation and test embed each triplet in full precision and hand the features ``(z, z0, z1)`` on; the callbacks
    certify and attack from there.

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
        super().__init__()
        if torch.get_default_dtype() == torch.float64:
            metric.encoder.float()  # data are float32 whatever the default; other precisions are the trainer's
        self.metric = metric
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.scores = nn.ModuleDict()
        self._configured: list[dict[str, Any]] = []
        self._batch: Any = None  # the one in training, for a message about it
        self.acceleration = acceleration or Acceleration()
        # By the identity of the encoder that it runs: a copy of this module must not train the original's.
        self._run_encoder: dict[int, Callable[[Tensor], Tensor]] = {}

    def embed(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` of images in a training step, computed as the acceleration says."""
        self.metric.check_shape(x)
        encoder = self.metric.encoder
        if id(encoder) not in self._run_encoder:
            self._run_encoder = {id(encoder): self.acceleration.wrap(encoder)}
        return self._run_encoder[id(encoder)](x)

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
                raise ValueError(
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

    def setup(self, stage: str) -> None:
        """Expect images as the data module resizes them: what a metric is trained on is what it is for."""
        given = getattr(getattr(self.trainer.datamodule, "preprocess", None), "resize", None)  # type: ignore[attr-defined]
        if given is not None and given != self.metric.preprocess.resize:
            rank_zero_info(f"the metric expects images resized by {given!r} from now on, as these data are")
            self.metric.preprocess = Preprocess(self.metric.image_size, given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the metric, so that :func:`lipsim.load` takes the checkpoint as well.

        Raises:
            ValueError: weights are not finite; the files that are there stay.
        """
        try:
            checkpoint[export.FORMAT] = json.dumps(export.describe(self.metric, self.metric.encoder))
        except ValueError:  # an encoder of the user's own, or LoRA layers: the checkpoint resumes, and no more
            return

        if not self._everywhere(weights_are_finite(self)):
            raise ValueError(
                f"weights are NaN or infinite at step {self.trainer.global_step}, so no checkpoint is written over the "
                f"last one; {DIVERGED}"
            )
        try:
            checkpoint[export.FORMAT] = json.dumps(export.describe(self.metric, self.metric.encoder))
        except ValueError:  # an encoder of the user's own, or LoRA layers: the checkpoint resumes, and no more
            return

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        check_images(batch)
        self._batch = batch

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at the first loss that is not finite, before it reaches a weight.

        Raises:
            ValueError: on every process, when the loss of one of them is NaN or infinite.
        """
        trainer, finite = self.trainer, bool(torch.isfinite(loss).all())
        if self._everywhere(finite):
            return
        if finite:
            raise ValueError(f"the loss of another process is not finite at step {trainer.global_step}; {DIVERGED}")
        rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        path = save_batch(self._batch, Path(trainer.default_root_dir) / f"not_finite{rank}.safetensors")
        cause = "" if weights_are_finite(self) else " as weights are already"
        raise ValueError(
            f"the loss is {float(loss.detach())} at step {trainer.global_step}{cause}; its batch is in {path}; "
            f"{DIVERGED}"
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = None

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds on every process; each has to ask."""
        return holds if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(holds)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_images(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_images(batch)

    def on_validation_start(self) -> None:
        self._start_evaluation()

    def on_test_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Score a batch of triplets, ``{"features": (z, z0, z1)}``."""
        return self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Score a batch of triplets, ``{"features": (z, z0, z1)}``."""
        return self._evaluate(batch, dataloader_idx)

    def on_validation_end(self) -> None:
        unfreeze(self.metric)

    def on_test_end(self) -> None:
        unfreeze(self.metric)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def set_name(self, dataloader_idx: int) -> str:
        """Name of the evaluation set that a data loader serves."""
        stage = "test" if self.trainer.testing else "val"
        names = getattr(self.trainer.datamodule, f"{stage}_names", None) or []  # type: ignore[attr-defined]
        return names[dataloader_idx] if dataloader_idx < len(names) else f"set{dataloader_idx}"

    def groups(self, name: str) -> dict[str, Tensor]:
        """Parts of an evaluation set that are scored apart as well: name in the results → mask over the set's samples.

        The name is that of the set and that of the part, as in ``nights_imagenet``.
        """
        stage = "test" if self.trainer.testing else "val"
        groups = getattr(self.trainer.datamodule, f"{stage}_groups", None) or {}  # type: ignore[attr-defined]
        return {f"{name}_{group}": mask for group, mask in groups.get(name, {}).items()}

    def _start_evaluation(self) -> None:
        freeze(self.metric)
        self.scores.clear()

    def _evaluate(
        self, batch: Any, dataloader_idx: int, embed: Callable[[Tensor], Tensor] | None = None
    ) -> Evaluation | None:
        if not isinstance(batch, Triplet):  # a folder of images, in distillation
            return None
        check_votes(batch)
        with full_precision():
            z, z0, z1 = batch.embed(embed or self.metric.embed)
        margin = self.metric.margin(z, z0, z1)
        name = self.set_name(dataloader_idx)
        self._score(name, margin, batch.right_vote, batch.index)
        for group, mask in self.groups(name).items():
            # Also without a row: processes must not disagree on which scores there are.
            rows = mask[batch.index.cpu()].to(margin.device)
            self._score(group, margin[rows], batch.right_vote[rows], batch.index[rows])
        return {"features": (z, z0, z1)}

    def _score(self, name: str, margin: Tensor, right_vote: Tensor, index: Tensor) -> None:
        if name not in self.scores:
            self.scores[name] = nn.ModuleDict(
                {kind: TwoAFCScore(kind).to(self.device) for kind in ("majority", "vote")}
            )
        for score in self.scores[name].values():  # type: ignore[operator]
            score.update(margin, right_vote, index)

    def _log_scores(self, stage: str) -> None:
        parts = {part for name in self.scores for part in self.groups(name)}
        for name, scores in self.scores.items():
            for kind, score in scores.items():  # type: ignore[operator]
                # torchmetrics gathers inside compute(); the mean over processes is one of equal numbers.
                self.log(
                    f"{stage}/{name}/{kind}_score",
                    score.compute().float(),
                    prog_bar=kind == "majority" and name not in parts,
                    sync_dist=True,
                )
        self.scores.clear()


def weights_are_finite(module: nn.Module) -> bool:
    """Whether no parameter and no buffer is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*module.parameters(), *module.buffers()))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def evaluation_loaders(trainer: L.Trainer) -> list[DataLoader]:
    """The data loaders of the evaluation that is running."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return list(loaders) if isinstance(loaders, (list, tuple)) else [cast(DataLoader, loaders)]


def images_of(batch: Any) -> Tensor:
    """All images of a batch, ``(M, 3, H, W)``: of triplets, of ``(images, labels)``, or the batch itself."""
    if isinstance(batch, Triplet):
        return torch.cat(batch.images())
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def check_images(batch: Any) -> None:
    """Refuse a batch of images that an encoder should never see.

    Raises:
        ValueError: NaN or infinite values, or values outside [0, 1].
    """
    tensors = batch.images() if isinstance(batch, Triplet) else (images_of(batch),)
    for images in tensors:
        low, high = (float(t) for t in torch.aminmax(images))
        if low >= 0 and high <= 1:
            continue
        where = f" (triplets {batch.index.tolist()[:8]}…)" if isinstance(batch, Triplet) else ""
        if not (low > -float("inf") and high < float("inf")):  # NaN fails every comparison
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"images {bad[:8]} of the batch have NaN or infinite pixels{where}; repair or remove them")
        hint = "; divide 8-bit images by 255" if high > 2 else ""
        raise ValueError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}{where}{hint}")


def check_votes(batch: Triplet) -> None:
    """Refuse triplets that nobody has judged: a score of them would be an invention.

    Raises:
        ValueError: votes that are NaN or outside [0, 1].
    """
    bad = batch.index[~((batch.right_vote >= 0) & (batch.right_vote <= 1))]
    if len(bad):
        raise ValueError(f"triplets {bad.tolist()[:8]} have no vote in [0, 1]; give the votes or leave them out")


def encoder_from(module: nn.Module | None, path: str | Path | None, role: str) -> nn.Module:
    """The encoder that a stage trains: one given by class, or one loaded from an exported metric.

    Raises:
        ValueError: both are given, or none.
    """
    if (module is None) == (path is None):
        raise ValueError(
            f"expected either a {role} (class_path and init_args) or a file to start from, not both or none"
        )
    if module is not None:
        return module
    assert path is not None
    return export.load(path).encoder.train().requires_grad_(True)


def image_size_of(encoder: nn.Module) -> int:
    """Side of the images that an encoder takes, its attribute ``image_size``.

    Raises:
        ValueError: it has none.
    """
    size = getattr(encoder, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(encoder).__name__} needs an attribute image_size, the side of the images it takes")
    return size
