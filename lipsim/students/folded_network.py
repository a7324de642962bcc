"""A network of explicit weights: what a student is once its derived weights are folded, and nothing derives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lipsim import layers
from lipsim.certificates.numbers import check_count
from lipsim.layers.encoder import Encoder
from lipsim.students.sequence import LayerSequence
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


def _attributes(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names}


def _linear(module: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
    }


def _conv2d(module: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**_attributes(*names)(module), "bias": module.bias is not None}


def _residual_conv2d(module: layers.FoldedResidualConv2d) -> dict[str, Any]:
    inner_channels, channels, kernel_size, _ = module.kernel.shape
    sizes = {"channels": channels, "inner_channels": inner_channels, "kernel_size": kernel_size}
    return {**sizes, **_attributes("stride", "padding", "padding_mode")(module)}


def _shift(module: layers.ChannelShift) -> dict[str, Any]:
    channels, group = sum(module.groups), module.groups[1]
    return {"channels": channels, "share": min(4 * (group + 0.5) / channels, 1.0)}  # rounded down to groups


# Class → the arguments that it is built again with, in the types of JSON.
_KINDS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    layers.FoldedResidualLinear: lambda module: {
        "features": module.weight.shape[1],
        "inner_features": module.weight.shape[0],
    },
    layers.FoldedResidualConv2d: _residual_conv2d,
    nn.Flatten: _attributes("start_dim", "end_dim"),
    nn.Identity: _attributes(),
    nn.PixelUnshuffle: _attributes("downscale_factor"),
    nn.ReLU: _attributes(),
    nn.ZeroPad2d: _attributes("padding"),
    layers.Centering: _attributes("offset"),
    layers.ChannelPadding: lambda module: {"in_channels": 0, "channels": module.added},
    layers.ChannelShift: _shift,
    layers.GroupSort: _attributes("group_size"),
    layers.Householder: lambda module: {"channels": 2 * len(module.angle)},
    layers.L2NormPool2d: _attributes("block"),
    layers.MaxMin: _attributes(),
    layers.ScaledAvgPool2d: _attributes("block"),
    layers.Scattering: _attributes("image_size", "grid", "scales", "orientations", "low"),
    layers.SpaceToDepth: _attributes("block"),
    layers.Truncation: _attributes("features"),
}
_CLASSES = {cls.__name__: cls for cls in _KINDS}
_LARGEST = 2**28  # elements of a tensor between two layers, of one image, or of a kernel as its bound spreads it


@records_arguments()
class FoldedNetwork(LayerSequence):
    """Layers with explicit weights one after another, ``(N, 3, S, S) → (N, out_features)``, as a list names them.

    Its weights are those that its forward pass uses: convolutions and matrices that any runtime knows. Nothing keeps
    them 1-Lipschitz in training; :mod:`lipsim.audit` bounds them as they are.

    Args:
        layers: of each layer its class, ``"kind"``, beside the arguments of its constructor; or a list of layers.
        image_size: side ``S`` of the input.
        out_features: features ``D``.

    Raises:
        ValueError: a layer of no known kind, layers that do not fit each other, or that make a gigabyte of one image.
    """

    config: dict[str, Any]

    def __init__(self, layers: Sequence[Any], image_size: int, out_features: int) -> None:
        _check_sizes(layers, check_count("image_size", image_size), out_features)
        super().__init__(*map(_build, layers))
        self.image_size = image_size
        self.out_features = out_features

    @classmethod
    def from_encoder(cls, encoder: nn.Module) -> Self:
        """What a sequence of known layers computes in evaluation mode, with explicit weights.

        Raises:
            ValueError: it is no such sequence, has a layer that no file can name, or weights of several dtypes.
        """
        if not isinstance(encoder, Encoder) or not isinstance(encoder, nn.Sequential):
            raise LipsimError(
                f"cannot fold a {type(encoder).__name__}, which is no sequence of layers with an image_size and "
                "out_features; lipsim.metric.save writes it as it is"
            )
        explicit = layers.explicit_copy(encoder)
        network = cls([_describe(layer) for layer in explicit.children()], encoder.image_size, encoder.out_features)
        # In their order: children of a sequence may have names of their own.
        state = dict(zip(network.state_dict(), explicit.state_dict().values(), strict=True))
        if not state:
            return network.eval()
        if len(dtypes := {tensor.dtype for tensor in state.values()}) > 1:
            raise LipsimError(f"cannot fold weights of {' and '.join(sorted(map(str, dtypes)))} without rounding some")
        network.to(next(iter(state.values()))).load_state_dict(state)
        return network.requires_grad_(False).eval()


def _describe(layer: nn.Module) -> Any:
    """What :func:`_build` builds a layer from."""
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
        return [_describe(child) for child in layer.children()]
    arguments = _KINDS.get(type(layer))
    if arguments is None:
        raise LipsimError(
            f"cannot fold a {type(layer).__name__}; known are {', '.join(_CLASSES)} and what is folded into them; "
            "lipsim.metric.save writes the metric as it is"
        )
    return {"kind": type(layer).__name__, **arguments(layer)}


def _check_sizes(layers: Sequence[Any], image_size: int, out_features: int) -> None:
    """Run the layers without memory or values: a list, in the header of a file, may ask for any amount of both."""

    def check(module: nn.Module, _: Any, output: Tensor) -> None:
        if output.numel() > _LARGEST:
            raise LipsimError(f"a {type(module).__name__} makes {tuple(output.shape)} numbers of one image, too many")

    with torch.device("meta"), torch.no_grad():
        network = nn.Sequential(*map(_build, layers)).eval()
        for module in network.modules():
            module.register_forward_hook(check)
        shape = tuple(network(torch.empty(1, 3, image_size, image_size)).shape)
    if shape != (1, out_features):
        raise LipsimError(f"expected layers that give (1, {out_features}) features of one image, they give {shape}")


def _build(description: Any) -> nn.Module:
    if isinstance(description, list | tuple):
        return nn.Sequential(*map(_build, description))
    if not isinstance(description, Mapping) or description.get("kind") not in _CLASSES:
        raise LipsimError(f"expected layers of the kinds {', '.join(_CLASSES)}, got {description!r:.100}")
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items() if name != "kind"}
    layer = _CLASSES[description["kind"]](**arguments)
    if isinstance(layer, nn.Conv2d):
        sides = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        spread = math.prod(max(stride, 1 + (taps - 1) * dilation) for taps, stride, dilation in sides)
        if spread * math.prod(layer.weight.shape[:2]) > _LARGEST:
            raise LipsimError(f"a {layer} is spread over {spread} pixels, too many")
    return layer
