"""Models by name: those of the examples exist, and a function of the user's own fails in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from lipsim.analysis.models import load_model
from lipsim.analysis.nullity import nullity
from lipsim.cli.collide import EXAMPLES as COLLIDE
from lipsim.cli.nullity import EXAMPLES as NULLITY
from lipsim.utils.errors import LipsimError

NAMED = {word for line in (*COLLIDE, *NULLITY) for word in shlex.split(line) if "/" in word}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_models_of_the_examples_are_there(name: str) -> None:
    assert nullity(load_model(name).network, name).n > 1


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mynets_of_a_test.py").write_text(
        "import torch\n"
        "def good():\n    net = torch.nn.Flatten()\n    net.image_size = 8\n    return net\n"
        "def failing():\n    raise RuntimeError('no such file of mine')\n"
        "def asking(width):\n    return torch.nn.Identity()\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "mynets_of_a_test"


def test_functions_of_the_users_own(own_module: str) -> None:
    model = load_model(f"{own_module}:good")
    assert isinstance(model.network, nn.Flatten) and model.image_size == 8
    assert model.module(torch.rand(1, 3, 8, 8)).shape == (1, 192)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("failing", LipsimError, r"failing\(\) to return a torch module, but it failed: RuntimeError: no such file of"),
        ("asking", LipsimError, r"asking\(\) to return a torch module, but it failed: TypeError: .*width"),
        ("number", LipsimError, "to return a torch module, got int"),
        ("missing", FileNotFoundError, r"cannot find missing in the Python module .*PYTHONPATH=\."),
    ],
)
def test_what_a_function_does_instead_is_told(own_module: str, function: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        load_model(f"{own_module}:{function}")


def test_models_of_torchvision_have_the_statistics_of_their_weights() -> None:
    """EfficientNetV2-L alone of its classifiers was trained on other ones, and on larger images."""
    large = load_model("torchvision/efficientnet_v2_l")
    assert large.image_size == 480
    assert [t.flatten().tolist() for t in (large.module.mean, large.module.std)] == [[0.5] * 3] * 2
    small = load_model("torchvision/resnet18")
    usual = {"efficientnet_b1": 240, "efficientnet_v2_s": 384, "swin_v2_t": 256, "inception_v3": 299, "vit_h_14": 224}
    for name, size in usual.items():
        with torch.device("meta"):  # no weights of hundreds of megabytes
            assert load_model(f"torchvision/{name}").image_size == size
    assert small.image_size == 224 and small.module.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
