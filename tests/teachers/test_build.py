"""What the header of a metric says of an encoder describes layers: nothing is read or fetched by it."""

from __future__ import annotations

from typing import Any

import pytest
import timm

from lipsim.teachers.branch import BranchConfig
from lipsim.teachers.build import build_branch


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("timm/resnet18", {"checkpoint_path": "/tmp/weights.pth"}),
        ("timm/resnet18", {"pretrained_cfg": {"file": "weights.pth"}}),
        ("timm/resnet18", {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}),
        ("timm/resnet18", {"cache_dir": "/tmp"}),
        ("timm/hf-hub:somebody/model", {}),
        ("open_clip/hf-hub:somebody/model", {}),
        ("open_clip/local-dir:/tmp", {}),
        ("open_clip/ViT-B-32", {"vision_cfg": {"timm_model_name": "hf-hub:somebody/model"}}),
        ("open_clip/ViT-B-32", {"vision_cfg": {"timm_model_pretrained": True}}),
        ("open_clip/ViT-B-32", {"pretrained_hf": True}),
        ("open_clip/ViT-B-32", {"vision_cfg": {"a": [{"checkpoint_path": "x"}]}}),
    ],
)
def test_nothing_is_read_or_fetched(model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=r"expected (options that describe the layers of|the name of a model)"):
        build_branch(BranchConfig(model, "random", options=options), 32)
