"""What every run of this package has, whether the command line or Python starts it."""

from __future__ import annotations

import atexit
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lipsim.callbacks.certify_radii import CertifyRadii
from lipsim.callbacks.certify_retrieval import CertifyRetrieval
from lipsim.callbacks.certify_smoothed import CertifySmoothed
from lipsim.callbacks.certify_sum import CertifySum
from lipsim.callbacks.finished_average import FinishedAverage
from lipsim.callbacks.interruption import Interruption
from lipsim.callbacks.loggers import Loggers, run_loggers
from lipsim.callbacks.process_watch import ProcessWatch
from lipsim.callbacks.progress_bar import RunProgressBar
from lipsim.callbacks.progress_lines import ProgressLines
from lipsim.callbacks.run_folder import RunCheckpoint, RunFolder, SaveOnException, to_continue
from lipsim.callbacks.run_report import RunReport
from lipsim.callbacks.skipped_images import ReportSkipped
from lipsim.results.retrieval import retrieval_rows
from lipsim.results.tables import certified_rows, print_table, smoothed_rows, summing
from lipsim.utils.claim import FolderClaim, claim_folder
from lipsim.utils.errors import LipsimError
from lipsim.utils.slurm import check_slurm


class EvaluationOptions(TypedDict, total=False):
    """Options of the trainer in :func:`lipsim.evaluate`; see :class:`lightning.Trainer`."""

    accelerator: str | Accelerator
    devices: int | str | list[int]
    num_nodes: int
    strategy: str | Strategy
    precision: int | str
    deterministic: bool | str
    benchmark: bool
    limit_test_batches: int | float
    enable_progress_bar: bool
    enable_model_summary: bool
    logger: Loggers
    profiler: str | Profiler


class TrainingOptions(EvaluationOptions, total=False):
    """Options of the trainer in :func:`lipsim.train`; see :class:`lightning.Trainer`."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | timedelta | dict[str, int] | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    overfit_batches: int | float
    check_val_every_n_epoch: int | None
    val_check_interval: int | float
    num_sanity_val_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: int | float
    gradient_clip_algorithm: str
    log_every_n_steps: int
    enable_checkpointing: bool
    fast_dev_run: bool | int
    sync_batchnorm: bool
    detect_anomaly: bool
    reload_dataloaders_every_n_epochs: int


def check_options(options: Mapping[str, Any], known: type) -> None:
    """Refuse options that a function does not hand on to its trainer.

    Args:
        options: by name.
        known: the TypedDict that names them.

    Raises:
        ValueError: there are some.
    """
    names = sorted(known.__annotations__)
    if unknown := sorted(options.keys() - set(names)):
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"those of the trainer are {', '.join(names)}"
        raise LipsimError(f"there is no option {unknown[0]}; {hint}")


def with_defaults(options: Mapping[str, Any], checkpoint: str | Path | None = None) -> dict[str, Any]:
    """Options of a trainer that a user gave, with what every run has besides.

    A CSV log, a page that shows it, a progress bar or lines, checkpoints, also on failure, and a folder that holds one
    run, unless the options have their own. What a run writes goes into ``default_root_dir``.

    Args:
        options: of :class:`lightning.Trainer`, ``default_root_dir`` among them.
        checkpoint: what training resumes from; see :class:`RunFolder`.

    Raises:
        OSError: nothing can be written into the folder.
        ValueError: another job is at work in the folder, or a SLURM environment in which Lightning could not tell which
            process this is.
    """
    check_slurm()
    atexit.unregister(_leave_process_group)  # once is enough
    atexit.register(_leave_process_group)
    options = dict(options)
    directory, trial = Path(options["default_root_dir"]), bool(options.get("fast_dev_run"))
    callbacks = options.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    if options.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(RunProgressBar() if sys.stdout.isatty() else ProgressLines())
    if trial:  # Lightning 2.6 would write a last.ckpt of its one batch
        callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
        options["enable_checkpointing"] = False
    elif options.get("enable_checkpointing") is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
        callbacks.append(RunCheckpoint(directory / "checkpoints"))
    if not any(isinstance(c, Interruption) for c in callbacks):
        callbacks.append(Interruption())
    callbacks += [ReportSkipped(), ProcessWatch()]
    checkpoint = to_continue(directory, checkpoint)
    claimed = None if trial else _claim(directory)
    folder = RunFolder(None if checkpoint is None else str(checkpoint), claimed)
    # First: the folder makes room for what the others write, and weights are those that they are to see.
    options["callbacks"] = [folder, FinishedAverage(), *callbacks, SaveOnException()]
    keeps_nothing = options.get("logger") is False and options.get("enable_checkpointing") is False
    if not (trial or keeps_nothing):
        options["callbacks"].append(RunReport())  # last: it tells of what the others did
    plugins = options.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        # Signals are Interruption's: Lightning would save in the middle of a step, as hpc_ckpt, besides last.ckpt.
        options["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
    # Advertisements among the messages of a run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    # A trial logs nothing, and says nevertheless what is wrong with the loggers.
    try:
        options["logger"] = run_loggers(options.get("logger"), directory, checkpoint, trial=trial)
    except BaseException:
        folder.release()
        raise
    if options.get("accelerator", "auto") == "auto" and not torch.cuda.is_available():
        options["accelerator"] = "cpu"  # scores are computed in float64, which Apple's GPUs lack
    return options


def make_trainer(options: Mapping[str, Any], checkpoint: str | Path | None = None) -> L.Trainer:
    """A trainer of :func:`with_defaults`. Where none can be made its folder is free again.

    (Whoever keeps the error, as a notebook does, would keep the claim with it.)
    """
    given = with_defaults(options, checkpoint)
    try:
        return L.Trainer(**given)
    except BaseException:
        for callback in given["callbacks"]:
            if isinstance(callback, RunFolder):
                callback.release()
        raise


@rank_zero_only
def _claim(directory: Path) -> FolderClaim | None:
    """The folder of a run, for the first process; the others get None."""
    # Where Lightning starts the processes of each node, the first of every node takes itself for the first of all.
    return claim_folder(directory) if os.environ.get("NODE_RANK", "0") == "0" else None


def _leave_process_group() -> None:
    """End the threads of a process group, over which a Python that ends can crash; Lightning does so for NCCL alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silence what is said too often, or is not so.

    Lightning 2.6 calls what torch 2.14 deprecates; and it warns that the log of an earlier run will be deleted, which
    has been moved by then.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        yield


def print_certified(trainer: L.Trainer) -> None:
    """The last certification of each set as a table in the terminal."""
    title = "Majority score in %, natural and certified at ℓ2 budgets ε"
    for callback in trainer.callbacks if trainer.is_global_zero else ():  # type: ignore[attr-defined]
        if isinstance(callback, CertifyRadii) and callback.results:
            if rows := certified_rows(callback.results):  # none where no set has triplets
                print_table(Console(), rows, title)
        elif isinstance(callback, CertifySmoothed) and callback.results:
            found = callback.results
            about = f"smoothed: σ = {found['sigma']:g}, n = {found['n']}, α = {found['alpha']:g} for each answer"
            if rows := smoothed_rows(found):
                print_table(Console(), rows, f"{title}; {about}")
        elif isinstance(callback, CertifySum) and callback.results:
            if rows := certified_rows(callback.results):
                print_table(Console(), rows, f"{title}, {summing(callback.results)}")
        elif isinstance(callback, CertifyRetrieval) and callback.results:
            if rows := retrieval_rows(callback.results):
                print_table(Console(), rows, "Searches: score in %, natural, certified and attacked at ℓ2 budgets ε")
