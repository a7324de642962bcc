"""Backbones of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lipsim.teachers.branch import Branch, BranchConfig
from lipsim.teachers.catalogue import BACKBONES
from lipsim.teachers.layouts import fit, vit_state
from lipsim.utils.errors import LipsimError


class TimmBranch(Branch):
    """A timm model, DreamSim's backbones among them."""

    def __init__(self, config: BranchConfig, image_size: int) -> None:
        known = BACKBONES.get(config.model)
        name = config.model.removeprefix("timm/") if known is None else known.timm
        defaults = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if defaults is None:
            raise LipsimError(
                f"expected a backbone ({', '.join(BACKBONES)}), timm/NAME or open_clip/NAME, got {config.model}"
            )
        self.feature = config.feature or (known.feature if known else "last_layer")
        options = dict(config.options)
        projection = options.pop("projection", known.projection if known else defaults.num_classes)
        if self.feature == "embedding" and not projection:
            raise LipsimError(f"{config.model} has no projection; expected another feature than 'embedding'")
        if defaults.fixed_input_size:
            options["img_size"] = image_size
        num_classes = projection if self.feature == "embedding" else 0
        backbone: Any = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
        if self.feature in ("cls", "cls_patch"):
            if not (isinstance(backbone, VisionTransformer) and backbone.has_class_token):
                raise LipsimError(f"{config.model} has no class token; expected the feature 'last_layer'")
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
            features: Tensor = self.backbone(x)
            return features.unsqueeze(1)
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
