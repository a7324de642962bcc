"""Features are taken where they should be, and weights are read from every public layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from public_layouts import DEPTH, OPTIONS, PROJECTION, WIDTH, backbone_state, randomise, vit_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lipsim.teachers.branch import Branch, BranchConfig
from lipsim.teachers.build import build_branch
from lipsim.teachers.layouts import resize_positions

TEXT = {"context_length": 4, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1}
VISION = {"layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
# The same size as VISION for the backbones that are timm models.
_TINY = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
SMALL = {"embed_dim": 32, "depth": DEPTH, "num_heads": 2, "projection": PROJECTION}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 32, 32)


def _branch(model: str, path: Path | None = None, feature: Any = None, options: Any = OPTIONS) -> Branch:
    return build_branch(BranchConfig(model, path or "random", feature, options), 32).eval()


def _clip(name: str = "ViT-B-16-quickgelu") -> Any:
    return randomise(open_clip.create_model(name, embed_dim=PROJECTION, vision_cfg=VISION, text_cfg=TEXT))


@torch.no_grad()
def test_features_are_those_of_the_published_places(x: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    for feature in ("cls", "cls_patch", "last_layer"):
        branch = randomise(_branch("timm/vit_small_patch16_224", feature=feature, options={"depth": DEPTH}))
        blocks, norm = branch.backbone.blocks, branch.backbone.norm
        blocks[-1].register_forward_hook(lambda module, args, output: seen.update(block=output))
        norm.register_forward_hook(lambda module, args, output: seen.update(norm=output))
        blocks[0].register_forward_pre_hook(lambda module, args: seen.update(embedded=args[0]))
        found = branch(x)
        expected = seen["norm"] if feature == "last_layer" else seen["block"]
        expected = expected if feature == "cls_patch" else expected[:, :1]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert isinstance(norm, nn.Identity) == (feature != "last_layer")
        # Normalised before the patches are embedded.
        mean, std = branch.mean, branch.std
        patches = branch.backbone.patch_embed((x - mean) / std) + branch.backbone.pos_embed[:, 1:]
        torch.testing.assert_close(seen["embedded"][:, 1:], patches, rtol=1e-5, atol=1e-4)  # sums in another order


@torch.no_grad()
def test_a_clip_embeds_after_its_projection(x: Tensor) -> None:
    branch = randomise(_branch("clip_vitb16"))
    backbone, seen = branch.backbone, {}
    backbone.blocks[-1].register_forward_hook(lambda module, args, output: seen.update(block=output))
    found = branch(x)[:, 0]
    normed = F.layer_norm(seen["block"][:, 0], (WIDTH,), backbone.norm.weight, backbone.norm.bias, 1e-5)
    torch.testing.assert_close(found, normed @ backbone.head.weight.mT)


def test_register_tokens_are_no_patches(x: Tensor) -> None:
    config = BranchConfig("timm/vit_small_patch14_reg4_dinov2", "random", "cls_patch", options={"depth": 1})
    branch = build_branch(config, 28)
    assert branch.backbone.num_prefix_tokens == 5
    assert branch(x[..., :28, :28]).shape == (2, 1 + 4, 384)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "visual", "training", "safetensors"])
def test_clip_backbones_equal_open_clip(kind: str, x: Tensor, tmp_path: Path) -> None:
    clip = _clip()
    file = tmp_path / "clip.pt"
    if kind == "full":
        torch.save(clip.state_dict(), file)
    elif kind == "visual":  # as robust CLIPs are published
        torch.save(clip.visual.state_dict(), file)
    elif kind == "training":
        state = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, file)
    else:
        file = tmp_path / "open_clip_model.safetensors"
        save_file(clip.state_dict(), file)
    named = _branch("clip_vitb16", file, options=SMALL)
    other = {"embed_dim": PROJECTION, "vision_cfg": VISION}
    tower = _branch("open_clip/ViT-B-16-quickgelu", file.parent if kind == "safetensors" else file, options=other)
    expected = clip.encode_image((x - named.mean) / named.std)
    torch.testing.assert_close(tower(x)[:, 0], expected)
    torch.testing.assert_close(named(x)[:, 0], expected, rtol=1e-4, atol=1e-5)


class _Holder(nn.Module):
    """A training module that calls its network ``model`` or ``backbone``."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def _compiled_inside(vit: nn.Module) -> nn.Module:
    vit = copy.deepcopy(vit)
    vit.blocks[0] = torch.compile(vit.blocks[0])
    return vit


@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        (torch.compile, "_orig_mod.cls_token"),
        (nn.DataParallel, "module.cls_token"),
        (lambda vit: nn.DataParallel(torch.compile(vit)), "module._orig_mod.cls_token"),
        (lambda vit: torch.compile(nn.DataParallel(vit)), "_orig_mod.module.cls_token"),
        (AveragedModel, "n_averaged"),
        (lambda vit: AveragedModel(torch.compile(vit)), "n_averaged"),
        (lambda vit: _Holder(model=vit), "model.cls_token"),
        (lambda vit: _Holder(model=torch.compile(vit)), "model._orig_mod.cls_token"),
        (lambda vit: nn.DataParallel(_Holder(model=_Holder(model=vit))), "module.model.model.cls_token"),
        (lambda vit: _Holder(backbone=torch.compile(vit), head=nn.Linear(2, 2)), "backbone._orig_mod.cls_token"),
        (_compiled_inside, "cls_token"),
    ],
)
def test_wrappers_around_the_weights_are_taken_off(wrap: Any, first: str, tmp_path: Path) -> None:
    vit = randomise(_branch("timm/vit_small_patch16_224", options=_TINY).backbone)
    state, file = wrap(vit).state_dict(), tmp_path / "vit.pth"
    assert next(iter(state)) == first
    torch.save({"state_dict": state, "epoch": 3}, file)
    _assert_loads(file, vit)
    torch.save({key: tensor for key, tensor in state.items() if not key.endswith("blocks.1.norm1.bias")}, file)
    with pytest.raises(ValueError, match=r"missing \(first: blocks.1.norm1.bias\)"):
        _branch("timm/vit_small_patch16_224", file, options=_TINY)
    name = next(name for name in state if name.endswith("blocks.1.norm1.bias"))
    torch.save(state | {name.replace("blocks.1", "blocks._orig_mod.1"): state[name]}, file)
    with pytest.raises(ValueError, match=r"holds .*blocks.1.norm1.bias twice, as .* and as .*; keep one"):
        _branch("timm/vit_small_patch16_224", file, options=_TINY)


@pytest.mark.parametrize("wrapper", ["state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict", "model"])
def test_moving_averages_are_preferred(wrapper: str, tmp_path: Path) -> None:
    vit = randomise(_branch("timm/vit_small_patch16_224", options=_TINY).backbone)
    other = {} if wrapper in ("model_state_dict", "model") else {"state_dict": {}, "model": {}}
    for value in other.values():
        value |= {f"module.{name}": tensor + 1 for name, tensor in vit.state_dict().items()}
    averaged = {f"module._orig_mod.{name}": tensor for name, tensor in vit.state_dict().items()}
    torch.save(other | {wrapper: averaged, "optimizer": {}, "best": torch.ones(1)}, tmp_path / "vit.pth")
    _assert_loads(tmp_path / "vit.pth", vit)


def _assert_loads(file: Path, vit: nn.Module) -> None:
    loaded, expected = (
        _branch("timm/vit_small_patch16_224", file, options=_TINY).backbone.state_dict(),
        vit.state_dict(),
    )
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_cache_of_open_clip(x: Tensor, tmp_path: Path) -> None:
    clip = _clip("ViT-B-16")
    snapshot = tmp_path / "models--laion--CLIP-ViT-B-16-laion2B-s34B-b88K" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(clip.state_dict(), snapshot / "open_clip_model.safetensors")
    branch = _branch("open_clip/ViT-B-16", tmp_path, options={"embed_dim": PROJECTION, "vision_cfg": VISION})
    torch.testing.assert_close(branch(x)[:, 0], clip.encode_image((x - branch.mean) / branch.std))
    with pytest.raises(
        FileNotFoundError, match=r"expected one of .*models--laion.*fetch-teacher timm/vit_base_patch32"
    ):
        _branch("open_clip/ViT-B-32", tmp_path, options={})


def test_an_open_clip_folder_with_another_activation_is_refused(tmp_path: Path) -> None:
    save_file(_clip("ViT-B-16").state_dict(), tmp_path / "open_clip_model.safetensors")
    config = tmp_path / "open_clip_config.json"
    options = {"embed_dim": PROJECTION, "vision_cfg": VISION}
    for quick, refused in ((False, "ViT-B-16-quickgelu"), (True, "ViT-B-16")):
        config.write_text(json.dumps({"model_cfg": {"embed_dim": PROJECTION, "quick_gelu": quick}}))
        with pytest.raises(ValueError, match=f"take the name {'with' if quick else 'without'} -quickgelu"):
            _branch(f"open_clip/{refused}", tmp_path, options=options)
        accepted = {"ViT-B-16", "ViT-B-16-quickgelu"} - {refused}
        _branch(f"open_clip/{accepted.pop()}", tmp_path, options=options)


@torch.no_grad()
def test_a_bias_of_the_patches_moves_into_the_positions(x: Tensor, tmp_path: Path) -> None:
    state = vit_state(16, 2, clip=True)
    torch.save({"state_dict": state}, tmp_path / "clip.pth")
    branch = _branch("clip_vitb16", tmp_path / "clip.pth")
    vit = branch.backbone
    z = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    expected = torch.cat([state["cls_token"].expand(2, -1, -1), z], 1) + state["pos_embed"]
    torch.testing.assert_close(vit._pos_embed(vit.patch_embed(x)), expected)


@torch.no_grad()
def test_timm_files_load_as_they_are(x: Tensor, tmp_path: Path) -> None:
    for model, projection in (("dino_vitb16", 0), ("clip_vitb16", PROJECTION)):
        backbone = _branch(model).backbone
        theirs = timm.create_model(
            "vit_base_patch16_224" if not projection else "vit_base_patch16_clip_quickgelu_224",
            img_size=32,
            num_classes=projection,
            **{key: value for key, value in OPTIONS.items() if key != "projection"},
        )
        randomise(theirs)
        if projection:
            theirs.head.bias.zero_()
        cache = (
            tmp_path
            / model
            / "hub"
            / f"models--timm--{'vit_base_patch16_224.dino' if not projection else 'vit_base_patch16_clip_224.openai'}"
        )
        for revision in ("old", "new"):
            (cache / "snapshots" / revision).mkdir(parents=True)
            scale = 1.0 if revision == "new" else 2.0
            state = {name: scale * tensor for name, tensor in theirs.state_dict().items()}
            save_file(state, cache / "snapshots" / revision / "model.safetensors")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("new")
        loaded = _branch(model, tmp_path / model).backbone
        assert loaded.state_dict().keys() == backbone.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_other_timm_models_drop_their_classifier(x: Tensor, tmp_path: Path) -> None:
    for model, options in (
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12, "img_size": 32}),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}),
    ):
        theirs = randomise(timm.create_model(model, num_classes=1000, **options))
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        options.pop("img_size", None)
        branch = _branch(f"timm/{model}", tmp_path, options=options)
        expected = theirs.forward_head(theirs.forward_features((x - branch.mean) / branch.std), pre_logits=True)
        torch.testing.assert_close(branch(x)[:, 0], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 12}),
        ("levit_128s", {}),
        ("efficientvit_m0", {}),
        ("repvit_m0_9", {}),
    ],
)
def test_heads_of_any_name_are_dropped(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of distillation, or of a norm before the classifier: what timm's network lacks with ``num_classes=0``."""
    file = tmp_path / "model.pth"
    torch.save(randomise(timm.create_model(model, **options)).state_dict(), file)
    overlay = {"file": str(file)}
    theirs = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    backbone = build_branch(BranchConfig(f"timm/{model}", file, options=options), 224).backbone
    torch.testing.assert_close(dict(backbone.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    torch.save({"other.weight": torch.ones(2), **torch.load(file, weights_only=True)}, file)
    with pytest.raises(ValueError, match=r"1 unexpected \(first: other\.weight\)"):
        build_branch(BranchConfig(f"timm/{model}", file, options=options), 224)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64, 112])
def test_positions_of_timm_models_are_resized_as_timm_does(size: int, tmp_path: Path) -> None:
    """To fewer patches smoothed, to more not; DINO's way is another and stays with its own models."""
    name, options, file = "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12}, tmp_path / "model.pth"
    torch.save(randomise(timm.create_model(name, img_size=64, **options)).state_dict(), file)
    overlay = {"file": str(file)}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size, **options
    ).eval()
    branch = build_branch(BranchConfig(f"timm/{name}", file, options=options), size).eval()
    assert torch.equal(branch.backbone.pos_embed, theirs.pos_embed)
    x = torch.rand(2, 3, size, size)
    torch.testing.assert_close(branch(x)[:, 0], theirs((x - branch.mean) / branch.std))


@torch.no_grad()
def test_transformers_layouts(x: Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="comes with the extra lipsim[tune]")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "image_size": 32}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=4 * WIDTH, layer_norm_eps=1e-6))
    v2 = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=16, layer_norm_eps=1e-6))
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            **sizes, patch_size=16, intermediate_size=4 * WIDTH, projection_dim=PROJECTION, hidden_act="quick_gelu"
        )
    )
    for model, theirs, options in (
        ("dino_vitb16", vit, {}),
        ("timm/vit_base_patch14_dinov2", v2, {"patch_size": 16}),
        ("clip_vitb16", clip, {}),
    ):
        randomise(theirs)
        folder = tmp_path / model.replace("/", "-")
        theirs.save_pretrained(folder)
        feature = "embedding" if model == "clip_vitb16" else "last_layer"
        options = {**OPTIONS, **options}
        if model.startswith("timm"):
            del options["projection"]
        branch = _branch(model, folder, feature, options)
        output = theirs(pixel_values=(x - branch.mean) / branch.std)
        expected = output.image_embeds if feature == "embedding" else output.last_hidden_state[:, 0]
        torch.testing.assert_close(branch(x)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resized_as_in_torch_hub() -> None:
    # The public model's numbers: sampling points at (i + 1/2) · 37/16.1 − 1/2, bicubic with a = −3/4, no antialiasing.
    grid = torch.randn(37, 37, dtype=torch.float64)
    cls = torch.randn(1, 1, 1, dtype=torch.float64)
    resized = resize_positions(torch.cat([cls, grid.reshape(1, -1, 1)], 1), (16, 16))
    assert resized.shape == (1, 257, 1) and resized[0, 0, 0] == cls

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    weights = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(at // 1) - 1, int(at // 1) + 3):
            weights[i, min(max(j, 0), 36)] += kernel(at - j)
    torch.testing.assert_close(resized[0, 1:, 0].reshape(16, 16), weights @ grid @ weights.mT, rtol=1e-5, atol=1e-6)
    same = torch.randn(1, 5, 3)
    assert resize_positions(same, (2, 2)) is same


def test_a_branch_takes_its_file_from_the_folders_of_others(tmp_path: Path) -> None:
    state = backbone_state("dino_vitb16")
    folder = tmp_path / "torch-hub"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(state, folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    loaded = _branch("dino_vitb16", folder).backbone.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
