"""Backbones of timm: transformers and convolutional networks."""

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
from lipsim.teachers.packages import is_packaged, timm_names
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json


class TimmBranch(Branch):
    """A timm model, DreamSim's backbones among them."""

    def __init__(self, config: BranchConfig, image_size: int) -> None:
        known = BACKBONES.get(config.model)
        name = config.model.removeprefix("timm/") if known is None else known.timm
        defaults = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if defaults is None and config.model.startswith("timm/"):
            raise LipsimError(f"timm has no model {name}; timm.list_models() names them")
        if defaults is None:
            raise LipsimError(
                f"expected a backbone ({', '.join(BACKBONES)}), timm/NAME or open_clip/NAME, got {config.model}"
            )
        self.feature = config.feature or (known.feature if known and not config.layers else "last_layer")
        # Layers alone, unless something is named besides.
        self.pooled = not config.layers or config.feature is not None
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
        names = list(backbone.state_dict())
        self.layers, width = _stages(config, backbone) if config.layers else ((), 0)
        if not self.pooled:  # what comes after the last layer has nothing to do, nor to train
            backbone.prune_intermediate_layers(list(self.layers), prune_norm=True, prune_head=True)
        self.all_names, self.unused = names, set(names) - set(backbone.state_dict())
        super().__init__(
            config.model,
            backbone,
            width + ((num_classes or backbone.head_hidden_size) if self.pooled else 0),
            known.mean if known else defaults.mean,
            known.std if known else defaults.std,
            config.input_size,
        )
        self.name, self.known = name, known is not None
        self.heads: set[str] = set()
        if not known and self.feature != "embedding":
            with torch.device("meta"):  # of the network as timm trains and stores it
                whole = timm.create_model(name, pretrained=False, **options)
            self.heads = set(whole.state_dict()) - set(names)
        if known:
            self.files, self.repositories = known.files, known.repositories
        else:
            self.files = (Path(defaults.url).name,) if isinstance(defaults.url, str) and defaults.url else ()
            self.repositories = (defaults.hf_hub_id,) if defaults.hf_hub_id else ()
        self.classifier = defaults.classifier

    def tokens(self, x: Tensor) -> Tensor:
        if self.layers:
            return self._of_layers(x).unsqueeze(1)
        if self.feature not in ("cls", "cls_patch"):
            features: Tensor = self.backbone(x)
            return features.unsqueeze(1)
        ((patches, prefix),) = self.backbone.forward_intermediates(  # type: ignore[operator]
            x, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        # Registers, where there are some, follow the class token.
        return prefix[:, :1] if self.feature == "cls" else torch.cat([prefix[:, :1], patches], dim=1)

    def _of_layers(self, x: Tensor) -> Tensor:
        """Pooled features of the chosen layers, and after them what the whole network answers where it is wanted."""
        intermediates: Any = self.backbone.forward_intermediates
        if not self.pooled:
            maps = intermediates(x, indices=list(self.layers), stop_early=True, intermediates_only=True)
            return torch.cat([features.mean((2, 3)) for features in maps], dim=-1)
        last, maps = intermediates(x, indices=list(self.layers))
        head: Any = self.backbone.forward_head
        return torch.cat([*(features.mean((2, 3)) for features in maps), head(last)], dim=-1)

    def fitted(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        if not self.known:  # DreamSim normalises in its own way
            self._follow(file)
        return {name: tensor for name, tensor in self._whole(state, file).items() if name not in self.unused}

    def _follow(self, file: Path) -> None:
        """Take the statistics from the description beside a file, in a repository of timm's.

        Those of the name are of one training of many: vit_base_patch16_224 has others than the same network's .dino.
        """
        path = file.parent / "config.json"
        if not path.is_file():
            return
        try:
            described = parse_json(path.read_text(encoding="utf-8"))
            # Of transformers, or of another network in the same folder.
            if described.get("architecture") == self.name.partition(".")[0]:
                self.normalise_by(described.get("pretrained_cfg", described))
        except (ValueError, AttributeError) as error:
            raise LipsimError(f"cannot read {path} ({error}); get it again, or remove it") from error

    def _whole(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        """The weights of the whole network, without its head, but also without layers left out."""
        state = {key: value for key, value in state.items() if key not in self.heads}
        if isinstance(self.backbone, VisionTransformer):
            return fit(vit_state(state, file), self.backbone, file, as_timm=not self.known)
        if is_packaged(state):
            if "tf_" not in self.name:
                raise LipsimError(
                    f"{file} has weights of EfficientNet-Lite as TensorFlow pads; {self.model} would take them and be "
                    "worse: take the model efficientnet_lite0, 1 or 2"
                )
            state = timm_names(state, self.all_names)
        if self.feature == "embedding" or not self.classifier:
            return state
        heads = (self.classifier,) if isinstance(self.classifier, str) else self.classifier
        return {key: value for key, value in state.items() if not key.startswith(tuple(f"{h}." for h in heads))}


def _stages(config: BranchConfig, backbone: Any) -> tuple[tuple[int, ...], int]:
    """The layers that a configuration names, counted from 0 and in order, and how many features they have together.

    Raises:
        ValueError: a layer that the network does not have, one twice, or a network that tells of none.
    """
    if config.feature in ("cls", "cls_patch"):
        raise LipsimError(
            f"expected the feature 'last_layer', 'embedding' or none beside layers, got {config.feature!r}"
        )
    if not hasattr(backbone, "forward_intermediates") or not backbone.feature_info:
        raise LipsimError(f"timm does not tell the layers of {config.model} apart; leave layers out")
    widths = [stage["num_chs"] for stage in backbone.feature_info]
    num = len(widths)
    chosen = sorted({layer % num for layer in config.layers if -num <= layer < num})
    if len(chosen) != len(config.layers):
        raise LipsimError(f"expected layers of {config.model} from 0 to {num - 1}, each once, got {config.layers}")
    return tuple(chosen), sum(widths[layer] for layer in chosen)
