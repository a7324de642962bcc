"""DreamSim's variants from folders in the public layout, against the same steps by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from public_layouts import ALPHA, DEPTH, OPTIONS, PROJECTION, RANK, WIDTH, State, write_variant
from torch import Tensor
from torch.nn import functional as F

from lipsim import PerceptualMetric
from lipsim.metric import load, save
from lipsim.teachers import BranchConfig, DreamSim, Ensemble
from lipsim.teachers.catalogue import BACKBONES, VARIANTS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _size(variant: str) -> int:
    return 28 if "v2" in variant else 32


def _tokens(state: State, x: Tensor, eps: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """A plain float64 vision transformer up to its last block, ``(N, T, D)``, by the names of DINO."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(z: Tensor, name: str) -> Tensor:
        return F.layer_norm(z, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(z: Tensor, name: str) -> Tensor:
        return z @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    patch = w["patch_embed.proj.weight"]
    z = F.conv2d(x, patch, w["patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).mT
    z = torch.cat([w["cls_token"].expand(len(z), -1, -1), z], 1) + w["pos_embed"]
    z = norm(z, "pos_drop") if "pos_drop.weight" in w else z
    for i in range(DEPTH):
        q, k, v = (
            linear(norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
            .unflatten(-1, (3, 2, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = (q @ k.mT / math.sqrt(WIDTH / 2)).softmax(-1) @ v
        y = linear(mixed.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        z = z + y * w.get(f"blocks.{i}.ls1.gamma", torch.ones(()))
        y = linear(activation(linear(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        z = z + y * w.get(f"blocks.{i}.ls2.gamma", torch.ones(()))
    return z


def _merged(state: State, factors: State, number: int) -> State:
    state = dict(state)
    for i in range(DEPTH):
        layer = f"base_model.model.extractor_list.{number}.model.blocks.{i}.attn.qkv"
        delta = ALPHA / RANK * factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        state[f"blocks.{i}.attn.qkv.weight"] = state[f"blocks.{i}.attn.qkv.weight"] + delta
    return state


def _feature(name: str, state: State, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (OPENAI if "clip" in name else IMAGENET))
    x = (x.double() - mean) / std
    if "clip" not in name:
        return _tokens(state, x, 1e-6, F.gelu)
    quick = not name.startswith("open_clip")
    z = _tokens(state, x, 1e-5, (lambda t: t * torch.sigmoid(1.702 * t)) if quick else F.gelu)[:, :1]
    z = F.layer_norm(z, (WIDTH,), state["norm.weight"].double(), state["norm.bias"].double(), 1e-5)
    return z @ state["proj"].double()


def _files(folder: Path, variant: str) -> tuple[dict[str, State], State]:
    names = {
        "dino_vitb16": (
            "dino_vitb16_pretrain.pth",
            lambda d: {k[9:]: v for k, v in d["teacher"].items() if k[:5] == "backb"},
        ),
        "dinov2_vitb14": ("dinov2_vitb14_pretrain.pth", lambda d: d),
        "synclr_vitb16": ("synclr_vit_b_16.pth", lambda d: {k[14:]: v for k, v in d["model"].items()}),
    }
    states = {}
    for name in VARIANTS[variant].branches:
        file, unwrap = names.get(name, (f"{name}_pretrain.pth.tar", lambda d: d["state_dict"]))
        states[name] = unwrap(torch.load(folder / file, weights_only=True))
    return states, torch.load(folder / VARIANTS[variant].adapter / "adapter_model.bin", weights_only=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_same_steps_by_hand(variant: str, tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "dreamsim", variant, safe=False)
    teacher = DreamSim(variant, folder, image_size=_size(variant), options=OPTIONS).eval()
    x = torch.rand(3, 3, _size(variant), _size(variant))
    states, factors = _files(folder, variant)
    features = []
    for number, (name, state) in enumerate(states.items()):
        state = _merged(state, factors, number)
        if name == "dinov2_vitb14":  # 6 × 6 positions on 2 × 2 patches, as torch.hub's model resizes them
            grid = state["pos_embed"][:, 1:].reshape(1, 6, 6, WIDTH).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, scale_factor=(2.1 / 6, 2.1 / 6), mode="bicubic")
            state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).mT], 1)
        features.append(_feature(name, state, x))
    dense = variant.endswith("_patch")
    z = torch.cat(features, -1) if dense else torch.cat([f[:, :1] for f in features], -1)
    z = z - z.mean(-1, keepdim=True)
    z = z / z.norm(dim=-1, keepdim=True)
    if dense:
        z = torch.cat([z[:, :1], z[:, 1:].mean(1, keepdim=True)], -1)
        z = z / z.norm(dim=-1, keepdim=True)
    expected = z[:, 0].float()
    assert teacher.out_features == expected.shape[1] == (48 if dense or variant == "ensemble" else expected.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(teacher.embed(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(teacher(x), teacher.embed(x))


def test_an_exported_teacher_needs_no_weight_files(tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "dreamsim", "ensemble")
    teacher = DreamSim("ensemble", folder, image_size=32, options=OPTIONS, head=6).eval()
    metric = PerceptualMetric(teacher, 32, anchor=0.0, lipschitz=math.inf, resize=teacher.resize)
    file = save(metric, tmp_path / "teacher.safetensors")
    for path in folder.rglob("*.*"):
        path.unlink()
    x, y = torch.rand(2, 3, 3, 32, 32)
    loaded = load(file)
    assert isinstance(loaded.encoder, DreamSim) and loaded.preprocess.resize == "pil"
    with torch.no_grad():
        assert torch.equal(loaded(x, y), metric(x, y))
        # DreamSim's distance: 1 − cosine of the embeddings.
        cosine = F.cosine_similarity(teacher(x).double(), teacher(y).double())
        torch.testing.assert_close(loaded(x, y).double(), 1 - cosine, rtol=1e-4, atol=1e-6)


def test_ensembles_of_other_models_are_exported_as_well(tmp_path: Path) -> None:
    branches = [
        BranchConfig("timm/vit_tiny_patch16_224", "random", options={"depth": 1, "embed_dim": 12}),
        BranchConfig("timm/convnext_atto", "random", options={"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}),
        BranchConfig(
            "open_clip/ViT-B-16", "random", options={"embed_dim": 6, "vision_cfg": {"layers": 1, "width": 64}}
        ),
    ]
    teacher = Ensemble(branches, image_size=32).eval()
    assert teacher.out_features == 12 + 10 + 6
    metric = PerceptualMetric(teacher, 32, anchor=0.0, lipschitz=math.inf)
    loaded = load(save(metric, tmp_path / "teacher.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(x), teacher(x))  # frozen weights take another path in torch


def test_without_its_adapter_a_teacher_has_the_backbones_alone(tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "dreamsim", "clip_vitb32")
    with_adapter, without = (
        DreamSim("clip_vitb32", folder, 32, adapter=adapter, options=OPTIONS) for adapter in (True, False)
    )
    saved = torch.load(folder / "clip_vitb32_pretrain.pth.tar", weights_only=True)["state_dict"]
    name = "branches.0.backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(without.state_dict()[name], saved["blocks.1.attn.qkv.weight"])
    assert not torch.equal(with_adapter.state_dict()[name], saved["blocks.1.attn.qkv.weight"])


def test_the_geometry_stays_in_float32_under_autocast() -> None:
    teacher = DreamSim("ensemble", "random", 32, options=OPTIONS).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = teacher(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(z, teacher(x), rtol=0, atol=0.02)


def test_a_teacher_in_half_precision_has_a_head() -> None:
    teacher = DreamSim("dino_vitb16", "random", 32, options=OPTIONS, head=8).eval()
    torch.nn.init.normal_(teacher.head.fc2.weight, std=0.1)  # type: ignore[union-attr]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher(x)
        z = teacher.bfloat16()(x.bfloat16())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        teacher = Ensemble([BranchConfig(name, "random")])
    size = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    if name.startswith("efficientnet_lite"):  # without the classifier of 1,000 classes
        assert size + 1.281 == pytest.approx({"0": 4.652, "1": 5.417, "2": 6.092}[name[-1]], rel=1e-3)
        assert teacher.out_features == 1280
        return
    expected = {"s": 21.6, "b": 86.0, "l": 303.9}[name.split("vit")[1][0]]
    assert size == pytest.approx(expected, rel=0.03)
    embeds = {"s": 384, "b": 512 if "clip" in name else 768, "l": 768}
    assert teacher.out_features == embeds[name.split("vit")[1][0]]


def test_the_head_starts_as_the_identity() -> None:
    torch.manual_seed(1)
    plain = DreamSim("ensemble", "random", 32, options=OPTIONS)
    torch.manual_seed(1)
    headed = DreamSim("ensemble", "random", 32, options=OPTIONS, head=8)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), headed(x))
    headed.head.fc2.weight.data.normal_()  # type: ignore[union-attr]
    assert not torch.allclose(plain(x), headed(x), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DreamSim("nope", "random"), "expected a variant out of ensemble, dino_vitb16"),
        (lambda: Ensemble([]), "at least one branch"),
        (lambda: Ensemble([BranchConfig("vit", "random")]), "timm/NAME or open_clip/NAME, got vit"),
        (lambda: Ensemble([BranchConfig("timm/vit", "random")]), "timm has no model vit; timm.list_models"),
        (lambda: Ensemble([BranchConfig("open_clip/vit", "random")]), "open_clip has no model vit"),
        (lambda: Ensemble([BranchConfig("open_clip/ViT-B-32", "random", "cls")]), "expected the feature 'embedding'"),
        (lambda: Ensemble([BranchConfig("open_clip/ViT-B-32", "random", layers=(1,))]), "expected no layers of open_c"),
        (lambda: Ensemble([BranchConfig("dino_vitb16", "random", "embedding")]), "dino_vitb16 has no projection"),
        (lambda: Ensemble([BranchConfig("timm/convnext_atto", "random", "cls")]), "has no class token"),
        (
            lambda: Ensemble([BranchConfig("mae_vitb16", "random", options={"depht": 2})]),
            "cannot build mae_vitb16 with",
        ),
        (
            lambda: Ensemble(
                [
                    BranchConfig("mae_vitb16", "random", "cls_patch", options=OPTIONS),
                    BranchConfig("mae_vitb16", "random", options=OPTIONS),
                ]
            ),
            "'cls_patch' of all branches or of none",
        ),
        (
            lambda: DreamSim("ensemble", "random", 32, options=OPTIONS)(torch.rand(1, 3, 40, 32)),
            r"\(N, 3, 32, 32\), got",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_projection_widths() -> None:
    assert DreamSim("ensemble", "random", 32, options=OPTIONS).out_features == WIDTH + 2 * PROJECTION
