"""One stage through LightningCLI, with this project's defaults."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console

from lipsim.callbacks import CertifyRadii, ProgressLines, RunCheckpoint, RunFolder
from lipsim.callbacks.run_folder import CHECKPOINT_NAMES
from lipsim.evaluation.module import weights_are_finite
from lipsim.results import commit, versions
from lipsim.results.tables import certified_rows, print_table
from lipsim.training.base import MetricModule
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.slurm import check_slurm
from lipsim.utils.terminal import one_line
from lipsim.utils.weights import load_weights, read_checkpoint

_DESCRIPTION = """Without arguments: the quickstart. With a config: one stage, for example
train.py --config configs/quickstart/distill.yaml --trainer.max_epochs 3
(fit is understood). Every option of the config can be given on the command line; --print_config shows them all."""
SUBCOMMANDS = ("fit", "validate", "test")
# What Lightning restores from a checkpoint besides the weights, and moments that have the shape of their parameter.
_PARTS: dict[str, type] = {
    **{"state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list},
    "pytorch-lightning_version": str,
}
_LOOPS = ("fit_loop", "validate_loop", "test_loop")
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})


class RunRecord(SaveConfigCallback):
    """Saves the resolved config and the environment, so that a run directory can be understood alone."""

    def save_config(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not trainer.log_dir, which is a broadcast that the other processes would not take part in.
        directory = Path((trainer.logger and trainer.logger.log_dir) or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / self.config_filename.replace("config", "environment").replace(".yaml", ".json")
        file.write_text(json.dumps(_environment(trainer), indent=2) + "\n", encoding="utf-8")


class SaveOnException(Callback):
    """Saves ``checkpoints/on_exception.ckpt`` when training breaks off, so that nothing is lost.

    Unless weights are not finite: the periodic checkpoints have the last that were. With several processes only some of
    them may have failed, and saving would wait for the others: there the periodic checkpoints have to do.
    """

    def on_exception(self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1 and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if alone and trainer.state.fn == "fit" and trainer.global_step > 0 and weights_are_finite(pl_module):
            path = Path(trainer.default_root_dir) / "checkpoints" / "on_exception.ckpt"
            trainer.save_checkpoint(path)
            rank_zero_info(f"saved {path}; resume with --ckpt_path {path}")


class StageParser(LightningArgumentParser):
    """A parser that fails in one line, without the usage of some hundred options above it."""

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config, which jsonargparse reads in the encoding of the locale.

        Raises:
            ValueError: the config has signs that this encoding lacks; the message says what to do.
        """
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        except UnicodeDecodeError as error:
            raise LipsimError(
                f"cannot read the config {os.fspath(path)} as {error.encoding} ({error.reason}); save it as UTF-8 and "
                "set PYTHONUTF8=1, or leave signs beyond ASCII out of it"
            ) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if os.environ.get("LIPSIM_TRACEBACK") and ex is not None:
            raise ex
        print(f"error: {one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2) from ex


class StageCLI(LightningCLI):
    """LightningCLI with this project's defaults: what a run writes goes into ``trainer.default_root_dir``."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        defaults: dict[str, Any] = {
            "model_class": MetricModule,
            "datamodule_class": L.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_callback": RunRecord,
            # Overwrite: a second run into the same directory would otherwise stop before it starts.
            "save_config_kwargs": {"overwrite": True},
            # Hyper-parameters saved in a checkpoint must not override the command line on resume.
            "load_from_checkpoint_support": False,
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "trainer_defaults": {"default_root_dir": "runs/default", "log_every_n_steps": 10},
            "parser_class": StageParser,
            "parser_kwargs": {"prog": "train.py", "description": _DESCRIPTION},
        }
        super().__init__(args=list(args), **{**defaults, **options})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given; sys.argv stays as it is, since DDP starts its other processes with it.

        Raises:
            ValueError: a checkpoint to continue from that is none. Lightning reads it next.
        """
        self.config = _with_home(parser.parse_args(args))  # type: ignore[arg-type]
        if self.config.get("subcommand"):
            subcommand = self.config.subcommand
            path = self.config[subcommand].get("ckpt_path")
            if path is not None and path not in CHECKPOINT_NAMES:
                read_stage(Path(path), resume=subcommand == "fit")
            if subcommand != "fit":
                # Beside the configuration of the training, whose folder it may be.
                self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": f"config-{subcommand}.yaml"}

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands of LightningCLI that the stages have."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in SUBCOMMANDS}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with a CSV log, a progress bar and checkpoints, also on failure, unless the config has its own."""
        check_slurm()
        config = self._get(self.config_init, "trainer", default={})
        trial = bool(config.get("fast_dev_run"))
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else ProgressLines())
        if trial:  # Lightning 2.6 would write a last.ckpt of its one batch
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
            kwargs["enable_checkpointing"] = False
        elif config.get("enable_checkpointing") is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(RunCheckpoint(Path(config["default_root_dir"]) / "checkpoints"))
        # First: it makes room for what the others write.
        kwargs["callbacks"] = [RunFolder(self._get(self.config_init, "ckpt_path")), *callbacks, SaveOnException()]
        # Advertisements among the messages of a run.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip:" not in r.getMessage())
        if not trial and (config.get("logger") is None or config.get("logger") is True):
            _keep_log(Path(config["default_root_dir"]))
            kwargs["logger"] = CSVLogger(config["default_root_dir"], name="", version="")
        if config.get("accelerator") == "auto" and not torch.cuda.is_available():
            kwargs["accelerator"] = "cpu"  # scores are computed in float64, which Apple's GPUs lack
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        self.print_certified()

    def after_validate(self) -> None:
        self.print_certified()

    def after_test(self) -> None:
        self.print_certified()

    def print_certified(self) -> None:
        """The last certification of each set as a table in the terminal."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, CertifyRadii) or not callback.results or not self.trainer.is_global_zero:
                continue
            if rows := certified_rows(callback.results):  # none where no set has triplets
                print_table(Console(), rows, "Majority score in %, natural and certified at ℓ2 budgets ε")

    def run_test(self) -> None:
        """Test the model as it is after another subcommand, with the same trainer and data."""
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)

    def before_fit(self) -> None:
        self._check_checkpoint()
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and path not in CHECKPOINT_NAMES:
            check_moments(Path(path), self.model)

    def before_validate(self) -> None:
        self._check_checkpoint()

    def before_test(self) -> None:
        self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        # Lightning's default would unpickle whatever a checkpoint holds.
        self.config_init[self.config_init.subcommand].weights_only = True
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and path not in CHECKPOINT_NAMES:
            check_checkpoint(Path(path), self.model)


def check_checkpoint(path: Path, module: torch.nn.Module) -> None:
    """Refuse a checkpoint that does not fit, before anything has been computed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no checkpoint, or of another architecture.
    """
    load_weights(module, read_stage(path)["state_dict"], str(path))


def read_stage(path: Path, resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint of a stage, without running code of the file.

    Args:
        path: of the file.
        resume: whether to insist on what continuing the training needs besides the weights.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no checkpoint of a stage, or has weights alone.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    checkpoint = read_checkpoint(path)
    needed = ("state_dict", "pytorch-lightning_version", "epoch", "global_step")
    if missing := [key for key in needed if key not in checkpoint]:
        raise LipsimError(f"{path} is no checkpoint of a stage, it has no {missing[0]}; train.py writes such files")
    if resume and not all(key in checkpoint for key in ("optimizer_states", "lr_schedulers", "loops")):
        raise LipsimError(
            f"{path} has weights alone, and training cannot be continued from it; take another, or last.ckpt"
        )
    for key, kind in _PARTS.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise LipsimError(f"{path} is damaged, its {key} is a {type(checkpoint[key]).__name__}; take another")
    loops = checkpoint.get("loops")
    if loops is not None and (missing := [name for name in _LOOPS if name not in loops]):
        raise LipsimError(f"{path} is damaged, it does not say where its {missing[0]} was; take another")
    return checkpoint


def check_moments(path: Path, module: torch.nn.Module) -> None:
    """Refuse a checkpoint whose optimizer has moments of other parameters than those in training.

    Raises:
        ValueError: their shapes differ.
    """
    shapes = [parameter.shape for parameter in module.parameters() if parameter.requires_grad]
    for optimizer in read_checkpoint(path).get("optimizer_states", []):
        for number, state in optimizer.get("state", {}).items():
            for name in _MOMENTS & state.keys():
                if not isinstance(number, int) or number >= len(shapes) or state[name].shape != shapes[number]:
                    raise LipsimError(
                        f"{path} cannot be continued: {name} of parameter {number} has shape "
                        f"{tuple(state[name].shape)}, as of another module or other trainable parameters"
                    )


def _with_home(value: Any) -> Any:
    """A configuration with ``~`` in its paths replaced by the home folder, which no shell does in ``--option=~/x``."""
    if isinstance(value, Namespace):
        for key, item in list(vars(value).items()):
            setattr(value, key, _with_home(item))
        return value
    if isinstance(value, dict):
        return {key: _with_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    if isinstance(value, (str, Path)) and (str(value) == "~" or str(value).startswith("~/")):
        return type(value)(user_path(value))
    return value


def train(args: Sequence[str]) -> StageCLI:
    """Run one stage: ``train(["--config", "configs/quickstart/distill.yaml", "--trainer.max_epochs", "3"])``.

    ``fit`` is understood where no subcommand is given.
    """
    quiet_warnings()
    args = list(args)
    if not args or args[0] not in (*SUBCOMMANDS, "-h", "--help"):
        args.insert(0, "fit")
    return StageCLI(args)


def quiet_warnings() -> None:
    """Silence what is said too often, or is not so.

    Lightning 2.6 calls what torch 2.14 deprecates; and it warns that the log of an earlier run will be deleted, which
    has been moved by then.
    """
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")


@rank_zero_only
def _keep_log(directory: Path) -> None:
    """Move the metrics.csv of an earlier run aside, which a CSVLogger would delete."""
    log = directory / "metrics.csv"
    if log.is_file():
        number = 1
        while (directory / f"metrics-{number}.csv").exists():
            number += 1
        log.rename(directory / f"metrics-{number}.csv")


def _environment(trainer: Trainer) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "accelerator": type(trainer.accelerator).__name__,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }
