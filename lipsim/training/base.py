"""What the three stages share: optimisation, checks of their input, 2AFC scores, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lipsim import export
from lipsim.checks import check_range
from lipsim.data import Triplet
from lipsim.data.transforms import Preprocess
from lipsim.layers import freeze, unfreeze
from lipsim.metric import PerceptualMetric
from lipsim.metrics import TwoAFCScore
from lipsim.precision import full_precision
from lipsim.training.acceleration import Acceleration
from lipsim.training.schedules import Schedule

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
        self.metric = metric
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.scores = nn.ModuleDict()
        self._configured: list[dict[str, Any]] = []
        self.acceleration = acceleration or Acceleration()
        # By the identity of the encoder that it runs: a copy of this module must not train the original's.
        self._run_encoder: dict[int, Callable[[Tensor], Tensor]] = {}

    def embed(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` of images in a training step, computed as the acceleration says."""
        self.metric.check_images(x, check_range=False)  # checked with the batch
        encoder = self.metric.encoder
        if id(encoder) not in self._run_encoder:
            self._run_encoder = {id(encoder): self.acceleration.wrap(encoder)}
        return self._run_encoder[id(encoder)](x)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.trainer.global_step / total) if 0 < total < math.inf else 1.0

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by steps."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, total))
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
        """Add what rebuilds the metric, so that :func:`lipsim.load` takes the checkpoint as well."""
        try:
            checkpoint[export.FORMAT] = json.dumps(export.describe(self.metric, self.metric.encoder))
        except ValueError:  # an encoder of the user's own, or LoRA layers: the checkpoint resumes, and no more
            return

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        check_images(batch)

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
    where = f" (triplets {batch.index.tolist()[:8]}…)" if isinstance(batch, Triplet) else ""
    for images in batch.images() if isinstance(batch, Triplet) else (images_of(batch),):
        check_range(images, where)


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
