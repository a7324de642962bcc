"""What a model makes of an image before it answers: the features of one of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipsim.analysis.models import Model
from lipsim.layers.encoder import Encoder
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError

_INPUT_OF = "input of "


class FeatureMap(nn.Module):
    """Images ``(N, 3, S, S)`` in [0, 1] to the features ``(N, D)`` of one layer of a model, flattened.

    Args:
        model: any.
        layer: name of a module, whose output it is, or "input of NAME"; "output" is what the model answers. None: what
            a metric answers, and the input of the last linear layer of a classifier.

    Attributes:
        layer: as one asks for it again: the name of the module, "input of NAME", or "output".

    Raises:
        ValueError: no such layer, or none that a classifier ends with, or one that gives no tensor.

    Example:
        >>> from lipsim.analysis.models import load_model
        >>> FeatureMap(load_model("quickstart"))(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 128])
    """

    def __init__(self, model: Model, layer: str | None = None) -> None:
        super().__init__()
        self.module = model.module
        self._found: Any = None
        self._of_input = False
        if layer == "output" or (layer is None and isinstance(model.network, Encoder)):
            self.layer, self._watched = "output", self.module
        elif layer is None:
            name, self._watched = self._last_linear(model)
            self.layer, self._of_input = f"{_INPUT_OF}{name}", True
        else:
            modules = dict(model.network.named_modules())
            name = layer.removeprefix(_INPUT_OF)
            if name not in modules or not name:
                names = [name for name in modules if name]
                some = ", ".join(names if len(names) <= 12 else [*names[:4], "…", *names[-8:]])
                raise LipsimError(f"{model.name} has no layer {name!r}; it has {some}")
            self.layer, self._watched, self._of_input = layer, modules[name], name != layer

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, D)``."""
        self._found = None
        if self._of_input:
            hook = self._watched.register_forward_pre_hook(self._keep_input)
        else:
            hook = self._watched.register_forward_hook(self._keep_output)
        try:
            self.module(x)
        finally:
            hook.remove()
        found, self._found = self._found, None
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise LipsimError(f"expected features ({len(x)}, …) of {self.layer}, got {kind}; choose another layer")
        return found.flatten(1)

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Layers behind may work in place.
        self._found = output.clone() if isinstance(output, Tensor) else output

    def _keep_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Layers behind may work in place.
        self._found = inputs[0].clone() if inputs and isinstance(inputs[0], Tensor) else None

    @staticmethod
    def _last_linear(model: Model) -> tuple[str, nn.Linear]:
        """The linear layer whose output is the model's answer."""
        outputs: dict[str, Any] = {}
        linear = {name: module for name, module in model.network.named_modules() if isinstance(module, nn.Linear)}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
            for name, module in linear.items()
        ]
        weight = next(model.module.parameters(), torch.zeros(()))
        try:
            gray = torch.full((1, 3, model.image_size, model.image_size), 0.5).to(weight)
            with torch.no_grad(), taking_images(model.name, gray):
                answer = model.module(gray)
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in reversed(outputs.items()):
            if isinstance(answer, Tensor) and answer.shape == output.shape and torch.equal(answer, output):
                return name, linear[name]
        raise LipsimError(f"{model.name} does not end with a linear layer; choose the features by the name of a layer")
