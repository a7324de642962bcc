"""From the layouts in which public vision transformers are stored to the names of timm's VisionTransformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.utils.errors import LipsimError
from lipsim.utils.weights import plain_names, renamed

# What training code wraps around the weights, most wanted first: DINO's teacher and moving averages (of timm,
# torchvision, lightly) are what their authors evaluate.
_WRAPPERS = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
)


@dataclass(frozen=True)
class Layout:
    """A naming of the tensors of a vision transformer.

    Attributes:
        name: who writes it.
        marker: the tensor by which it is known.
        renames: patterns and replacements, all applied in turn. ``….T`` is transposed; ``….q.…``, ``.k.`` and ``.v.``
            are joined.
        unused: names of what belongs to text towers, decoders and heads.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()
    unused: str = r"mask_token"


_OPEN_CLIP = (
    (r"^visual\.", ""),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight.T"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSFORMERS_CLIP = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^visual_projection\.", "head."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
_TRANSFORMERS_VIT = (
    (r"^(vit|dinov2)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)

TEXT_TOWER = (
    r"(text|transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|logit_scale|logit_bias"
    r"|attn_mask|input_resolution|context_length|vocab_size"
)

LAYOUTS = (
    Layout("DreamSim's CLIP", "pos_drop.weight", ((r"^pos_drop\.", "norm_pre."), (r"^proj$", "head.weight.T"))),
    Layout("timm and DINO", "patch_embed.proj.weight"),
    Layout("open_clip", "visual.conv1.weight", _OPEN_CLIP, TEXT_TOWER),
    Layout("the vision tower of open_clip", "conv1.weight", _OPEN_CLIP),
    Layout(
        "transformers",
        "vision_model.embeddings.class_embedding",
        _TRANSFORMERS_CLIP,
        r"text_model\..*|text_projection\.weight|logit_scale|vision_model\.embeddings\.position_ids",
    ),
    *(
        Layout(
            "transformers",
            f"{prefix}embeddings.cls_token",
            _TRANSFORMERS_VIT,
            r"((vit|dinov2)\.)?(embeddings\.mask_token|pooler\..*)|classifier\..*|decoder\..*",
        )
        for prefix in ("", "vit.", "dinov2.")
    ),
)


def tensors_of(checkpoint: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what training wrapped around them and without a projection head of DINO.

    Raises:
        ValueError: there are none, those of a student network alone, or one that is there under two names.
    """
    state: Mapping[str, Any] = checkpoint
    # A state holds no mappings: where there is one, tensors beside it are bookkeeping.
    while inner := next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None):
        state = inner
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LipsimError(f"expected tensors by name in {source}, got {', '.join(map(str, list(state)[:8]))}")
    tensors = plain_names(tensors, source)
    if any(key.startswith("backbone.") for key in tensors):
        # Beside a backbone, DINO keeps the projection head of its training.
        names = {key: key.removeprefix("backbone.") for key in tensors if not key.startswith("head.")}
        tensors = plain_names(renamed(tensors, names, source), source)
    if "visual.cls_token" in tensors:
        tensors = renamed(tensors, {key: key.removeprefix("visual.") for key in tensors}, source)
    return tensors


def vit_state(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The vision tower of a state in any of :data:`LAYOUTS`, in float32 and with the names of timm.

    Raises:
        ValueError: another layout, or a part of a joined weight is missing.
    """
    layout = next((layout for layout in LAYOUTS if layout.marker in state), None)
    if layout is None:
        markers = ", ".join(layout.marker for layout in LAYOUTS)
        raise LipsimError(
            f"{source} is no vision transformer in a known layout: expected one of {markers} among its tensors, got "
            f"{', '.join(sorted(state)[:4])}, …"
        )
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if re.fullmatch(layout.unused, key):
            continue
        name = key
        for pattern, replacement in layout.renames:
            name = re.sub(pattern, replacement, name)
        converted[name.removesuffix(".T")] = (tensor.mT if name.endswith(".T") else tensor).float()
    for name in [name for name in converted if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if missing := [part for part in parts if part not in converted]:
            raise LipsimError(f"the attention weights in {source} are not whole: no {missing[0]} beside {name}")
        converted[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([converted.pop(part) for part in parts])
    for name in ("cls_token", "pos_embed"):  # without leading dimensions of 1 in some layouts
        while name in converted and converted[name].ndim < 3:
            converted[name] = converted[name].unsqueeze(0)
    return converted


def fit(state: dict[str, Tensor], vit: VisionTransformer, source: Path, *, as_timm: bool = False) -> dict[str, Tensor]:
    """Adapt a state with the names of timm to a model: what it computes stays the same.

    Parts that the model leaves out, its last norm or its head, are dropped. A bias of the patches moves into their
    positions where the model has none, and positions are resized to the grid of the model by
    :func:`resize_positions`.

    Raises:
        ValueError: a bias of the projection that is not 0.
    """
    state = dict(state)
    for part in ("norm", "head"):
        if isinstance(getattr(vit, part), nn.Identity):
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{part}.")}
    bias = state.get("head.bias")
    if bias is not None and isinstance(vit.head, nn.Linear) and vit.head.bias is None:
        if bias.count_nonzero():
            raise LipsimError(f"head.bias in {source} is not 0; a CLIP's projection has no bias: take another file")
        del state["head.bias"]
    positions = state.get("pos_embed")
    if positions is not None and vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        bias = state.pop("patch_embed.proj.bias", None) if vit.patch_embed.proj.bias is None else None
        if bias is not None:
            positions = torch.cat([positions[:, :prefix], positions[:, prefix:] + bias], dim=1)
        state["pos_embed"] = resize_positions(positions, vit.patch_embed.grid_size, prefix, as_timm=as_timm)
    return state


def resize_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1, *, as_timm: bool = False) -> Tensor:
    """Position embeddings ``(1, prefix + M², D)`` for another grid of patches, as DINO and DINOv2 resize them.

    Bicubic, and with their scale factors, which are not quite the ratio of the sizes: 0.1 is added against rounding,
    and the sampling points follow. DreamSim runs DINOv2, stored for 37 × 37 patches, on 16 × 16 in this way.
    ``as_timm`` resizes as timm does when it loads a file, to the size itself and smoothed where the grid gets coarser.
    """
    side = round((positions.shape[1] - prefix) ** 0.5)
    if grid == (side, side) or side * side != positions.shape[1] - prefix:
        return positions
    if as_timm:
        found: Tensor = resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=prefix)
        return found
    images = positions[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = tuple((size + 0.1) / side for size in grid)
    resized = F.interpolate(images, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([positions[:, :prefix], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
