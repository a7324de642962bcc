"""Vision towers of open_clip as teachers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import QuickGELU
from torch import Tensor

from lipsim.teachers.branch import Branch, BranchConfig
from lipsim.teachers.layouts import TEXT_TOWER
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json

# The smallest text tower, which open_clip builds beside the one that is wanted.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class OpenClipBranch(Branch):
    """The vision tower of an open_clip model, after its projection."""

    def __init__(self, config: BranchConfig, image_size: int) -> None:
        name = config.model.removeprefix("open_clip/")
        described = open_clip.get_model_config(name)
        if described is None:
            raise LipsimError(f"open_clip has no model {name}; open_clip.list_models() shows its names")
        if config.feature not in (None, "embedding"):
            raise LipsimError(f"expected the feature 'embedding' of {config.model}, got {config.feature!r}")
        if config.layers:
            raise LipsimError(f"expected no layers of {config.model}, got {config.layers}; timm models have them")
        vision = {**described["vision_cfg"], **config.options.get("vision_cfg", {}), "image_size": image_size}
        options = {**config.options, "vision_cfg": vision, "text_cfg": _NO_TEXT}
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it warns that there are no weights yet
        try:
            clip = open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
        finally:
            logging.getLogger().setLevel(level)
        tower = clip.visual
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        # Statistics are those of the weights; a tower without weights has OpenAI's, whatever it is.
        known = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags if tag.get("mean") and tag.get("std")}
        mean, std = known.pop() if len(known) == 1 else (tower.image_mean, tower.image_std)
        super().__init__(
            config.model, tower, options.get("embed_dim", described["embed_dim"]), mean, std, config.input_size
        )
        self.tags = tags
        # Weights that were trained with the other activation would load, and be wrong: they are not looked for.
        fitting = [tag for tag in tags if bool(tag.get("quick_gelu")) == self.quick]
        self.files = tuple(Path(tag["url"]).name for tag in fitting if tag.get("url"))
        self.repositories = tuple(dict.fromkeys(_repository(tag) for tag in fitting if tag.get("hf_hub")))

    @property
    def quick(self) -> bool:
        """Whether the activation is QuickGELU."""
        return any(isinstance(module, QuickGELU) for module in self.backbone.modules())

    def tokens(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(x)
        return features.unsqueeze(1)

    def fitted(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        self._follow(file)
        if any(key.startswith("visual.") for key in state):  # a whole CLIP; else the vision tower alone
            state = {key: tensor for key, tensor in state.items() if not re.fullmatch(TEXT_TOWER, key)}
        return {key.removeprefix("visual."): t.float() if t.is_floating_point() else t for key, t in state.items()}

    def _follow(self, file: Path) -> None:
        """Take statistics and activation from what is known of a file: by its name, and by a description beside it."""
        for tag in self.tags:
            named = bool(tag.get("url")) and Path(tag["url"]).name == file.name
            cached = bool(tag.get("hf_hub")) and f"models--{_repository(tag).replace('/', '--')}" in file.parts
            if named or cached:
                self._check_activation(bool(tag.get("quick_gelu")), file)
                self.normalise_by(tag)
                break
        path = file.parent / "open_clip_config.json"
        if not path.is_file():
            return
        try:
            described = parse_json(path.read_text(encoding="utf-8"))
            quick = bool(described["model_cfg"].get("quick_gelu", False))
            self.normalise_by(described.get("preprocess_cfg", {}))
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise LipsimError(f"cannot read {path} ({error}); get it again, or remove it") from error
        self._check_activation(quick, path)

    def _check_activation(self, quick: bool, source: Path) -> None:
        """The same shapes with another activation would load, and be wrong."""
        if quick != self.quick:
            kind, other = ("QuickGELU", "with") if quick else ("GELU", "without")
            raise LipsimError(f"{source} asks for {kind}; take the name {other} -quickgelu in place of {self.model}")


def _repository(tag: Mapping[str, Any]) -> str:
    return str(tag["hf_hub"]).rstrip("/")
