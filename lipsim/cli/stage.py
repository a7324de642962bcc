"""One stage through LightningCLI, with this project's defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from lipsim.callbacks.faults import clear_faults
from lipsim.callbacks.loggers import NAMES, Loggers, log_config
from lipsim.callbacks.run_folder import CHECKPOINT_NAMES
from lipsim.callbacks.run_options import print_certified, quiet_warnings, with_defaults
from lipsim.callbacks.run_record import write_environment
from lipsim.cli.named_classes import (
    NamedClassError,
    check_named,
    denied_by_parser,
    only_named,
    refusal,
    take_allowed,
    why_refused,
)
from lipsim.training.base import Stage
from lipsim.training.checkpoints import check_checkpoint, read_stage
from lipsim.training.run import fit
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import find_config, user_path
from lipsim.utils.terminal import one_line

_DESCRIPTION = """Without arguments: the quickstart. With a config: one stage, for example
{prog} --config configs/quickstart/distill.yaml --trainer.max_epochs 3
(fit is understood). Every option of the config can be given on the command line; --print_config shows them all.
A config names classes of lipsim, torch, lightning and torchmetrics; --allow MODULE, anywhere, adds your own."""
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
SUBCOMMANDS = ("fit", "validate", "test")


class ConfigRecord(SaveConfigCallback):
    """Saves the resolved config and the environment, so that a run directory can be understood alone."""

    def save_config(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not trainer.log_dir, which is a broadcast that the other processes would not take part in.
        directory = Path((trainer.logger and trainer.logger.log_dir) or trainer.default_root_dir)
        name = self.config_filename.replace("config", "environment").replace(".yaml", ".json")
        write_environment(trainer, directory / name)
        log_config(trainer, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))


class StageParser(LightningArgumentParser):
    """A parser that fails in one line, without the usage of some hundred options above it."""

    # The configs that are being read, the innermost last; of every parser, as each subcommand has one of its own.
    reading: ClassVar[list[str]] = []

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config, which jsonargparse reads in the encoding of the locale.

        Raises:
            ValueError: the config has signs that this encoding lacks, or values without end.
        """
        self.reading.append(os.fspath(path))
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        except UnicodeDecodeError as error:
            raise LipsimError(
                f"cannot read the config {os.fspath(path)} as {error.encoding} ({error.reason}); save it as UTF-8 and "
                "set PYTHONUTF8=1, or leave signs beyond ASCII out of it"
            ) from error
        except LipsimError as error:
            raise LipsimError(f"cannot read the config {os.fspath(path)}: {error}") from error
        finally:
            self.reading.pop()

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a class; loggers may be given by name, limits of the trainer as whole numbers.

        In Lightning's annotation ``Optional[Union[int, float]]`` either may come first: typing hands out what another
        module made of ``Optional[Union[float, int]]``, as long as it remembers it. Read as a float, a limit of 1 batch
        means all of them.
        """
        if nested_key != "trainer":
            return list(super().add_class_arguments(theclass, nested_key, *args, **kwargs))
        kwargs["skip"] = {*(kwargs.get("skip") or ()), *_LIMITS, "logger"}
        added = list(super().add_class_arguments(theclass, nested_key, *args, **kwargs))
        purpose = "a whole number of batches, or a share of them, 1.0 for all"
        for limit in _LIMITS:
            self.add_argument(f"--trainer.{limit}", type=int | float | None, help=purpose)
        purpose = f"beside the CSV log: {', '.join(NAMES)}, another logger, or a list of them; false: none at all"
        self.add_argument("--trainer.logger", type=Loggers, help=purpose)
        return [*added, *_LIMITS, "logger"]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 1, as every command does that answers no question."""
        if os.environ.get("LIPSIM_TRACEBACK") and ex is not None:
            raise ex
        if denied := denied_by_parser(message):
            key, file = one_line(message).partition(":")[0], self.reading[-1] if self.reading else None
            text = refusal(denied, why_refused(denied) or "it runs code", key, file)
        else:
            text = one_line(message) if isinstance(ex, NamedClassError) else f"{one_line(message)} (see --help)"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from ex


class StageCLI(LightningCLI):
    """LightningCLI with this project's defaults: what a run writes goes into ``trainer.default_root_dir``."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        defaults: dict[str, Any] = {
            "model_class": Stage,
            "datamodule_class": L.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_callback": ConfigRecord,
            # Overwrite: a second run into the same directory would otherwise stop before it starts.
            "save_config_kwargs": {"overwrite": True},
            # Hyper-parameters saved in a checkpoint must not override the command line on resume.
            "load_from_checkpoint_support": False,
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "trainer_defaults": {"default_root_dir": "runs/default", "log_every_n_steps": 10},
            "parser_class": StageParser,
        }
        args, self._allowed = take_allowed(args)
        with only_named(self._allowed):
            super().__init__(args=_with_configs(args), **{**defaults, **options})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given; sys.argv stays as it is, since DDP starts its other processes with it.

        Raises:
            ValueError: a class that may not be named, or a checkpoint to continue from that is none. Lightning makes
                the one and reads the other next.
        """
        self.config = _with_home(parser.parse_args(args))  # type: ignore[arg-type]
        given = self.config.get(self.config.get("subcommand") or "", self.config)
        try:
            check_named(given, self._allowed, [os.fspath(file) for file in given.get("config") or [] if file])
        except NamedClassError as error:
            parser.error(str(error), error)
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
        """A trainer with what every run has; see :func:`lipsim.callbacks.run_options.with_defaults`."""
        given = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return super().instantiate_trainer(**with_defaults(given, self._get(self.config_init, "ckpt_path")))

    def fit(self, model: Stage, datamodule: Any = None, ckpt_path: str | None = None, **_: Any) -> None:
        """What the subcommand does."""
        fit(self.trainer, model, datamodule, ckpt_path)

    def validate(
        self, model: Stage, datamodule: Any = None, ckpt_path: str | None = None, verbose: bool = True, **_: Any
    ) -> None:
        """What the subcommand does."""
        self._evaluate(self.trainer.validate, model, datamodule, ckpt_path, verbose)

    def test(
        self, model: Stage, datamodule: Any = None, ckpt_path: str | None = None, verbose: bool = True, **_: Any
    ) -> None:
        """What the subcommand does."""
        self._evaluate(self.trainer.test, model, datamodule, ckpt_path, verbose)

    def _evaluate(
        self, run: Callable[..., Any], model: Stage, data: Any, checkpoint: str | None, verbose: bool
    ) -> None:
        if checkpoint is not None and checkpoint not in CHECKPOINT_NAMES:
            check_checkpoint(Path(checkpoint), model)
        with clear_faults(self.trainer, evaluation=True):
            # Lightning's default would unpickle whatever a checkpoint holds.
            run(model, datamodule=data, ckpt_path=checkpoint, verbose=verbose, weights_only=True)
            print_certified(self.trainer)

    def run_test(self) -> None:
        """Test the model as it is after another subcommand, with the same trainer and data."""
        with quiet_warnings(), clear_faults(self.trainer, evaluation=True):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def train(args: Sequence[str], prog: str = "train.py") -> StageCLI:
    """Run one stage: ``train(["--config", "configs/quickstart/distill.yaml", "--trainer.max_epochs", "3"])``.

    ``fit`` is understood where no subcommand is given. :func:`lipsim.train` does it with objects in place of options.

    Args:
        args: subcommand and options.
        prog: what the help calls the program.
    """
    args, allowed = take_allowed(args)
    if not args or args[0] not in (*SUBCOMMANDS, "-h", "--help"):
        args.insert(0, "fit")
    args += [f"--allow={module}" for module in allowed]
    with quiet_warnings():
        return StageCLI(args, parser_kwargs={"prog": prog, "description": _DESCRIPTION.format(prog=prog)})


def _with_configs(args: Sequence[str]) -> list[str]:
    """The arguments with the files of packaged configs in place of their names.

    Raises:
        FileNotFoundError: a config is neither a file nor the name of a packaged one.
    """
    found = list(args)
    for number, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config"):
            number, before = (number, f"{option}=") if equals else (number + 1, "")
            value = value if equals else "".join(args[number : number + 1])
            if value and not {"{", "\n"} & set(value):  # a config may be given as text as well
                found[number] = f"{before}{find_config(value)}"
    return found


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
