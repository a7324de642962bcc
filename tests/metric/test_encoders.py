"""Encoders that files name: which, what a header says of them, and what it cannot make anybody build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lipsim
from lipsim import PerceptualMetric
from lipsim.layers import OrthogonalLinear
from lipsim.layers.encoder import BoundedEncoder, Encoder
from lipsim.metric import encoders, register_encoder, save
from lipsim.metric.encoders import encoder_class, registered_names
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork, TorchlipNetwork
from lipsim.teachers import BranchConfig, DreamSim, Ensemble, SmallViT

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_registered", {})


def _flat() -> type[nn.Module]:
    class Flat(nn.Sequential):
        def __init__(self, image_size: int, out_features: int = 8, offsets: tuple[float, ...] = (0.5,)) -> None:
            super().__init__(nn.Flatten(), OrthogonalLinear(3 * image_size**2, out_features))
            self.image_size, self.out_features = image_size, out_features

    return Flat


@pytest.mark.usefixtures("registry")
def test_a_registered_class_survives_a_file(tmp_path: Path) -> None:
    flat = register_encoder(_flat())
    metric = PerceptualMetric(flat(8), 8).eval()
    path = save(metric, tmp_path / "m.safetensors")
    loaded = lipsim.load(path)
    assert type(loaded.encoder) is flat
    assert isinstance(loaded.encoder, Encoder) and not isinstance(loaded.encoder, BoundedEncoder)
    assert loaded.encoder.config == {"image_size": 8, "out_features": 8, "offsets": [0.5]}
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded.embed(x), metric.embed(x), rtol=0, atol=0)


@pytest.mark.usefixtures("registry")
def test_only_registered_names_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = register_encoder(name="lab.Flat")(_flat())
    path = save(PerceptualMetric(flat(8), 8), tmp_path / "m.safetensors")
    with safe_open(path, framework="pt") as archive:
        assert json.loads(archive.metadata()["metric"])["encoder"] == "lab.Flat"
    monkeypatch.setattr(encoders, "_registered", {})
    with pytest.raises(ValueError, match=r"names the encoder lab\.Flat, .*import the module that registers it"):
        lipsim.load(path)
    for name in ("torch.nn.Linear", "os.system", ["SLLNetwork"], None):
        _rewrite(path, tmp_path / "other.safetensors", encoder=name)
        with pytest.raises(ValueError, match="names the encoder"):
            lipsim.load(tmp_path / "other.safetensors")


@pytest.mark.usefixtures("registry")
def test_names_are_those_of_one_class() -> None:
    flat = register_encoder(_flat())
    again = register_encoder(_flat())  # the same cell of a notebook, run twice
    assert encoder_class("Flat") is again is not flat
    assert registered_names()[-1] == "Flat"

    class Other(nn.Module): ...

    for name in ("Flat", "SLLNetwork"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register_encoder(name=name)(Other)
    with pytest.raises(ValueError, match="by position"):
        register_encoder(Other)  # takes whatever nn.Module takes


@pytest.mark.usefixtures("registry")
def test_a_subclass_is_another_class(tmp_path: Path) -> None:
    class Derived(register_encoder(_flat())):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match=r"class Derived; known are .*SLLNetwork, .*register_encoder"):
        save(PerceptualMetric(Derived(8), 8, lipschitz=1.0), tmp_path / "m.safetensors")


def test_the_header_of_the_bundled_metric_is_what_its_class_records() -> None:
    path = Path(__file__).parents[2] / "checkpoints" / "quickstart.safetensors"
    with safe_open(path, framework="pt") as archive:
        header = json.loads(archive.metadata()["metric"])
    encoder = encoder_class(header["encoder"])(**header["config"])
    assert isinstance(encoder, Encoder)
    assert json.dumps(encoder.config) == json.dumps(header["config"])


def test_all_our_encoders_say_what_they_were_made_with() -> None:
    branch = BranchConfig("dino_vitb16", "random", options=TINY)
    plain = {"model": "dino_vitb16", "weights": "random", "feature": None, "options": TINY}
    plain |= {"layers": [], "input_size": None}
    dreamsim = DreamSim("dino_vitb16", "random", 32, options=TINY)
    for encoder, first, rest in (
        (OrthogonalProjection(8, 4), {"image_size": 8, "out_features": 4}, ""),
        (OrthogonalShiftNetwork(16, 8), {"image_size": 16, "out_features": 8, "grid": 8}, "widths depths linear_depth"),
        (SLLNetwork(16, 8, 20, 1, 1, 4), {"image_size": 16, "out_features": 8, "channels": 20}, "depth conv_width"),
        (TorchlipNetwork(16, 8), {"image_size": 16, "out_features": 8, "blocks": [4, 2, 2]}, "depths widths"),
        (SmallViT(32, width=32), {"image_size": 32, "patch_size": 16, "width": 32}, "depth heads pool"),
        (Ensemble((branch,), 32), {"branches": [plain], "image_size": 32, "head": 0}, ""),
        (dreamsim, {"variant": "dino_vitb16", "weights": "random", "image_size": 32}, "adapter head options"),
    ):
        assert isinstance(encoder, Encoder)
        assert dict(list(encoder.config.items())[: len(first)]) == first
        assert set(rest.split()) <= encoder.config.keys()
        assert type(encoder)(**json.loads(json.dumps(encoder.config))).config == encoder.config
    assert DreamSim("dino_vitb16", "random", 32, options=TINY).config["options"] == TINY


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**30},
        {"linear_depth": 10**7},
        {"linear_width": 10**9},
        {"conv_width": 10**30},
        {"channels": 10**8},
        {"image_size": 10**7},
    ],
    ids=str,
)
def test_a_header_cannot_ask_for_more_than_the_file_has(tmp_path: Path, change: dict[str, int]) -> None:
    encoder = SLLNetwork(16, 8, 20, 1, 1, 4)
    path = save(PerceptualMetric(encoder, 16), tmp_path / "m.safetensors")
    _rewrite(path, path, config=encoder.config | change, **{k: v for k, v in change.items() if k == "image_size"})
    with pytest.raises(ValueError, match=r"asks for .* far more than the file has$") as caught:
        lipsim.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"depth": 10**30}, {"depth": 10**10}, {"image_size": 16 * 10**5}], ids=str)
def test_nor_can_that_of_a_teacher(tmp_path: Path, change: dict[str, int]) -> None:
    encoder = SmallViT(32, width=32, depth=1)
    path = save(PerceptualMetric(encoder, 32, lipschitz=float("inf")), tmp_path / "m.safetensors")
    _rewrite(path, path, config=encoder.config | change, **{k: v for k, v in change.items() if k == "image_size"})
    with pytest.raises(ValueError, match=r"asks for .* far more than the file has$"):
        lipsim.load(path)


def test_a_header_names_no_other_file(tmp_path: Path) -> None:
    """The weights of a metric are in its file; what a stranger's header names is not opened."""
    teacher = Ensemble([BranchConfig("vit_tiny_patch16_224", weights="random")], image_size=32)
    save(PerceptualMetric(teacher, 32, lipschitz=float("inf")), tmp_path / "teacher.safetensors")
    branches = [{**teacher.config["branches"][0], "weights": str(tmp_path / "other.pth")}]
    _rewrite(
        tmp_path / "teacher.safetensors",
        tmp_path / "changed.safetensors",
        config=teacher.config | {"branches": branches},
    )
    with pytest.raises(ValueError, match="names a weight file"):
        lipsim.load(tmp_path / "changed.safetensors")


def test_arguments_that_no_header_holds_are_named(tmp_path: Path, registry: None) -> None:
    @register_encoder
    class Weighted(nn.Flatten):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()

    metric = PerceptualMetric(Weighted(torch.ones(2)), 16, lipschitz=1.0)
    with pytest.raises(ValueError, match="cannot export Weighted: the arguments of its constructor are kept as JSON"):
        save(metric, tmp_path / "metric.safetensors")


def _rewrite(source: Path, target: Path, **changes: Any) -> None:
    with safe_open(source, framework="pt") as archive:
        metadata = archive.metadata()
        state = {name: archive.get_tensor(name) for name in archive.keys()}
    header = json.loads(metadata["metric"]) | changes
    save_file(state, target, metadata=metadata | {"metric": json.dumps(header)})
