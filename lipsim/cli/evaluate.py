"""`python scripts/evaluate.py`: certify and attack any exported metric on any data, on one process or many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lipsim.callbacks.run_evaluation import run_evaluation
from lipsim.callbacks.run_options import quiet_warnings
from lipsim.callbacks.run_record import has_trained
from lipsim.cli.parser import one_line_errors
from lipsim.cli.stage import ConfigRecord, StageCLI
from lipsim.evaluation.exported import ExportedMetric
from lipsim.utils.allocator import keep_freed_memory

_DESCRIPTION = """Certify and attack an exported metric, for example
{prog} --config configs/evaluate/builtin.yaml --checkpoint runs/quickstart/quickstart.safetensors
Certifying costs little more than embedding each image once, attacks cost hundreds of times as much: a minute for the
300 triplets of that config on two cores, a quarter of an hour or more for 12,554 in configs/evaluate/material.yaml.
--max_triplets 400 evaluates a sample of each test set instead. The header of each config says what it costs.
A run that was cut short continues where it was when the same command is given again.
A config names classes of lipsim, torch, lightning and torchmetrics; --allow MODULE, anywhere, adds your own."""


class EvaluationRecord(ConfigRecord):
    """The record of an evaluation, under names of its own where the folder has that of a training."""

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has_trained(Path(trainer.default_root_dir)):
            self.config_filename = "config-evaluate.yaml"
        super().setup(trainer, pl_module, stage)


class EvaluationCLI(StageCLI):
    """Options ``--checkpoint``, ``--trainer…`` with the callbacks, and ``--data…``."""

    def __init__(self, args: Sequence[str], prog: str = "evaluate.py") -> None:
        super().__init__(
            args,
            model_class=ExportedMetric,
            subclass_mode_model=False,
            run=False,
            trainer_defaults={"default_root_dir": "runs/evaluate", "enable_checkpointing": False},
            save_config_callback=EvaluationRecord,
            parser_kwargs={"prog": prog, "description": _DESCRIPTION.format(prog=prog)},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--checkpoint", type=str, required=True, help=".safetensors or .ckpt file, or a bundled name"
        )
        parser.add_argument(
            "--max_triplets",
            type=PositiveInt | None,
            default=None,
            help="evaluate at most so many triplets of each test set, drawn at random; the results say how many",
        )
        parser.add_argument("--sample_seed", type=int, default=0, help="seed of that draw; a larger one has a smaller")
        parser.link_arguments("checkpoint", "model.checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose loaders are shared among processes by the evaluation, not by Lightning's sampler."""
        return super().instantiate_trainer(**{**kwargs, "use_distributed_sampler": False})


def evaluate(args: Sequence[str], prog: str = "evaluate.py") -> EvaluationCLI:
    """Run an evaluation: ``evaluate(["--config", "configs/evaluate/builtin.yaml", "--checkpoint", "quickstart"])``.

    Writes results.json, the CSV files and plots into ``trainer.default_root_dir``. :func:`lipsim.evaluate` does it with
    objects in place of options.

    Args:
        args: options.
        prog: what the help calls the program.

    Raises:
        FileNotFoundError: no such checkpoint or data.
        ValueError: a checkpoint without a bound, bad budgets, images or votes, or an unfinished evaluation of
            something else in the same folder.
    """
    with quiet_warnings():
        cli = EvaluationCLI(args, prog)
        given = cli.config
        run_evaluation(
            cli.trainer, cli.model, cli.datamodule, max_triplets=given.max_triplets, sample_seed=given.sample_seed
        )
    return cli


def main(args: Sequence[str] | None = None, prog: str = "evaluate.py") -> None:
    """Entry point of scripts/evaluate.py and of `lipsim evaluate`."""
    keep_freed_memory()
    with one_line_errors():
        cli = evaluate(sys.argv[1:] if args is None else args, prog)
        if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = cli.trainer.default_root_dir
            print(f"results.json, tables and plots are in {folder}; lipsim report {folder} shows them, attacks too")
