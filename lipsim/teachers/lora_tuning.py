"""LoRA adapters (Hu et al. 2022) in training: put into a network by peft, and merged for those who use the result."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from lipsim.utils.errors import LipsimError


@dataclass(frozen=True)
class Lora:
    """An adapter to train; the defaults are those of DreamSim's ensemble.

    Attributes:
        rank: of the factors.
        alpha: the product of the factors is scaled by alpha / rank. DreamSim's single models have 32.
        dropout: of what enters the factors. DreamSim's single models have 0.2.
        targets: names of the layers that get factors: "qkv" of ViTs, "conv_pw" and "conv_pwl" of EfficientNets.
    """

    rank: int = 16
    alpha: float = 8
    dropout: float = 0.3
    targets: tuple[str, ...] = ("qkv",)


def add_adapter(module: nn.Module, lora: Lora) -> None:
    """Put trainable factors into a network with peft, and freeze all the rest, in place.

    Raises:
        ValueError: peft is not installed, no layer is a target, or one is a convolution that factors do not fit.
    """
    try:
        import peft
    except ImportError as error:
        raise LipsimError("tuning with LoRA needs peft; install it with pip install 'lipsim[tune]'") from error
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    _check_targets(module, lora.targets)
    module.requires_grad_(False)
    peft.inject_adapter_in_model(config, module)


def _check_targets(module: nn.Module, targets: tuple[str, ...]) -> None:
    layers = {name: child for name, child in module.named_modules() if name}
    found = {name: child for name, child in layers.items() if any(f".{name}".endswith(f".{t}") for t in targets)}
    if not found:
        within = _within_attention(module)
        possible = {
            name.split(".")[-1] for name, child in layers.items() if _takes_factors(child) and child not in within
        }
        raise LipsimError(
            f"no layer of this {type(module).__name__} is called {' or '.join(targets)}; expected targets out of "
            f"{', '.join(sorted(possible)) or 'none'}"
        )
    within = _within_attention(module)
    for name, child in found.items():
        if child in within:
            raise LipsimError(
                f"{name} is within torch's attention, which reads its weights and never runs it, so that nothing would "
                f"train its factors; take {name.split('.')[-2]} as a target, which has factors for it as well"
            )
        if _takes_factors(child):
            continue
        kind = type(child).__name__
        if isinstance(child, nn.Conv2d):
            kind = f"convolution of {child.groups} groups and dilation {child.dilation[0]}"
        raise LipsimError(f"{name} is a {kind}, which no product of factors fits; leave it out of the targets")


def _within_attention(module: nn.Module) -> set[nn.Module]:
    """Layers that an ``nn.MultiheadAttention`` has for their weights alone."""
    attentions = [child for child in module.modules() if isinstance(child, nn.MultiheadAttention)]
    return {layer for attention in attentions for layer in attention.modules() if layer is not attention}


def _takes_factors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.dilation == (1, 1)  # peft passes no dilation on
    return isinstance(module, (nn.Linear, nn.MultiheadAttention))


def has_adapter(module: nn.Module) -> bool:
    """Whether the network has LoRA layers that are not merged."""
    return any(_is_adapted(child) for child in module.modules())


def merged(module: nn.Module) -> nn.Module:
    """The network with its LoRA layers merged: a copy with plain ones in their place, or itself if it has none."""
    if not has_adapter(module):
        return module
    copy = deepcopy(module)
    _merge_children(copy)
    return copy


def _merge_children(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if _is_adapted(child):
            setattr(parent, name, _plain(child))
        else:
            _merge_children(child)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _plain(layer: Any) -> nn.Module:
    """The layer under peft's, with merged weights."""
    if hasattr(layer, "unload_and_optionally_merge_module"):  # attention of torch, whose weights are not in layers
        plain: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    else:
        layer.merge(safe_merge=True)
        plain = layer.get_base_layer()
    return plain
