"""LoRA adapters (Hu et al. 2022) in the folders that peft writes: read, checked, and merged into the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json
from lipsim.utils.weights import plain_names, read_checkpoint

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")

# base_model.model is peft's wrapper; only states of whole training runs name the adapter.
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
# Options that change the merged weight in other ways than W + scale · B A.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "exclude_modules",
    "target_parameters",
    "layer_replication",
)


@torch.no_grad()
def merge_adapter(modules: Mapping[str, nn.Module], folder: Path, remedy: str) -> None:
    """Merge an adapter: each weight ``W`` that it has factors for becomes ``W + (alpha / r) · B A``.

    Args:
        modules: the network's modules, by the names that the adapter has for them.
        folder: has adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        remedy: where to get the folder, for messages.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a damaged file, an option that plain LoRA does not have, or factors that do not fit the network:
            missing, superfluous or of another shape.
    """
    config = _read_config(folder, remedy)
    rank, scale = config["r"], config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    file, factors = _read_factors(folder, remedy)
    targets = {name for name, module in modules.items() if _is_target(name, module, config)}
    if not targets:
        raise LipsimError(
            f"no linear layer of the network is a target of {folder / CONFIG} ({config['target_modules']})"
        )
    missing = sorted(targets - factors.keys())
    if missing:
        raise LipsimError(
            f"{file} has no factors for {len(missing)} of {len(targets)} targets (first: {missing[0]}); {remedy}"
        )
    for name, pair in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or pair.keys() != {"A", "B"}:
            fault = f"only lora_{next(iter(pair))}" if isinstance(layer, nn.Linear) else "no such linear layer"
            raise LipsimError(f"the factors for {name} in {file} do not fit the network: {fault}; {remedy}")
        for factor, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            if pair[factor].shape != shape:
                raise LipsimError(
                    f"expected lora_{factor} of {name} in {file} with shape {shape}, got {tuple(pair[factor].shape)}; "
                    f"the adapter was made for another network: {remedy}"
                )
        layer.weight += scale * (pair["B"].float() @ pair["A"].float()).to(layer.weight)


def _read_config(folder: Path, remedy: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} of a LoRA adapter in {folder}; {remedy}")
    try:
        config: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if config.get("peft_type", "LORA") != "LORA":
            raise LipsimError(f"it describes a {config['peft_type']} adapter")
        used = [option for option in _UNSUPPORTED if config.get(option)]
        if used or config.get("bias", "none") != "none":
            raise LipsimError(f"it uses {', '.join(used) or 'bias'}, which plain LoRA does not have")
        if not (isinstance(config["r"], int) and config["r"] > 0 and config["target_modules"]):
            raise LipsimError(f"its rank is {config['r']} and its targets are {config['target_modules']}")
        config["lora_alpha"] = float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise LipsimError(f"cannot use {path}: {reason}; {remedy}") from error
    return config


def _read_factors(folder: Path, remedy: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """The file that was read, and for each module of the network its factors A and B."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"expected {' or '.join(FILES)} in {folder}, got neither; {remedy}")
    try:
        state = plain_names(read_checkpoint(file), file)
    except ValueError as error:
        raise LipsimError(f"{error}; {remedy}") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or not isinstance(tensor, Tensor):
            raise LipsimError(f"{key} in {file} is no factor of a LoRA adapter; {remedy}")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    return file, factors


def _is_target(name: str, module: nn.Module, config: dict[str, Any]) -> bool:
    targets = config["target_modules"]
    if not isinstance(module, nn.Linear):
        return False
    if isinstance(targets, str):
        matched = re.fullmatch(targets, name) is not None
    else:
        matched = any(name == target or name.endswith(f".{target}") for target in targets)
    layers = config.get("layers_to_transform")
    if matched and layers is not None:
        number = re.search(r"\.(\d+)\.(?!.*\.\d+\.)", name)  # the innermost list that the layer is in
        return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)
    return matched
