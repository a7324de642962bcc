"""Weights from files that may be a stranger's: tensors and plain containers only, and every tensor accounted for."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lipsim.utils.errors import LipsimError

# Modules that torch puts around others, with names reserved for them: torch.compile, FSDP, activation checkpointing.
_TRANSPARENT = re.compile(r"(^|\.)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# What training code calls the model that it holds. Any model may have parts of such names: they go where all names
# begin with one.
_HOLDERS = ("module.", "model.")
_OTHER = "they belong to another architecture or configuration"


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str, remedy: str = _OTHER) -> None:
    """Load a state strictly.

    Args:
        module: what the state belongs to.
        state: its tensors.
        source: the file, for the message.
        remedy: what the message says in the end.

    Raises:
        ValueError: missing, unexpected, misshapen, sparse, quantised or complex tensors, or things that are none, in
            one line that names the first of each.
    """
    check_fit(module, state, source, remedy)
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: str, remedy: str = _OTHER) -> None:
    """Refuse a state whose names or shapes are others than those of a module, which may be on the meta device.

    Arguments and errors as of :func:`load_weights`.
    """
    own = module.state_dict()
    strange = sorted(k for k, tensor in state.items() if not _is_plain(tensor))
    misshapen = sorted(k for k in own.keys() & state.keys() if k not in strange and own[k].shape != state[k].shape)
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "no dense tensors of real numbers": strange,
        "of another shape": [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in misshapen],
    }
    found = [f"{len(names)} {fault} (first: {names[0]})" for fault, names in faults.items() if names]
    if found:
        raise LipsimError(f"the weights in {source} do not fit {type(module).__name__}: {'; '.join(found)}; {remedy}")


def _is_plain(value: object) -> bool:
    """Whether something is a tensor with a number in memory for each of its entries, which a weight can take over."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return value.layout == torch.strided and not value.is_complex()


def plain_names(state: Mapping[str, Any], source: Path, expected: Set[str] = frozenset()) -> dict[str, Any]:
    """A state without what wrappers put into its names: ``module._orig_mod.blocks.0`` becomes ``blocks.0``.

    Args:
        state: tensors by name.
        source: where it is from, for messages.
        expected: the names of the network that it is for, where that is known: its only child may be called ``model``.

    Raises:
        ValueError: two tensors would get the same name, so that one were lost.
    """
    state = {str(key): value for key, value in state.items()}
    if expected and state.keys() == expected:
        return state
    names = {key: _TRANSPARENT.sub(r"\1", key) for key in state}
    counter = state.get("n_averaged")  # of torch.optim.swa_utils.AveragedModel, beside its module
    if isinstance(counter, Tensor) and counter.ndim == 0:
        names = {key: name for key, name in names.items() if key != "n_averaged"}
    while expected != set(names.values()):
        holder = next((h for h in _HOLDERS if names and all(n.startswith(h) for n in names.values())), None)
        if holder is None:
            break
        names = {key: name.removeprefix(holder) for key, name in names.items()}
    return renamed(state, names, source)


def renamed(state: Mapping[str, Any], names: Mapping[str, str], source: Path) -> dict[str, Any]:
    """The entries of a state that ``names`` has, under the names that it gives them.

    Raises:
        ValueError: two tensors would get the same name, so that one were lost.
    """
    found: dict[str, str] = {}
    for key, name in names.items():
        if name in found:
            raise LipsimError(f"{source} holds {name} twice, as {found[name]} and as {key}; keep one of them")
        found[name] = key
    return {name: state[key] for name, key in found.items()}


def read_checkpoint(path: Path, *, namespaces: bool = True) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or what ``torch.save`` wrote, without running code of the file.

    Args:
        path: the file.
        namespaces: whether ``argparse.Namespace`` is taken too: training checkpoints keep their arguments beside the
            weights. It holds values, no code.

    Returns:
        The mapping that the file holds, on the CPU: tensors by name, or containers of such.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, no checkpoint, or needs code to be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    check_is_binary(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if _is_torchscript(path):
        raise LipsimError(
            f"{path} is a TorchScript archive, whose weights cannot be read without its code; take the safetensors "
            "file of the same model instead (on Hugging Face, timm/ repositories have those of OpenAI's CLIP)"
        )
    if _takes_more(path):
        raise LipsimError(
            f"cannot read {path}: it is compressed, which torch.save never does, and would take more memory than the "
            "file has bytes; get another"
        )
    try:
        allowed: list[Any] = [argparse.Namespace] if namespaces else []
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on formats of old torch versions
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the pickled bytes lead it to
        raise LipsimError(f"cannot read {path}: {_fault(error)}") from error
    if (damaged := _damaged_member(path)) is not None:
        raise LipsimError(f"cannot read {path}: {damaged} in it is not what was written; get it again")
    if not isinstance(checkpoint, dict):
        raise LipsimError(f"expected a mapping of names to tensors in {path}, got {type(checkpoint).__name__}")
    return checkpoint


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a ``.safetensors`` file, on the CPU, and the texts in its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    check_is_binary(path)
    try:
        with safe_open(path, framework="pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LipsimError(
            f"cannot read {path} ({_reason(error)}); it is truncated or no safetensors file: get it again"
        ) from error


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; none where there is no such file."""
    try:
        with safe_open(path, framework="pt") as archive:
            return list(archive.keys())
    except (OSError, SafetensorError):
        return []


def check_is_binary(path: Path) -> None:
    """Refuse what a download that failed leaves in the place of a file of weights.

    Raises:
        ValueError: an empty file, a pointer of git-lfs, or a web page.
    """
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if not start:
        raise LipsimError(f"cannot read {path}: it is empty; get it again")
    if start.startswith(b"version https://git-lfs"):
        raise LipsimError(f"cannot read {path}: it is a pointer of git-lfs and not the file; run git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise LipsimError(f"cannot read {path}: it is a web page and no weights; get it again")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False  # the format of old torch versions, or damaged: torch.load tells


def _takes_more(path: Path) -> bool:
    """Whether the parts of an archive take more memory than the file has bytes, compressed or one over the other."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(part.file_size for part in archive.infolist()) > path.stat().st_size
    except (zipfile.BadZipFile, OSError):
        return False  # the format of old torch versions, or damaged: torch.load tells


def _damaged_member(path: Path) -> str | None:
    """The first part of an archive whose checksum is wrong, which torch does not look at; None where all are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except zipfile.BadZipFile:
        return None  # the format of old torch versions, without checksums


def _fault(error: Exception) -> str:
    """What is wrong with a file that torch's restricted reader refuses, without the pages that torch says about it."""
    stranger = re.search(r"(?:Unsupported class|GLOBAL) (\S+)", str(error))
    if stranger is not None:
        return (
            f"it needs more than tensors and plain containers ({stranger[1].strip('.`')}), which is never unpickled, "
            "since that could run code; get a file of weights, or save the weights alone where it was made: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    if "WeightsUnpickler" in str(error):
        return (
            "it is damaged, or needs more than tensors and plain containers, which is never unpickled; get another, or "
            "save the weights alone where it was made"
        )
    return "it is truncated or no checkpoint; get it again"


def _reason(error: Exception) -> str:
    """The first line of what a reader says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200]
