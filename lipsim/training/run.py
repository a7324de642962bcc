"""Train a stage into a run directory, anew or from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from lipsim.callbacks.export_metric import ExportMetric
from lipsim.callbacks.faults import clear_faults
from lipsim.callbacks.run_folder import CHECKPOINT_NAMES, LAST_READABLE, checkpoint_folders, to_continue
from lipsim.callbacks.run_options import (
    TrainingOptions,
    check_options,
    make_trainer,
    print_certified,
    quiet_warnings,
)
from lipsim.callbacks.run_record import RunRecord
from lipsim.layers import freeze, unfreeze
from lipsim.metric import PerceptualMetric
from lipsim.metric.files import describe
from lipsim.teachers.lora_tuning import merged
from lipsim.training.base import Stage
from lipsim.training.checkpoints import check_checkpoint, check_moments, find_last, read_stage
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


def train(
    stage: Stage,
    data: L.LightningDataModule,
    *,
    directory: str | Path = "runs/train",
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    seed: int | None = 0,
    **options: Unpack[TrainingOptions],
) -> PerceptualMetric:
    """Train a stage; the directory gets checkpoints, a log, a page that shows it, the exported metric and a record.

    Costs what its epochs cost and says how far they are (``enable_progress_bar=False``: nothing). Validation scores the
    metric; :class:`lipsim.callbacks.CertifyRadii` among the callbacks certifies it too. Files of an earlier run in the
    directory are moved to ``previous/TIME``, unless this one continues it.

    Args:
        stage: :class:`lipsim.training.Distillation`, :class:`FineTuning`, :class:`TeacherTuning` or one of your own; it
            is trained in place, from the weights that it has.
        data: training and validation sets.
        directory: of the run.
        callbacks: what else happens. Without an :class:`lipsim.callbacks.ExportMetric` among them the metric is written
            to ``metric.safetensors``, if a file can hold its encoder.
        checkpoint: ``.ckpt`` of this stage to continue from; "last": the latest in the directory, and an error if it
            is damaged; "last-readable": the latest that is not. Without any, these two begin anew.
        seed: of the generators of Python, numpy and torch, which are set to it before training (the weights of the
            stage have been drawn by then); None: that which torch was given last. Training gives torch's another one
            at each step and leaves it there.
        options: of :class:`lightning.Trainer`: ``max_epochs``, ``accelerator``, ``devices``, ``precision``, …
            ``logger`` takes "tensorboard" and "wandb" as well, beside the CSV log.

    Returns:
        The trained metric, as :func:`lipsim.load` gives it: frozen, in evaluation mode, its bound audited.

    Raises:
        FileNotFoundError: no such checkpoint or data.
        OSError: nothing can be written into the directory, or its disk is full.
        ValueError: a checkpoint of another stage, bad images or votes, a loss that is not finite, or options that are
            unknown; a logger whose package is not installed.
    """
    check_options(options, TrainingOptions)
    if not isinstance(stage, Stage):
        raise LipsimError(f"expected a stage of lipsim.training, got a {type(stage).__name__}")
    if seed is not None:
        L.seed_everything(seed, workers=True)
    checkpoint = None if checkpoint is None else str(user_path(checkpoint))
    record = {
        "stage": stage,
        "optimizer": stage.optimizer_factory,
        "data": data,
        "callbacks": list(callbacks),
        "directory": directory,
        "checkpoint": checkpoint,
        "seed": seed,
        **options,
    }
    callbacks = [*callbacks, RunRecord("train", record)]
    if not any(isinstance(callback, ExportMetric) for callback in callbacks):
        if (reason := _not_exported(stage.metric)) is None:
            callbacks.append(ExportMetric())
        else:
            rank_zero_info(f"checkpoints are all that is written of this metric: {reason}")
    given = {"log_every_n_steps": 10, **options, "default_root_dir": str(user_path(directory)), "callbacks": callbacks}
    modes = {module: module.training for module in stage.modules()}
    try:
        with quiet_warnings():
            trainer = make_trainer(given, checkpoint)
            fit(trainer, stage, data, checkpoint)
    finally:  # exporting, or an error in validation, leaves the stage in evaluation mode, and the next call would too
        unfreeze(stage.metric)
        for module, mode in modes.items():
            module.training = mode
    metric = copy.deepcopy(stage.metric)
    metric.encoder = merged(metric.encoder)
    metric.requires_grad_(False)
    freeze(metric)
    if metric.has_bound:
        metric.audit()
        metric.require_feature_error(metric.declared_feature_error)  # as of a metric from a file
    return metric


def fit(
    trainer: L.Trainer, stage: Stage, data: L.LightningDataModule | None, checkpoint: str | Path | None = None
) -> None:
    """:func:`train` with a trainer that has the callbacks."""
    told, checkpoint = checkpoint, to_continue(Path(trainer.default_root_dir), checkpoint)
    if checkpoint != told:
        rank_zero_info("SLURM has started this job again: it continues from the latest checkpoint of its own")
    with clear_faults(trainer):
        if str(checkpoint) in ("last", LAST_READABLE):
            checkpoint = find_last(checkpoint_folders(trainer), fall_back=str(checkpoint) == LAST_READABLE)
            if checkpoint is None:
                rank_zero_info("there is no checkpoint to continue from yet: training begins anew")
        elif checkpoint is not None and str(checkpoint) not in CHECKPOINT_NAMES:
            read_stage(Path(checkpoint), resume=True)
        if checkpoint is not None and str(checkpoint) not in CHECKPOINT_NAMES:
            check_checkpoint(Path(checkpoint), stage)
            check_moments(Path(checkpoint), stage.make_optimizer())
        # Lightning's default would unpickle whatever a checkpoint holds.
        trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        print_certified(trainer)


def _not_exported(metric: PerceptualMetric) -> str | None:
    """Why no file can hold a metric; None if one can."""
    try:
        describe(metric, merged(metric.encoder))
    except LipsimError as error:
        return str(error)
    return None
