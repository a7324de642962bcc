"""The part of a model's forward pass up to one of its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipsim.utils.errors import LipsimError


class Reached(Exception):
    """Carries what a hook found out of the model, so that nothing behind it is computed.

    Tracing, as torchvision's ``create_feature_extractor`` does, fails on models whose forward passes look at their
    input, every student here among them.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def run_up_to(model: nn.Module, layer: nn.Module, x: Tensor, *, output: bool = True) -> Any:
    """What comes out of a layer at its first call, or else what goes into it first, when the model gets ``x``.

    Raises:
        ValueError: the model does not call the layer.
    """

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args[0] if args else None)

    def after(_module: nn.Module, _args: object, result: Any) -> None:
        raise Reached(result)

    hook = layer.register_forward_hook(after) if output else layer.register_forward_pre_hook(before)
    try:
        model(x)
    except Reached as reached:
        return reached.value
    finally:
        hook.remove()
    name = next((name for name, module in model.named_modules() if module is layer), type(layer).__name__)
    raise LipsimError(f"the model does not use its layer {name}; name one that it calls")
