"""What a training run does with the files of an earlier one in its folder, the trainer's ``default_root_dir``."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lipsim.callbacks.checkpoint_files import write_checkpoints_whole
from lipsim.callbacks.export_metric import ExportMetric
from lipsim.evaluation.module import weights_are_finite
from lipsim.utils.claim import FolderClaim, claim_folder
from lipsim.utils.files import parse_json, remove_leftovers, state_fingerprint
from lipsim.utils.slurm import slurm_job, was_requeued

PREVIOUS = "previous"
LAST_READABLE = "last-readable"
# Which are found in the folder, by Lightning or by lipsim.training.checkpoints.
CHECKPOINT_NAMES = ("best", "last", LAST_READABLE, "hpc", "registry")
# What runs of this package write, besides the exported metric. Anything else in the folder is left alone, the folders
# of other stages among it.
FILES = (
    *("checkpoints", "config*.yaml", "arguments*.yaml", "environment*.json", "metrics.csv", "metrics-*.csv"),
    *("not_finite*.safetensors", "skipped*.csv", "results.json", "plots", "adversarial"),
    *("radii*.csv", "attacks*.csv", "smoothed*.csv", "summed*.csv", "retrieval*.csv"),
    *("report.md", "report.html", "progress.json", "tensorboard", "tensorboard-*", "wandb", "wandb-*"),
)


class RunFolder(Callback):
    """A folder holds one run. Training that begins anew moves what an earlier run left to ``previous/TIME``.

    ``TIME`` is when the earlier run wrote its last file. Nothing is removed. Training that resumes from a checkpoint in
    the folder continues in place, as does one that SLURM has put back into its queue; tests, validation and
    ``fast_dev_run`` move nothing. While it runs no other job gets the folder (:mod:`lipsim.utils.claim`), and
    checkpoints get their name there when they are whole.

    Args:
        checkpoint: what the training resumes from: a file, or a word that Lightning takes for one of its own.
        claim: of the folder, where the process has it already.
    """

    def __init__(self, checkpoint: str | None = None, claim: FolderClaim | None = None) -> None:
        super().__init__()
        self.checkpoint, self._claim = checkpoint, claim

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write_checkpoints_whole(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        root = Path(trainer.default_root_dir)
        self._claim = self._claim or claim_folder(root)
        # Not before: processes that the trainer starts read the same files again, which may lie in the folder.
        if stage != "fit":
            return
        for folder in (root, root / "checkpoints"):  # what writers that were killed have left
            remove_leftovers(folder)
        if continues(root, self.checkpoint):
            return
        exports = [c.output(trainer) for c in trainer.callbacks if isinstance(c, ExportMetric)]  # type: ignore[attr-defined]
        moved = set_aside(root, exports, log_folders(trainer))
        if moved is not None:
            rank_zero_info(f"{root} had an earlier run, which is in {moved} now; --ckpt_path continues one instead")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        # Not where there was none to continue from, as has been said.
        if trainer.ckpt_path and not trainer.fast_dev_run and continues(root, self.checkpoint):  # type: ignore[attr-defined]
            rank_zero_info(f"continuing the run in {root}")

    def release(self) -> None:
        """Let other jobs have the folder."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def continues(root: Path, checkpoint: str | Path | None) -> bool:
    """Whether training from a checkpoint, or from none, continues the run in a folder."""
    if any(root.glob("hpc_ckpt_*.ckpt")):  # of SLURM's queue: Lightning resumes from it
        return True
    if checkpoint is None or str(checkpoint) in CHECKPOINT_NAMES:
        return checkpoint is not None
    place, folder = Path(checkpoint).resolve(), root.resolve()
    return place.is_relative_to(folder) and not place.is_relative_to(folder / PREVIOUS)


def to_continue(root: Path, checkpoint: str | Path | None) -> str | Path | None:
    """What a training resumes from: as it was told, but after SLURM has requeued its job from what it has itself saved.

    Args:
        root: the folder of the run.
        checkpoint: what it was told.
    """
    if checkpoint in ("last", LAST_READABLE) or not was_requeued() or not any(root.glob("checkpoints/*.ckpt")):
        return checkpoint
    try:
        environment = parse_json((root / "environment.json").read_bytes())
    except (FileNotFoundError, ValueError):  # it did not come so far
        return checkpoint
    mine = isinstance(environment, dict) and environment.get("job") == slurm_job()
    return "last" if mine else checkpoint


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Where a run has its checkpoints."""
    places = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [Path(trainer.default_root_dir) / (place or "checkpoints") for place in dict.fromkeys(places)]


def log_folders(trainer: L.Trainer) -> set[Path]:
    """Folders that loggers of a trainer have begun to write to: Lightning opens them before anything else."""
    found = {logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)}
    found |= {os.path.join(one.save_dir or ".", "wandb") for one in trainer.loggers if isinstance(one, WandbLogger)}
    return {Path(folder).absolute() for folder in found}


def set_aside(root: Path, exports: Iterable[Path] = (), in_use: Collection[Path] = ()) -> Path | None:
    """Move the files of an earlier run in ``root`` to a folder of their own, which is returned; None without any.

    Args:
        root: of the run.
        exports: files that are moved as well, where they are there and in ``root``.
        in_use: absolute paths that stay.
    """
    found = sorted({path for pattern in FILES for path in root.glob(pattern) if path.absolute() not in in_use})
    found += sorted({path for path in exports if path.is_file() and path.parent == root})
    if not found:
        return None
    files = [file for path in found for file in ([path] if path.is_file() else path.rglob("*"))]
    written = max((file.stat().st_mtime for file in files), default=0.0)
    name, number = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(written)), 1
    folder = root / PREVIOUS / name
    while folder.exists():
        number += 1
        folder = root / PREVIOUS / f"{name}_{number}"
    folder.mkdir(parents=True)
    for path in found:
        os.rename(path, folder / path.name)
    return folder


def next_free(path: Path) -> Path:
    """The first of ``NAME-1``, ``NAME-2``, … beside a file or folder that nothing has, with its suffix."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


class SaveOnException(Callback):
    """Saves ``checkpoints/on_exception.ckpt`` when training breaks off, so that nothing is lost.

    Unless weights are not finite: the periodic checkpoints have the last that were. With several processes only some of
    them may have failed, and saving would wait for the others: there the periodic checkpoints have to do.
    """

    def __init__(self) -> None:
        super().__init__()
        # Fingerprint of the weights that are trained, while a validation may have others in their place.
        self._trained: str | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        averages = trainer.state.fn == "fit" and any(isinstance(c, WeightAveraging) for c in _callbacks(trainer))
        self._trained = state_fingerprint(pl_module.state_dict()) if averages else None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1 and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if isinstance(exception, SIGTERMException):  # it has been saved
            return
        if alone and trainer.state.fn == "fit" and trainer.global_step > 0 and weights_are_finite(pl_module):
            path = Path(trainer.default_root_dir) / "checkpoints" / "on_exception.ckpt"
            if self._trained not in (None, state_fingerprint(pl_module.state_dict())):
                for callback in _callbacks(trainer):  # what the end of the validation would have done
                    if isinstance(callback, WeightAveraging):
                        callback.on_validation_epoch_end(trainer, pl_module)
            try:
                trainer.save_checkpoint(path, weights_only=False)
            except OSError as error:  # of a full disk, say, which may be why training breaks off
                rank_zero_info(f"nothing more could be saved: {error}")
                return
            rank_zero_info(f"saved {path}; resume with --ckpt_path {path}")


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint after every epoch, validated or not, and ``last.ckpt``, which is that of the latest step.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        # Without a version counter: the file of that name is of this run, since RunFolder has seen to it.
        super().__init__(folder, save_last=True, save_on_train_epoch_end=True, enable_version_counter=False)

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, also in a folder that was moved or copied: its files count under their new place."""
        here, there = str(self.dirpath), str(state_dict.get("dirpath"))

        def moved(path: str) -> str:
            new = os.path.join(here, os.path.relpath(path, there)) if path else ""
            return new if os.path.isfile(new) else ""

        if here != there:
            paths = {key: moved(value) for key, value in state_dict.items() if key.endswith("_path")}
            best = {new: score for old, score in state_dict["best_k_models"].items() if (new := moved(old))}
            state_dict = {**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)
