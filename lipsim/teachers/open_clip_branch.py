"""Vision towers of open_clip as teachers."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import open_clip
from open_clip.transformer import QuickGELU
from torch import Tensor

from lipsim.teachers.branches import Branch, BranchConfig
from lipsim.teachers.layouts import TEXT_TOWER

# The smallest text tower, which open_clip builds beside the one that is wanted.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class OpenClipBranch(Branch):
    """The vision tower of an open_clip model, after its projection."""

    def __init__(self, config: BranchConfig, image_size: int) -> None:
        name = config.model.removeprefix("open_clip/")
        described = open_clip.get_model_config(name)
        if described is None:
            raise ValueError(f"open_clip has no model {name}; open_clip.list_models() shows its names")
        if config.feature not in (None, "embedding"):
            raise ValueError(f"expected the feature 'embedding' of {config.model}, got {config.feature!r}")
        vision = {**described["vision_cfg"], **config.options.get("vision_cfg", {}), "image_size": image_size}
        options = {**config.options, "vision_cfg": vision, "text_cfg": _NO_TEXT}
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it warns that there are no weights yet
        try:
            clip = open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
        finally:
            logging.getLogger().setLevel(level)
        tower = clip.visual
        out_features = options.get("embed_dim", described["embed_dim"])
        super().__init__(config.model, tower, out_features, tower.image_mean, tower.image_std)
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        self.files = tuple(Path(tag["url"]).name for tag in tags if tag.get("url"))
        self.repositories = tuple(dict.fromkeys(tag["hf_hub"].rstrip("/") for tag in tags if tag.get("hf_hub")))

    def tokens(self, x: Tensor) -> Tensor:
        return self.backbone(x).unsqueeze(1)

    def fitted(self, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
        self._check_activation(file)
        if any(key.startswith("visual.") for key in state):  # a whole CLIP; else the vision tower alone
            state = {key: tensor for key, tensor in state.items() if not re.fullmatch(TEXT_TOWER, key)}
        return {key.removeprefix("visual."): t.float() if t.is_floating_point() else t for key, t in state.items()}

    def _check_activation(self, file: Path) -> None:
        """The same shapes with another activation would load, and be wrong."""
        path = file.parent / "open_clip_config.json"
        if not path.is_file():
            return
        try:
            quick = bool(json.loads(path.read_text())["model_cfg"].get("quick_gelu", False))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot read {path} ({error}); get it again, or remove it") from error
        if quick != any(isinstance(module, QuickGELU) for module in self.backbone.modules()):
            kind, other = ("QuickGELU", "with") if quick else ("GELU", "without")
            raise ValueError(f"{path} asks for {kind}; take the name {other} -quickgelu in place of {self.model}")
