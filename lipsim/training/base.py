"""What the three stages share: optimisation, checks of their input, 2AFC scores, resuming."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
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
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lipsim import export
from lipsim.checks import check_range
from lipsim.data import Triplet
from lipsim.data.loading import PlannedBatches, check_count, num_samples, served_batches
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
        # By loader: positions seen in this evaluation, and the loader with what it serves.
        self._seen: dict[int, list[int]] = {}
        self._batches: dict[int, tuple[Any, list[list[int]] | None]] = {}
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
        """Expect images as the data module resizes them: what a metric is trained on is what it is for.

        Raises:
            ValueError: weights in float64, which the float32 images do not go with.
        """
        if self.trainer.precision == "64-true":
            raise ValueError(
                "images are float32, and --trainer.precision=64-true would have float64 weights; leave it at 32-true "
                "(certificates are computed in float64 in any case)"
            )
        given = getattr(getattr(self.trainer.datamodule, "preprocess", None), "resize", None)  # type: ignore[attr-defined]
        if given is not None and given != self.metric.preprocess.resize:
            rank_zero_info(f"the metric expects images resized by {given!r} from now on, as these data are")
            self.metric.preprocess = Preprocess(self.metric.image_size, given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the metric, so that :func:`lipsim.load` takes the checkpoint as well.

        Raises:
            ValueError: weights are not finite; the files that are there stay.
        """
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
        return self._evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Score a batch of triplets, ``{"features": (z, z0, z1)}``."""
        return self._evaluate(batch, batch_idx, dataloader_idx)

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
        return self.set_names()[dataloader_idx]

    def set_names(self) -> list[str]:
        """Names of the evaluation sets, in the order of their loaders.

        Raises:
            ValueError: two sets, or a set and a part of another, have one name.
        """
        stage = "test" if self.trainer.testing else "val"
        return evaluation_names(self.trainer.datamodule, stage, _loaders(self.trainer))  # type: ignore[attr-defined]

    def groups(self, name: str) -> dict[str, Tensor]:
        """Parts of an evaluation set that are scored apart as well: name in the results → mask over the set's samples.

        The name is that of the set and that of the part, as in ``nights_imagenet``. A mask has an entry for each
        position of the loader's data set.
        """
        stage = "test" if self.trainer.testing else "val"
        groups = getattr(self.trainer.datamodule, f"{stage}_groups", None) or {}  # type: ignore[attr-defined]
        return {f"{name}_{group}": mask for group, mask in groups.get(name, {}).items()}

    def positions(self, batch: Triplet, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """What tells the triplets of a batch from all others of their set, ``(N,)`` int64: positions in its data set.

        A loader whose own sampler decides what it serves does not tell; there the index stands for the position, on one
        process.

        Raises:
            ValueError: a ``collate_fn`` has dropped triplets, or nobody knows the positions and there are several
                processes, whose samplers repeat some.
        """
        batches = self._served(dataloader_idx)
        if batches is None:
            if self.trainer.world_size > 1:
                raise ValueError(
                    f"nobody knows which triplets the sampler of {self.set_name(dataloader_idx)} repeats on several "
                    "processes; serve the set in order (shuffle=False, no sampler), or evaluate on one process"
                )
            return batch.index
        expected = batches[batch_idx]
        if len(expected) != len(batch):
            raise ValueError(
                f"expected {len(expected)} triplets in batch {batch_idx} of {self.set_name(dataloader_idx)}, its "
                f"collate_fn returned {len(batch)}; leave unwanted triplets out of the data set "
                "(torch.utils.data.Subset)"
            )
        return torch.tensor(expected, dtype=torch.int64, device=batch.index.device)

    def expected_positions(self, dataloader_idx: int) -> frozenset[int] | None:
        """Positions that this process, or all together, must serve of a set; None where nobody knows."""
        batches = self._served(dataloader_idx)
        dataset = getattr(evaluation_loaders(self.trainer)[dataloader_idx], "dataset", None)
        if isinstance(dataset, PlannedBatches):
            return dataset.expected
        if batches is None:
            return None
        trainer = self.trainer
        if trainer.sanity_checking:
            limits = trainer.num_sanity_val_batches
        else:
            limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        count = min(len(batches), limits[dataloader_idx])
        return frozenset(position for batch in batches[: int(count)] for position in batch)

    def _served(self, dataloader_idx: int) -> list[list[int]] | None:
        loader = evaluation_loaders(self.trainer)[dataloader_idx]
        found, batches = self._batches.get(dataloader_idx, (None, None))
        if found is not loader:
            batches = served_batches(loader)
            self._batches[dataloader_idx] = loader, batches
        return batches

    def _start_evaluation(self) -> None:
        freeze(self.metric)
        self.scores.clear()
        self._seen, self._batches = {}, {}
        self._check_groups()

    def _check_groups(self) -> None:
        """Refuse masks that do not say of each position whether it belongs to a part.

        Raises:
            ValueError: masks of another length or type, of no set, or of a set whose loader has no positions.
        """
        names = self.set_names()
        stage = "test" if self.trainer.testing else "val"
        groups = getattr(self.trainer.datamodule, f"{stage}_groups", None) or {}  # type: ignore[attr-defined]
        unknown = [name for name in groups if name not in names and groups[name]]
        if unknown:
            raise ValueError(f"{stage}_groups names parts of {', '.join(unknown)}; the sets are {', '.join(names)}")
        for i, (name, loader) in enumerate(zip(names, evaluation_loaders(self.trainer), strict=True)):
            for part, mask in self.groups(name).items():
                if self._served(i) is None:
                    raise ValueError(
                        f"{part} needs to know the positions of its triplets; serve {name} in order (shuffle=False, no "
                        "sampler)"
                    )
                size = num_samples(loader)
                if mask.dtype != torch.bool or mask.shape != (size,):
                    raise ValueError(
                        f"expected a bool mask of {part} over the {size} positions of the data set that {name} is "
                        f"served from, got {tuple(mask.shape)} {mask.dtype}"
                    )

    def _evaluate(
        self, batch: Any, batch_idx: int, dataloader_idx: int, embed: Callable[[Tensor], Tensor] | None = None
    ) -> Evaluation | None:
        if not isinstance(batch, Triplet):  # a folder of images, in distillation
            return None
        check_votes(batch)
        with full_precision():
            z, z0, z1 = batch.embed(embed or self.metric.embed)
        margin = self.metric.margin(z, z0, z1)
        name, positions = self.set_name(dataloader_idx), self.positions(batch, batch_idx, dataloader_idx)
        self._seen.setdefault(dataloader_idx, []).extend(positions.tolist())
        self._score(name, margin, batch.right_vote, positions)
        for group, mask in self.groups(name).items():
            # Also without a row: processes must not disagree on which scores there are.
            rows = mask[positions.cpu()].to(margin.device)
            self._score(group, margin[rows], batch.right_vote[rows], positions[rows])
        return {"features": (z, z0, z1)}

    def _score(self, name: str, margin: Tensor, right_vote: Tensor, positions: Tensor) -> None:
        if name not in self.scores:
            self.scores[name] = nn.ModuleDict(
                {kind: TwoAFCScore(kind).to(self.device) for kind in ("majority", "vote")}
            )
        for score in self.scores[name].values():  # type: ignore[operator]
            score.update(margin, right_vote, positions)

    def _log_scores(self, stage: str) -> None:
        for i, seen in self._seen.items():
            check_count(self.set_name(i), seen, self.expected_positions(i))
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
    return tree_flatten(_loaders(trainer))[0]


def _loaders(trainer: L.Trainer) -> Any:
    """What the hook of the evaluation that is running returned: loaders, or a dictionary of them."""
    if trainer.testing:
        return trainer.test_dataloaders
    # trainer.val_dataloaders would still be those of an earlier fit.
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return None if loop._combined_loader is None else loop._combined_loader.iterables


def evaluation_names(data: Any, stage: str, loaders: Any) -> list[str]:
    """Names of evaluation sets in the order of their loaders: ``test_names`` or ``val_names`` of the data, or the keys.

    Args:
        data: data module, or None.
        stage: "test" or "val".
        loaders: what its hook returned.

    Raises:
        ValueError: two sets, or a set and a part of another, have one name.
    """
    count = len(tree_flatten(loaders)[0])
    names = list(getattr(data, f"{stage}_names", None) or (loaders if isinstance(loaders, Mapping) else []))[:count]
    names += [f"set{i}" for i in range(len(names), count)]
    groups = getattr(data, f"{stage}_groups", None) or {}
    every = [*names, *(f"{name}_{group}" for name in dict.fromkeys(names) for group in groups.get(name, {}))]
    repeated = sorted({name for name in every if every.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several evaluation sets are called {', '.join(repeated)}, and results are kept by name; give each its "
            f"own in {stage}_names of the data module"
        )
    return names


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
