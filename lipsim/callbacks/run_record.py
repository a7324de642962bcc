"""What a run directory says about the run, so that it can be understood alone."""

from __future__ import annotations

import enum
import functools
import inspect
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback

from lipsim.callbacks.loggers import log_config
from lipsim.evaluation.module import EvaluationModule
from lipsim.metric import PerceptualMetric
from lipsim.results import commit, versions
from lipsim.results.run_page import STATUS
from lipsim.results.schema import Environment
from lipsim.utils.files import write_json, write_text
from lipsim.utils.slurm import slurm_job

_HEADER = "# The arguments of lipsim.{0}, as far as the objects tell; the command line writes config.yaml instead.\n"


class RunRecord(Callback):
    """Writes ``arguments.yaml`` and ``environment.json`` when a run begins, unless it is a trial.

    An evaluation in the folder of a training leaves that one's, and writes ``arguments-evaluate.yaml`` and
    ``environment-evaluate.json``.

    Args:
        function: that was called, "train" or "evaluate".
        arguments: of the call, by name; objects are described as :func:`describe` does.
    """

    def __init__(self, function: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            directory = Path(trainer.default_root_dir)
            arguments = describe(self.arguments)
            text = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
            beside = "-evaluate" if self.function == "evaluate" and has_trained(directory) else ""
            write_text(directory / f"arguments{beside}.yaml", _HEADER.format(self.function) + text)
            write_environment(trainer, directory / f"environment{beside}.json")
            log_config(trainer, arguments)


def has_trained(folder: Path) -> bool:
    """Whether a folder is a training's, whose record an evaluation in it leaves as it is."""
    return (folder / STATUS).is_file() or (folder / "checkpoints").is_dir()


def write_environment(trainer: L.Trainer, file: Path) -> None:
    """Write what a run is computed by: command, versions, commit, hardware, processes and precision."""
    content: Environment = {
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "accelerator": type(trainer.accelerator).__name__,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "job": slurm_job(),
    }
    write_json(file, content)


def describe(value: Any) -> Any:
    """A value as plain YAML: of an object its class, and the arguments that it keeps under their names.

    Encoders say by their ``config`` what they were made with, stages which metric they have, and data modules what else
    they keep in plain attributes.
    """
    if isinstance(value, enum.Enum):  # an int or a str may be one
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        return {"class_path": _name(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return _name(value)
    if isinstance(value, (os.PathLike, torch.device, torch.dtype)):
        return str(value)
    described: dict[str, Any] = {"class_path": _name(type(value)), "init_args": _arguments(value)}
    if isinstance(value, EvaluationModule):
        described["metric"] = describe(value.metric)
    elif isinstance(value, L.LightningDataModule):
        usual = {*vars(L.LightningDataModule()), *described["init_args"]}
        described["attributes"] = {
            name: describe(item)
            for name, item in vars(value).items()
            if name not in usual and not name.startswith("_") and _is_plain(item)
        }
    return described


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, PerceptualMetric):  # its other arguments are computed where they are asked for
        own = {name: describe(getattr(value, name)) for name in ("encoder", "image_size", "anchor")}
        return {**own, "resize": value.preprocess.resize, "framing": value.preprocess.framing}
    if isinstance(config := getattr(value, "config", None), Mapping):
        return {key: describe(item) for key, item in config.items()}
    if type(value).__init__ is object.__init__:
        return {}
    parameters = inspect.signature(type(value).__init__).parameters
    return {name: describe(getattr(value, name)) for name in parameters if name != "self" and hasattr(value, name)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, os.PathLike))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
