"""Vision towers of open_clip: statistics and activation are those of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from lipsim.teachers import BranchConfig
from lipsim.teachers.branch import RANDOM
from lipsim.teachers.build import build_branch

SMALL = {"vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16}, "embed_dim": 8}


def test_statistics_are_those_of_the_published_weights() -> None:
    small = {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}, "embed_dim": 192}
    branch = build_branch(BranchConfig("open_clip/ViT-B-16-SigLIP", RANDOM, options=small), 32)
    expected = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    for name in ("mean", "std"):
        assert getattr(branch, name).flatten().tolist() == pytest.approx(expected[name])


@pytest.mark.parametrize(
    "name", ["vit_b_32-quickgelu-laion400m_e31-d867053b.pt", "models--timm--vit_base_patch32_clip_224.openai"]
)
def test_weights_of_the_other_activation_are_refused(name: str, tmp_path: Path) -> None:
    tower = build_branch(BranchConfig("open_clip/ViT-B-32-quickgelu", RANDOM, options=SMALL), 32)
    file = tmp_path / name
    if not name.endswith(".pt"):
        file = file / "snapshots" / "abc" / "open_clip_pytorch_model.bin"
        file.parent.mkdir(parents=True)
    torch.save({f"visual.{key}": value for key, value in tower.backbone.state_dict().items()}, file)
    for given, reason in ((file, "asks for QuickGELU; take the name with -quickgelu"), (tmp_path, "no weights of")):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            build_branch(BranchConfig("open_clip/ViT-B-32", given, options=SMALL), 32)
    loaded = build_branch(BranchConfig("open_clip/ViT-B-32-quickgelu", tmp_path, options=SMALL), 32)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), tower(x))


def test_a_description_beside_the_file_decides(tmp_path: Path) -> None:
    tower = build_branch(BranchConfig("open_clip/ViT-B-32", RANDOM, options=SMALL), 32)
    torch.save(tower.backbone.state_dict(), tmp_path / "own.pt")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    described = {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": own}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    loaded = build_branch(BranchConfig("open_clip/ViT-B-32", tmp_path / "own.pt", options=SMALL), 32)
    assert loaded.mean.flatten().tolist() == pytest.approx(own["mean"])
    assert loaded.std.flatten().tolist() == pytest.approx(own["std"])
