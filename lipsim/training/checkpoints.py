"""Checkpoints of stages: what is read of them, and what is refused before anything has been computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Parameter

from lipsim.utils.errors import LipsimError
from lipsim.utils.weights import load_weights, read_checkpoint

_Factory = Callable[[list[Parameter]], torch.optim.Optimizer]
# What Lightning restores from a checkpoint besides the weights, and moments that have the shape of their parameter.
_PARTS: dict[str, type] = {
    **{"state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list},
    "pytorch-lightning_version": str,
}
_LOOPS = ("fit_loop", "validate_loop", "test_loop")
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})


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


def find_last(folders: Iterable[Path], fall_back: bool = False) -> Path | None:
    """The checkpoint that training continues from: of the files ``last*.ckpt`` that of the latest step.

    Without any, of all checkpoints: a process may be killed between its first and the ``last`` beside it. Steps are
    read from the files: clocks change, and copies get times of their own.

    Args:
        folders: where to look.
        fall_back: take the latest checkpoint that can be read, of any name, where it is not a ``last``.

    Returns:
        The file; None where there is no checkpoint.

    Raises:
        ValueError: it is damaged; the message says which checkpoint can be read. With ``fall_back``: none can.
    """
    folders = list(folders)
    last = [path for folder in folders for path in sorted(folder.glob("last*.ckpt"))]
    others = [path for folder in folders for path in sorted(folder.glob("*.ckpt")) if path not in last]
    if not last:
        last, others = others, []
    if not last:
        return None
    steps, damaged = _steps([*last, *others] if fall_back else last)
    for error in damaged.values() if fall_back else ():
        rank_zero_warn(f"{error}; looking for another checkpoint")
    if damaged and not (fall_back and steps):
        file, error = next(iter(damaged.items()))
        readable = {**steps, **_steps(others)[0]}
        if not readable:
            raise LipsimError(f"{error}; there is no other checkpoint in {file.parent}: training has to begin anew")
        before = max(readable, key=lambda path: readable[path])
        raise LipsimError(
            f"{error}; the one before it is of step {readable[before]}: --ckpt_path {before}, or --ckpt_path "
            "last-readable for the latest that can be read"
        )
    return max(steps, key=lambda path: steps[path])  # of equals the first, which is called last


def _steps(paths: Iterable[Path]) -> tuple[dict[Path, int], dict[Path, Exception]]:
    """Global step of each checkpoint, and the error of each that is none to continue from."""
    steps: dict[Path, int] = {}
    damaged: dict[Path, Exception] = {}
    for path in paths:
        try:
            steps[path] = int(read_stage(path, resume=True)["global_step"])
        except (LipsimError, OSError) as error:
            damaged[path] = error
    return steps, damaged


def check_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a checkpoint whose optimizer has moments of other parameters than those in training.

    Args:
        path: the checkpoint.
        optimizer: of those in training, which numbers them by its groups.

    Raises:
        ValueError: their number or their shapes differ.
    """
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for saved in read_checkpoint(path).get("optimizer_states", []):
        sizes = [len(group["params"]) for group in saved.get("param_groups", [])]
        if sizes and sum(sizes) != len(shapes):
            raise LipsimError(
                f"{path} cannot be continued: its optimizer has {sum(sizes)} parameters, and {len(shapes)} are "
                "trained, as of another module or other trainable parameters"
            )
        if sizes and sizes != _group_sizes(optimizer):
            continue  # of another optimizer, whose moments nobody takes over
        for number, state in saved.get("state", {}).items():
            for name in _MOMENTS & state.keys():
                if not isinstance(number, int) or number >= len(shapes) or state[name].shape != shapes[number]:
                    raise LipsimError(
                        f"{path} cannot be continued: {name} of parameter {number} has shape "
                        f"{tuple(state[name].shape)}, as of another module or other trainable parameters"
                    )


def fits_moments(saved: Mapping[str, Any], make: _Factory, parameters: Sequence[Parameter]) -> bool:
    """Whether the state of an optimizer is one that another can go on from.

    Args:
        saved: its ``state_dict``.
        make: makes the other.
        parameters: what that trains.
    """
    if [len(group["params"]) for group in saved["param_groups"]] != _group_sizes(make(list(parameters))):
        return False
    found = {name for moments in saved["state"].values() for name in moments}
    return not found or _names_of_moments(make, parameters) <= found


def _group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _names_of_moments(make: _Factory, parameters: Sequence[Parameter]) -> set[str]:
    """What an optimizer keeps of each parameter, as its first step on small ones of these kinds shows."""
    kinds = {tuple(min(size, 2) for size in parameter.shape) for parameter in parameters}
    small = [Parameter(torch.zeros(kind)) for kind in sorted(kinds)]
    for parameter in small:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = make(small)
        optimizer.step()
    except Exception:  # one that steps in another way: torch says what does not fit
        return set()
    return {name for moments in optimizer.state.values() for name in moments}
