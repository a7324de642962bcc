"""Small random weight folders in the public layouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lipsim.teachers.catalogue import VARIANTS

State = dict[str, Tensor]
WIDTH, DEPTH, PROJECTION, RANK, ALPHA = 24, 2, 12, 4, 8
OPTIONS = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "projection": PROJECTION}


def randomise(module: nn.Module) -> nn.Module:
    """Random parameters that leave no part of a network without effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.mean() == 1))
    return module.eval()


def vit_state(patch_size: int, side: int, layer_scale: bool = False, clip: bool = False) -> State:
    """Random weights of a ViT by the names of DINO, which DreamSim's files have as well, its CLIPs included."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for block in (f"blocks.{i}." for i in range(DEPTH)):
        shapes |= {f"{block}{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for layer, (rows, columns) in layers.items():
            shapes[f"{block}{layer}.weight"], shapes[f"{block}{layer}.bias"] = (
                (rows * WIDTH, columns * WIDTH),
                (rows * WIDTH,),
            )
        shapes |= {f"{block}ls{k}.gamma": (WIDTH,) for k in (1, 2) if layer_scale}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"mask_token": (1, WIDTH)} if layer_scale else {}
    shapes |= {"pos_drop.weight": (WIDTH,), "pos_drop.bias": (WIDTH,), "proj": (WIDTH, PROJECTION)} if clip else {}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def adapter(branches: int, scale: float = 0.2) -> State:
    """Random factors on all qkv layers, by the names of DreamSim's adapters."""
    factors = {}
    for number in range(branches):
        for i in range(DEPTH):
            layer = f"base_model.model.extractor_list.{number}.model.blocks.{i}.attn.qkv"
            factors[f"{layer}.lora_A.weight"] = scale * torch.randn(RANK, WIDTH)
            factors[f"{layer}.lora_B.weight"] = scale * torch.randn(3 * WIDTH, RANK)
    return factors


def write_adapter(folder: Path, factors: State, safe: bool = True, **options: object) -> None:
    """An adapter folder as peft leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if safe:
        save_file(factors, folder / "adapter_model.safetensors")
    else:
        torch.save(factors, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["qkv"], **options}))


def write_backbone(folder: Path, name: str, state: State) -> None:
    """A backbone as DreamSim's zip files have it."""
    if name == "dino_vitb16":  # a training checkpoint
        teacher = {f"backbone.{key}": value for key, value in state.items()} | {
            "head.last_layer.weight": torch.ones(2, 2)
        }
        student = {f"module.{key}": value + 1 for key, value in teacher.items()}
        torch.save({"student": student, "teacher": teacher, "epoch": 400}, folder / "dino_vitb16_pretrain.pth")
    elif name == "dinov2_vitb14":
        torch.save(state, folder / "dinov2_vitb14_pretrain.pth")
    elif name == "synclr_vitb16":
        torch.save({"model": {f"module.visual.{k}": v for k, v in state.items()}}, folder / "synclr_vit_b_16.pth")
    else:
        torch.save({"state_dict": state}, folder / f"{name}_pretrain.pth.tar")


def backbone_state(name: str) -> State:
    """Random weights of a backbone for images of 32 pixels (28 for DINOv2, whose file has 6 × 6 positions)."""
    if name == "dinov2_vitb14":
        return vit_state(14, 6, layer_scale=True)
    return vit_state(32 if name.endswith("32") else 16, 1 if name.endswith("32") else 2, clip="clip" in name)


def write_variant(folder: Path, variant: str, safe: bool = True) -> Path:
    """The folder of a variant, in the layout of its zip file."""
    folder.mkdir(parents=True)
    published = VARIANTS[variant]
    for name in published.branches:
        write_backbone(folder, name, backbone_state(name))
    write_adapter(folder / published.adapter, adapter(len(published.branches)), safe)
    return folder
