"""`python scripts/evaluate.py`: certify and attack any exported metric on any data, on one process or many."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lipsim import export
from lipsim.callbacks import (
    AttackRobustness,
    CertifyRadii,
    KeepBatches,
    NullSpaceRobustness,
    TripletCallback,
    TripletGallery,
)
from lipsim.callbacks.base import remove_files
from lipsim.data import Triplet
from lipsim.data.loading import Finished, Plan, data_fingerprint, plan, remaining
from lipsim.errors import one_line_errors
from lipsim.precision import full_precision
from lipsim.results import read_results, state_fingerprint, update_results, versions
from lipsim.train import StageCLI, commit, quiet_warnings
from lipsim.training.base import Evaluation as Features
from lipsim.training.base import MetricModule, check_votes, evaluation_names
from lipsim.training.schedules import Triangular

_DESCRIPTION = """Certify and attack an exported metric, for example
evaluate.py --config configs/evaluate/builtin.yaml --checkpoint runs/quickstart/quickstart.safetensors
Certifying costs little more than embedding each image once, attacks cost hundreds of times as much: a minute for the
300 triplets of that config on two cores, about 25 processor minutes for the 12,554 of configs/evaluate/material.yaml.
--max_triplets 400 evaluates a sample of each test set instead. The header of each config says what it costs.
A run that was cut short continues where it was when the same command is given again."""


class ExportedMetric(MetricModule):
    """An exported metric behind the hooks that the callbacks of a test work with; it trains nothing.

    Args:
        checkpoint: a ``.safetensors`` file, a ``.ckpt`` of a stage, or the name of a bundled metric.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(export.load(checkpoint), optimizer=_trains_nothing, schedule=Triangular())
        self.checkpoint = checkpoint

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not isinstance(batch, Finished):
            super().on_test_batch_start(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Features | None:
        """Features ``{"features": (z, z0, z1)}`` of a batch; None for one that is finished."""
        if isinstance(batch, Finished):
            return None
        if not isinstance(batch, Triplet):
            raise ValueError(
                f"{self.set_name(dataloader_idx)} serves {type(batch).__name__} and no triplets with votes; "
                "choose a data module of triplets"
            )
        check_votes(batch)
        with full_precision():
            return {"features": batch.embed(self.metric.embed)}


class RemainingData(L.LightningDataModule):
    """The test sets of a data module, shared among processes without the batches that an interrupted run has finished.

    Args:
        data: the data module.
        keep: knows what is finished.
        max_triplets: of each set, drawn with ``sample_seed``; None: all.
        sample_seed: of the draw.

    Attributes:
        test_names: names of the test sets, in the order of their loaders.
        triplets: by set, how many are evaluated, and how many there are.
    """

    def __init__(
        self, data: L.LightningDataModule, keep: KeepBatches, max_triplets: int | None = None, sample_seed: int = 0
    ) -> None:
        super().__init__()
        self.data, self.keep = data, keep
        self.max_triplets, self.sample_seed = max_triplets, sample_seed
        self.test_names: list[str] = []
        self.triplets: dict[str, dict[str, int]] = {}

    @property
    def test_groups(self) -> dict[str, dict[str, Tensor]]:
        """By set, the parts that are scored apart as well."""
        return getattr(self.data, "test_groups", None) or {}

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One process's share of each test set, :class:`lipsim.data.loading.Finished` for what is finished.

        Raises:
            ValueError: loaders that do not say which triplets they serve, sets of one name, or nothing to evaluate.
        """
        trainer, found = self.trainer, self.data.test_dataloader()
        assert trainer is not None
        self.test_names = evaluation_names(self.data, "test", found)
        loaders = dict(zip(self.test_names, tree_flatten(found)[0], strict=True))
        plans = {name: self._plan(name, loader) for name, loader in loaders.items()}
        if not any(planned.batches for planned in plans.values()):
            raise ValueError(
                f"{type(self.data).__name__} has no test triplets; choose data with a test set, and leave drop_last "
                "out where a set is smaller than a batch"
            )
        trainer.limit_test_batches = 1.0  # the plans have it
        self.triplets = {
            name: {"evaluated": len(planned.positions), "in_set": planned.num_samples}
            for name, planned in plans.items()
        }
        for name, count in self.triplets.items():
            if count["evaluated"] < count["in_set"]:
                rank_zero_info(f"evaluating {count['evaluated']} of {count['in_set']} triplets of {name}")
        fingerprints = {name: planned.fingerprint(data_fingerprint(loaders[name])) for name, planned in plans.items()}
        own = trainer.strategy.broadcast(fingerprints) == fingerprints
        if not trainer.strategy.reduce_boolean_decision(own, all=True):
            raise ValueError("the processes see other triplets each; seed what chooses them in the data module")
        self._check_resize()
        finished = self.keep.open(trainer, fingerprints)
        trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if trainer.is_global_zero and not self.keep.continues and not trial:
            remove_other_results(Path(trainer.default_root_dir), self.keep.settings["checkpoint_sha256"], fingerprints)
        return [
            remaining(loader, finished.get(name, set()), plans[name], trainer.global_rank, trainer.world_size)
            for name, loader in loaders.items()
        ]

    def _plan(self, name: str, loader: DataLoader[Any]) -> Plan:
        planned = plan(loader, name)
        if self.max_triplets is not None:
            planned = planned.sample(self.max_triplets, self.sample_seed)
        assert self.trainer is not None
        return planned.limit(self.trainer.limit_test_batches)

    def _check_resize(self) -> None:
        """Refuse images that were resized in another way than the metric expects.

        Raises:
            ValueError: they are.
        """
        given = getattr(getattr(self.data, "preprocess", None), "resize", None)
        assert self.trainer is not None and isinstance(self.trainer.lightning_module, MetricModule)
        expected = self.trainer.lightning_module.metric.preprocess.resize
        if given not in (None, expected):
            raise ValueError(f"the metric expects images resized by {expected!r}; pass --data.resize={expected}")


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
            "checkpoint_sha256": file_sha256(export.resolve(self.model.checkpoint)),
            "others_sha256": {str(path): file_sha256(export.resolve(path)) for path in others},
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
        raise ValueError("nothing to evaluate: limit_test_batches is 0; leave it out, or give --max_triplets")
    if not callbacks:
        raise ValueError("nothing to evaluate: name lipsim.callbacks.CertifyRadii, AttackRobustness, … as callbacks")
    data = RemainingData(cli.datamodule, cli.keep, cli.config.max_triplets, cli.config.sample_seed)
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


def remove_other_results(directory: Path, checkpoint_sha256: str, data: Mapping[str, str]) -> None:
    """Remove what an evaluation of another checkpoint or other data has left in a run directory.

    Its tables and pictures would stand beside the new ones as if they belonged to them.
    """
    path = directory / "results.json"
    if path.is_file():
        results = read_results(path)
        sections = [section for section in results.values() if isinstance(section, dict)]
        checkpoints = {section.get("checkpoint_sha256", checkpoint_sha256) for section in sections}
        sets = [section["data_sha256"] for section in sections if "data_sha256" in section]
        if checkpoints == {checkpoint_sha256} and all(found.get(name) == data[name] for found in sets for name in data):
            return
        rank_zero_info(f"removing the results of another evaluation from {directory}")
    # Without results.json nothing says what the files are of.
    kinds = (CertifyRadii, AttackRobustness, NullSpaceRobustness, TripletGallery)
    remove_files(directory, ["results.json", *(pattern for kind in kinds for pattern in kind.files)])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _trains_nothing(_: Any) -> NoReturn:
    raise RuntimeError("an exported metric is evaluated and not trained")
