"""`python scripts/evaluate.py`: certify and attack any exported metric on any data, on one process or many."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lipsim.callbacks import AttackRobustness, CertifyRadii, NullSpaceRobustness, TripletCallback, TripletGallery
from lipsim.cli.parser import one_line_errors
from lipsim.cli.stage import StageCLI, quiet_warnings
from lipsim.evaluation.exported import ExportedMetric
from lipsim.evaluation.journal import KeepBatches
from lipsim.evaluation.resume import RemainingData
from lipsim.metric.files import resolve
from lipsim.results import commit, read_results, update_results, versions
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_sha256, state_fingerprint

_DESCRIPTION = """Certify and attack an exported metric, for example
evaluate.py --config configs/evaluate/builtin.yaml --checkpoint runs/quickstart/quickstart.safetensors
Certifying costs little more than embedding each image once, attacks cost hundreds of times as much: a minute for the
300 triplets of that config on two cores, a quarter of an hour or more for 12,554 in configs/evaluate/material.yaml.
--max_triplets 400 evaluates a sample of each test set instead. The header of each config says what it costs.
A run that was cut short continues where it was when the same command is given again."""


class EvaluationCLI(StageCLI):
    """Options ``--checkpoint``, ``--trainer…`` with the callbacks, and ``--data…``."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            args,
            model_class=ExportedMetric,
            subclass_mode_model=False,
            run=False,
            trainer_defaults={"default_root_dir": "runs/evaluate", "enable_checkpointing": False},
            parser_kwargs={"prog": "evaluate.py", "description": _DESCRIPTION},
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
        """A trainer whose last callback keeps what is finished."""
        # The loaders have been shared among processes when Lightning sees them; its sampler would repeat triplets.
        trainer = super().instantiate_trainer(**{**kwargs, "use_distributed_sampler": False})
        directory = Path(trainer.default_root_dir)
        if (directory / "results.json").is_file():
            read_results(directory / "results.json")  # fail now rather than when everything is computed
        self.keep = KeepBatches(directory / "unfinished", self._settings(trainer))
        trainer.callbacks.append(self.keep)  # type: ignore[attr-defined]
        return trainer

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        """What rows depend on besides the data."""
        given = self._get(self.config, "trainer", default={}).get("callbacks") or []
        settings = [_plain(c) for c in (given if isinstance(given, list) else [given])]
        others = [path for c in settings for path in (c["init_args"].get("others") or {}).values()]
        return {
            "checkpoint_sha256": file_sha256(resolve(self.model.checkpoint)),
            "others_sha256": {str(path): file_sha256(resolve(path)) for path in others},
            "callbacks": settings,
            "accelerator": type(trainer.accelerator).__name__,
            "precision": str(trainer.precision),
            "versions": versions(),
            "commit": commit(),
            "limit_test_batches": trainer.limit_test_batches,
            "max_triplets": self.config.max_triplets,
            "sample_seed": self.config.sample_seed,
            "rows": "by position",  # what an earlier version kept by index is not continued
        }


def evaluate(args: Sequence[str]) -> EvaluationCLI:
    """Run an evaluation: ``evaluate(["--config", "configs/evaluate/builtin.yaml", "--checkpoint", "quickstart"])``.

    Writes results.json, the CSV files and plots into ``trainer.default_root_dir``.

    Raises:
        FileNotFoundError: no such checkpoint or data.
        ValueError: a checkpoint without a bound, bad budgets, images or votes, or an unfinished evaluation of
            something else in the same folder.
    """
    quiet_warnings()
    cli = EvaluationCLI(args)
    callbacks = [c for c in cli.trainer.callbacks if isinstance(c, TripletCallback)]  # type: ignore[attr-defined]
    if cli.trainer.limit_test_batches == 0:
        raise LipsimError("nothing to evaluate: limit_test_batches is 0; leave it out, or give --max_triplets")
    if not callbacks:
        raise LipsimError("nothing to evaluate: name lipsim.callbacks.CertifyRadii, AttackRobustness, … as callbacks")
    kinds = (CertifyRadii, AttackRobustness, NullSpaceRobustness, TripletGallery)
    files = [pattern for kind in kinds for pattern in kind.files]
    data = RemainingData(cli.datamodule, cli.keep, files, cli.config.max_triplets, cli.config.sample_seed)
    cli.trainer.test(cli.model, datamodule=data, verbose=False)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        path = Path(cli.trainer.default_root_dir) / "results.json"
        if path.is_file():
            sha256 = cli.keep.settings["checkpoint_sha256"]
            metric = cli.model.metric
            content = {
                "weights_sha256": state_fingerprint(metric.encoder.state_dict()),
                "checkpoint": cli.model.checkpoint,
                "checkpoint_sha256": sha256,
                "image_size": metric.image_size,
                "resize": metric.preprocess.resize,
                "triplets": data.triplets,
                "sample_seed": cli.config.sample_seed,
            }
            update_results(path, "evaluation", content)
        cli.print_certified()
    return cli


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of scripts/evaluate.py."""
    with one_line_errors():
        evaluate(sys.argv[1:] if args is None else args)


def _plain(callback: Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """A callback's configuration as JSON, without the place that it writes to."""
    content = callback.as_dict() if isinstance(callback, Namespace) else dict(callback)
    options = content.get("init_args") or {}
    options = {key: _json(value) for key, value in options.items() if key != "directory"}
    return {"class_path": content["class_path"], "init_args": options}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
