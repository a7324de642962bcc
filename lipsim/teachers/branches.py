"""One backbone of a teacher: a model, its normalisation, and the place where its feature is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lipsim.teachers.catalogue import BACKBONES, Feature, where_to_get
from lipsim.teachers.layouts import fit, tensors_of, vit_state
from lipsim.teachers.locate import find_weights
from lipsim.weights import load_weights, read_checkpoint

# In place of a file: random weights, which nobody gets unless they ask.
RANDOM = "random"


@dataclass(frozen=True)
class BranchConfig:
    """What a branch is built from.

    Attributes:
        model: one of :data:`lipsim.teachers.catalogue.BACKBONES`; ``timm/NAME``; or ``open_clip/NAME``, such as
            ``open_clip/convnext_base_w``. Weights that were trained with QuickGELU want the names in ``-quickgelu``.
        weights: a file, or a folder: DreamSim's, of Hugging Face, or the cache of torch.hub, timm, open_clip or
            transformers; "random" leaves them random.
        feature: "cls", the class token of the last block *before* the final norm; "cls_patch", the patches besides;
            "last_layer", what the model pools after its final norm; "embedding", the same after the projection. None:
            where DreamSim takes it, "last_layer" of other timm and "embedding" of open_clip models.
        options: arguments of the model, such as ``{"depth": 2}``; open_clip takes ``{"vision_cfg": {…}}``.
    """

    model: str
    weights: str | Path
    feature: Feature | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Branch(nn.Module, ABC):
    """A backbone on images in [0, 1].

    Args:
        model: its name in :class:`BranchConfig`.
        backbone: the network; its head is the projection, or nothing.
        out_features: dimension of the feature.
        mean: subtracted from each channel.
        std: each channel is divided by it then.

    Attributes:
        files: names that its weight file may have.
        repositories: Hugging Face repositories of its weights.
    """

    mean: Tensor
    std: Tensor
    files: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()

    def __init__(
        self, model: str, backbone: nn.Module, out_features: int, mean: Iterable[float], std: Iterable[float]
    ) -> None:
        super().__init__()
        self.model, self.backbone, self.out_features = model, backbone, out_features
        # Buffers, so that an exported teacher keeps what it was made with.
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, S, S)`` in [0, 1] to tokens ``(N, T, D)``: T = 1, or 1 + patches for "cls_patch"."""
        return self.tokens((x - self.mean) / self.std)

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
        file = find_weights(path, self.model, self.files, self.repositories, remedy, alone=alone)
        try:
            state = self.fitted(tensors_of(read_checkpoint(file), file), file)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        load_weights(self.backbone, state, str(file), f"it is not the file of {self.model}: {remedy}")


class TimmBranch(Branch):
    """A timm model, DreamSim's backbones among them."""

    def __init__(self, config: BranchConfig, image_size: int) -> None:
        known = BACKBONES.get(config.model)
        name = config.model.removeprefix("timm/") if known is None else known.timm
        defaults = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if defaults is None:
            raise ValueError(
                f"expected a backbone ({', '.join(BACKBONES)}), timm/NAME or open_clip/NAME, got {config.model}"
            )
        self.feature = config.feature or (known.feature if known else "last_layer")
        options = dict(config.options)
        projection = options.pop("projection", known.projection if known else defaults.num_classes)
        if self.feature == "embedding" and not projection:
            raise ValueError(f"{config.model} has no projection; expected another feature than 'embedding'")
        if defaults.fixed_input_size:
            options["img_size"] = image_size
        num_classes = projection if self.feature == "embedding" else 0
        backbone: Any = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
        if self.feature in ("cls", "cls_patch"):
            if not (isinstance(backbone, VisionTransformer) and backbone.has_class_token):
                raise ValueError(f"{config.model} has no class token; expected the feature 'last_layer'")
            backbone.norm = nn.Identity()  # not on the way to the feature
        elif self.feature == "embedding" and known:
            backbone.head = nn.Linear(backbone.num_features, projection, bias=False)
        super().__init__(
            config.model,
            backbone,
            num_classes or backbone.num_features,
            known.mean if known else defaults.mean,
            known.std if known else defaults.std,
        )
        if known:
            self.files, self.repositories = known.files, known.repositories
        else:
            self.files = (Path(defaults.url).name,) if isinstance(defaults.url, str) and defaults.url else ()
            self.repositories = (defaults.hf_hub_id,) if defaults.hf_hub_id else ()
        self.classifier = defaults.classifier

    def tokens(self, x: Tensor) -> Tensor:
        if self.feature not in ("cls", "cls_patch"):
            return self.backbone(x).unsqueeze(1)
        ((patches, prefix),) = self.backbone.forward_intermediates(  # type: ignore[operator]
            x, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        # Registers, where there are some, follow the class token.
        return prefix[:, :1] if self.feature == "cls" else torch.cat([prefix[:, :1], patches], dim=1)

    def fitted(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        if isinstance(self.backbone, VisionTransformer):
            return fit(vit_state(state, file), self.backbone, file)
        if self.feature == "embedding" or not self.classifier:
            return state
        heads = (self.classifier,) if isinstance(self.classifier, str) else self.classifier
        return {key: value for key, value in state.items() if not key.startswith(tuple(f"{h}." for h in heads))}


def build_branch(config: BranchConfig, image_size: int) -> Branch:
    """The branch that a configuration names, with its weights where it names some.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: an unknown model, a feature that it does not have, or weights that do not fit.
    """
    kind: Callable[[BranchConfig, int], Branch] = TimmBranch
    if config.model.startswith("open_clip/"):
        # open_clip takes seconds to import, which nobody should wait for who does not use it.
        from lipsim.teachers.open_clip_branch import OpenClipBranch

        kind = OpenClipBranch
    try:
        branch = kind(config, image_size)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"cannot build {config.model} with {config.options or 'its own options'}: {error}") from error
    if config.weights != RANDOM:
        branch.load(config.weights)
    return branch
