"""LPIPS and DISTS against torchmetrics', with backbones of random weights; MS-SSIM on small images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import dists as torchmetrics_dists
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet, vgg16

from lipsim.attacks import DistanceObjective, pgd
from lipsim.metric.deep_distances import DISTS, FILES, LPIPS, Net
from lipsim.metric.distances import ms_ssim

# torchmetrics reads a module constant of torch.load that warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.load")


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(3, 3, 64, 64)
    return x, (x + 0.2 * torch.randn_like(x)).clamp(0, 1)


def _weights(folder: Path, net: Net) -> torch.nn.Module:
    with torch.device("meta"):  # the classifiers, which nobody needs, take seconds to initialise and to write
        network = (alexnet if net == "alex" else vgg16)(weights=None)
    for layer in network.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.to_empty(device="cpu").reset_parameters()
    state = {f"features.{name}": tensor for name, tensor in network.features.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / FILES[net])
    return network


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_is_torchmetrics(net: Net, tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    network = _weights(tmp_path, net)
    theirs = _LPIPS(net=net, pnet_rand=True)
    for part in range(1, 6):
        for i, layer in getattr(theirs.net, f"slice{part}").named_children():
            if layer.state_dict():
                layer.load_state_dict(network.features[int(i)].state_dict())
    ours = LPIPS(net, tmp_path)
    expected = theirs(*images, normalize=True).flatten()
    torch.testing.assert_close(ours(*images), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(ours(images[0], images[0]), torch.zeros(3))
    x, y = images
    for pair in ((x[:1], y), (y, x[:1])):  # one image is compared with all
        torch.testing.assert_close(ours(*pair), ours(x[:1].expand_as(y), y))
    with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 2 and 3"):
        ours(x[:2], y)
    x_adv = pgd(DistanceObjective(ours, images[0]), images[0], eps=1.0, steps=3)
    assert (ours(x_adv, images[0]) > 1e-4).all()


@pytest.mark.parametrize("net", ["alex", "dists"])
def test_convolutions_compute_pixel_by_pixel_on_processors(net: str, tmp_path: Path) -> None:
    _weights(tmp_path, "vgg" if net == "dists" else "alex")
    distance = DISTS(tmp_path) if net == "dists" else LPIPS("alex", tmp_path)
    seen: list[Tensor] = []
    distance.layers[-2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    distance(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
    assert seen[0].shape[2] > 1 and seen[0].is_contiguous(memory_format=torch.channels_last)


def test_dists_is_torchmetrics(tmp_path: Path, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    network = _weights(tmp_path, "vgg")
    monkeypatch.setattr(torchmetrics_dists, "vgg16", lambda weights: network)
    expected = torchmetrics_dists.DISTSNetwork()(*images)
    ours = DISTS(tmp_path / FILES["vgg"])
    torch.testing.assert_close(ours(*images), expected, rtol=1e-4, atol=1e-6)
    x, y = images
    torch.testing.assert_close(ours(x[:1], y), ours(x[:1].expand_as(y), y))
    with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 2 and 3"):
        ours(x[:2], y)


def test_dists_of_flat_images_keeps_its_digits(tmp_path: Path) -> None:
    """In float32 as in float64, where the published order of the covariance has lost all of them."""
    _weights(tmp_path, "vgg")
    distance = DISTS(tmp_path)
    flat = torch.full((2, 3, 64, 64), 0.6)
    flat[1, 1] = 0.3
    other = (flat + 1e-3 * torch.randn_like(flat)).clamp(0, 1)
    for x, y in ((flat, flat), (flat, other), (flat, flat.flip(0))):
        expected = distance.double()(x.double(), y.double())
        torch.testing.assert_close(distance.float()(x, y).double(), expected, rtol=1e-3, atol=1e-5)


def _numbered(make: Callable[..., torch.nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """Weights by a formula, in place of a file: cosines of their position, with the first activations of that scale."""
    with torch.device("meta"):  # as above
        features = make(weights=None).features
    state = {}
    for number, (name, parameter) in enumerate(features.named_parameters()):
        wave = torch.cos(1.7 * torch.arange(parameter.numel(), dtype=torch.float64) + number).view(parameter.shape)
        gain = 0.02 * scale if parameter.ndim == 1 else 1.4 * (2 / parameter[0].numel()) ** 0.5
        state[f"features.{name}"] = (wave * gain * (scale if number == 0 else 1)).float()
    return state


def _numbered_images(size: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(2 * 3 * size**2).view(2, 3, size, size)
    return ((7 * n * n + 37 * n) % 251).double() / 250, ((5 * n * n + 91 * n + 13) % 251).double() / 250


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, [0.13922796077846794, 0.14463093389364864]),
        (1e-3, [0.13922804497129665, 0.14463096162241545]),  # activations of norm 1.6e-4
    ],
)
def test_lpips_is_that_of_its_authors(scale: float, expected: list[float], tmp_path: Path) -> None:
    """Numbers of the package lpips 0.1.4 in float64, which keeps a few constants in float32."""
    torch.save(_numbered(alexnet, scale), tmp_path / FILES["alex"])
    found = LPIPS("alex", tmp_path).double()(*_numbered_images(64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    dark = torch.zeros(1, 3, 64, 64, requires_grad=True)
    LPIPS("alex", tmp_path)(dark, torch.rand(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(dark.grad).all()


def test_dists_is_that_of_its_authors(tmp_path: Path) -> None:
    """Numbers of the package DISTS_pytorch 0.1 in float64."""
    torch.save(_numbered(vgg16), tmp_path / FILES["vgg"])
    found = DISTS(tmp_path).double()(*_numbered_images(32))
    expected = torch.tensor([0.06085491782991537, 0.060833621846346775], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_missing_and_foreign_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for make in (lambda: LPIPS(), lambda: DISTS(), lambda: LPIPS("vgg", tmp_path / "nothing.pth")):
        with pytest.raises(FileNotFoundError, match="nothing is downloaded here; bring torchvision's"):
            make()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not torchvision's"):
        LPIPS("alex", tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.pth: it is damaged") as caught:
        DISTS(tmp_path / "broken.pth")
    assert "Weights only load" not in str(caught.value)


def test_ms_ssim_at_full_size_is_the_published_one() -> None:
    x = torch.rand(2, 3, 180, 180)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    expected = 1 - multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(x, y), expected)
    for size in (16, 32, 64, 160):
        small, other = x[..., :size, :size], y[..., :size, :size]
        distance = ms_ssim(small, other)
        assert distance.shape == (2,) and (distance > 0).all() and (distance < 1).all()
        torch.testing.assert_close(ms_ssim(small, small), torch.zeros(2), rtol=0, atol=1e-5)
