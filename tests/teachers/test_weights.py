"""Weight files that are missing, damaged, dangerous or of another network are refused by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from public_layouts import ALPHA, DEPTH, OPTIONS, RANK, WIDTH, vit_state, write_adapter, write_variant
from safetensors.torch import save_file
from torch import nn

from lipsim.teachers import BranchConfig, DreamSim, Ensemble
from lipsim.teachers.lora import merge_adapter
from lipsim.teachers.lora_tuning import merged
from lipsim.utils.weights import load_weights, read_checkpoint

CLIP = "clip_vitb16_pretrain.pth.tar"


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / CLIP).unlink(), FileNotFoundError, f"no weights of clip_vitb16 in .*expected one of {CLIP}"),
        (lambda f: (f / "ensemble_lora" / "adapter_model.safetensors").unlink(), FileNotFoundError, "got neither"),
        (lambda f: (f / "ensemble_lora" / "adapter_config.json").unlink(), FileNotFoundError, "no adapter_config.json"),
        (lambda f: _halve(f / CLIP), ValueError, f"cannot read .*{CLIP}: it is truncated"),
        (lambda f: _halve(f / "ensemble_lora" / "adapter_model.safetensors"), ValueError, "safetensors .*truncated"),
        (lambda f: (f / CLIP).write_text("404: Not Found"), ValueError, f"cannot read .*{CLIP}"),
        (
            lambda f: _edit(f / CLIP, lambda c: c["state_dict"].update({"proj": torch.zeros(WIDTH, 5)})),
            ValueError,
            rf"{CLIP} do not fit .*: 1 of another shape \(first: head.weight \(5, 24\) instead of \(12, 24\)",
        ),
        (
            lambda f: _edit(f / CLIP, lambda c: c["state_dict"].pop("blocks.1.norm2.bias")),
            ValueError,
            r"1 missing \(first: blocks.1.norm2.bias\).*fetch-teacher",
        ),
        (
            lambda f: _edit(f / CLIP, lambda c: c["state_dict"].update({"blocks.2.norm1.bias": torch.zeros(WIDTH)})),
            ValueError,
            r"1 unexpected \(first: blocks.2.norm1.bias\)",
        ),
        (
            lambda f: _edit(f / "dino_vitb16_pretrain.pth", lambda c: c.pop("teacher")),
            ValueError,
            "expected tensors by name in .*dino_vitb16_pretrain.pth, got student, epoch.*dino_vitbase16_pretrain.pth",
        ),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], object], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_variant(tmp_path / "weights", "ensemble")
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        DreamSim("ensemble", folder, 32, options=OPTIONS)
    assert "fetch-teacher" in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"fetch-teacher dinov2_vitb14 .*v0.2.1-checkpoints/dreamsim_dinov2_vitb14"
    ):
        DreamSim("dinov2_vitb14", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"fetch-teacher timm/vit_base_patch16_clip_224.openai"):
        Ensemble([BranchConfig("clip_vitb16", weights=tmp_path / "nothing")])


class _Command:
    def __reduce__(self) -> Any:
        return print, ("code of the file runs",)


def test_nothing_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.pth"
    torch.save({"model": torch.ones(1), "other": _Command()}, file)
    with pytest.raises(ValueError, match="needs more than tensors"):
        read_checkpoint(file)
    assert "runs" not in capsys.readouterr().out
    # Arguments of a training run are no code.
    torch.save({"model": torch.ones(1), "args": argparse.Namespace(epochs=3)}, file)
    assert torch.equal(read_checkpoint(file)["model"], torch.ones(1))
    torch.save([torch.ones(1)], file)
    with pytest.raises(ValueError, match=r"expected a mapping of names to tensors .* got list"):
        read_checkpoint(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match=r"ViT-B-16.pt is a TorchScript archive.*safetensors"):
        read_checkpoint(tmp_path / "ViT-B-16.pt")


def test_load_weights_names_the_first_of_each_fault() -> None:
    state = {"weight": torch.zeros(3, 2), "scale": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"1 missing \(first: bias\); 1 unexpected \(first: scale\); 1 of another shape"
    ):
        load_weights(nn.Linear(2, 2), state, "file.pth")


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    save_file({"layer4.weight": torch.ones(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(
        ValueError, match=r"resnet.safetensors is no vision transformer in a known layout.*layer4.weight"
    ):
        Ensemble([BranchConfig("mae_vitb16", weights=tmp_path / "resnet.safetensors", options=OPTIONS)], 32)


def test_another_open_clip_tower_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "open_clip_model.safetensors"
    save_file({"visual.conv1.weight": torch.ones(2), "visual.bn1.weight": torch.ones(2)}, file)  # a ResNet
    with pytest.raises(
        ValueError, match=r"do not fit VisionTransformer: \d+ missing \(first: blocks.0.attn.*fetch-teacher"
    ):
        Ensemble([BranchConfig("clip_vitb16", weights=file, options=OPTIONS)], 32)


def test_a_cache_with_two_candidates_asks_which(tmp_path: Path) -> None:
    for repository in ("timm/vit_base_patch16_224.dino", "facebook/dino-vitb16"):
        snapshot = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        save_file(vit_state(16, 2), snapshot / "model.safetensors")
    with pytest.raises(ValueError, match="in 2 places; give one of the files"):
        Ensemble([BranchConfig("dino_vitb16", weights=tmp_path, options=OPTIONS)], 32)


def _network() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(6, 9)}) for _ in range(3))})


def _factors(layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    names = [f"base_model.model.blocks.{i}.qkv.lora_" for i in layers]
    return {f"{n}A.weight": torch.randn(RANK, 6) for n in names} | {f"{n}B.weight": torch.randn(9, RANK) for n in names}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"target_modules": r".*\.[12]\.qkv"}, {"layers_to_transform": [0, 2]}]
)
def test_factors_are_added_with_their_scale(safe: bool, options: dict[str, Any], tmp_path: Path) -> None:
    network = _network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layers = (1, 2) if "target_modules" in options else tuple(options.get("layers_to_transform", (0, 1, 2)))
    factors = _factors(layers)
    write_adapter(tmp_path, factors, safe, **options)
    merge_adapter(dict(network.named_modules()), tmp_path, "get it")
    scale = ALPHA / RANK ** (0.5 if "use_rslora" in options else 1)
    for name, tensor in network.state_dict().items():
        a, b = (factors.get(f"base_model.model.{name.removesuffix('weight')}lora_{k}.weight") for k in "AB")
        expected = before[name] if a is None or b is None else before[name] + scale * b @ a
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_wrappers_around_factors_are_taken_off(prefix: str, tmp_path: Path) -> None:
    network, wrapped = _network(), _network()
    wrapped.load_state_dict(network.state_dict())
    factors = _factors()
    write_adapter(tmp_path / "plain", factors)
    write_adapter(tmp_path / "wrapped", {f"{prefix}{name}": tensor for name, tensor in factors.items()})
    merge_adapter(dict(network.named_modules()), tmp_path / "plain", "get it")
    merge_adapter(dict(wrapped.named_modules()), tmp_path / "wrapped", "get it")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[name], tensor, rtol=0, atol=0)


def _without(factors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in factors.items() if name not in key}


@pytest.mark.parametrize(
    ("factors", "options", "message"),
    [
        (lambda: _factors((0, 2)), {}, "no factors for 1 of 3 targets .first: blocks.1.qkv"),
        (lambda: _factors((0, 1, 2, 3)), {}, "blocks.3.qkv .* no such linear layer"),
        (lambda: _without(_factors(), "1.qkv.lora_B"), {}, "blocks.1.qkv .* only lora_A"),
        (_factors, {"r": 5}, r"expected lora_A of blocks.0.qkv .* with shape \(5, 6\), got \(4, 6\)"),
        (_factors, {"use_dora": True}, "use_dora, which plain LoRA does not have"),
        (_factors, {"bias": "all"}, "bias, which plain LoRA does not have"),
        (_factors, {"peft_type": "IA3"}, "an IA3 adapter|a IA3 adapter"),
        (_factors, {"target_modules": ["nothing"]}, "no linear layer .* is a target"),
        (_factors, {"r": 0}, "its rank is 0"),
        (lambda: {**_factors(), "classifier.weight": torch.ones(2)}, {}, "classifier.weight in .* no factor of a LoRA"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    factors: Callable[[], dict[str, torch.Tensor]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, factors(), **options)
    with pytest.raises(ValueError, match=message):
        merge_adapter(dict(_network().named_modules()), tmp_path, "get it")


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, _factors())
    for text, message in (("{", "cannot use"), (json.dumps({"r": 4}), "no 'target_modules'"), ("[]", "cannot use")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{message}.*get it"):
            merge_adapter(dict(_network().named_modules()), tmp_path, "get it")


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_merged_adapters_equal_peft(safe: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="comes with the extra lipsim[tune]")
    folder = write_variant(tmp_path / "weights", "ensemble")
    base = DreamSim("ensemble", folder, 32, adapter=False, options=OPTIONS).eval()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    x = torch.rand(3, 3, 32, 32)
    before = base(x)
    original = nn.Module()  # with the names that DreamSim's package gives
    original.extractor_list = nn.ModuleList(nn.ModuleDict({"model": branch.backbone}) for branch in base.branches)
    config = peft.LoraConfig(r=16, lora_alpha=8, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    model = peft.get_peft_model(original, config).eval()  # puts its layers into the backbones
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = base(x)
    assert (expected - before).abs().max() > 0.01
    for path in (folder / "ensemble_lora").iterdir():
        path.unlink()
    model.save_pretrained(folder / "ensemble_lora", safe_serialization=safe)
    assert (folder / "ensemble_lora" / f"adapter_model.{'safetensors' if safe else 'bin'}").is_file()

    loaded = DreamSim("ensemble", folder, 32, options=OPTIONS).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
    changed = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert len(changed) == 3 * DEPTH and all(name.endswith("attn.qkv.weight") for name in changed)
    copy = merged(base)
    assert copy.state_dict().keys() == plain.keys() and merged(copy) is copy
    torch.testing.assert_close(copy(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(base(x), expected, rtol=0, atol=0)
