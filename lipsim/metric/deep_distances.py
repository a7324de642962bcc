"""LPIPS and DISTS as plain distances, from backbone weights that lie on this machine; nothing is downloaded.

The small trained parts (LPIPS' channel weights, DISTS' alpha and beta) come with torchmetrics; the convolutions are
torchvision's classification networks, whose files the user brings.
"""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

from pathlib import Path
from typing import Literal

import torch
import torchmetrics.functional.image as torchmetrics_image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg

from lipsim.metric.inputs import check_paired
from lipsim.utils.errors import LipsimError
from lipsim.utils.layout import channels_innermost
from lipsim.utils.paths import user_path
from lipsim.utils.weights import read_checkpoint

Net = Literal["alex", "vgg"]
FILES: dict[Net, str] = {
    "alex": Path(AlexNet_Weights.IMAGENET1K_V1.url).name,
    "vgg": Path(VGG16_Weights.IMAGENET1K_V1.url).name,
}
# Layers of `features` whose outputs count: the activations, in VGG the last of each stage.
_TAPS: dict[Net, tuple[int, ...]] = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_SHARED = Path(torchmetrics_image.__file__).parent
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_NAN = 1e-24  # below what counts; the published root has no gradient where all channels are 0
_SMALL = 1e-6  # the constants of DISTS' two ratios


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), version 0.1, as in their package ``lpips``.

    Images are in [0, 1], where the package takes [−1, 1] by default.

    Args:
        net: "alex" or "vgg".
        weights: torchvision's file of the backbone, or the folder that holds it; None: torch's hub folder.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: the file holds something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: Net = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        self.taps = _TAPS[net]
        self.layers = _backbone(net, weights)
        heads = read_checkpoint(_SHARED / "lpips_models" / f"{net}.pth")
        for k in range(len(self.taps)):
            self.register_buffer(f"head{k}", heads[f"lin{k}.model.1.weight"])
        # Of images in [0, 1]: the published shift and scale are for [−1, 1].
        self.register_buffer("mean", (torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1) + 1) / 2)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1) / 2)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(N,)`` between images ``(N, 3, H, W)`` in [0, 1]; one image on a side is compared with all.

        Raises:
            ValueError: other numbers of images.
        """
        check_paired(x, y)
        total = x.new_zeros(())
        z = channels_innermost((torch.cat([x, y]) - self.mean) / self.std)
        k = 0
        for i, layer in enumerate(self.layers):
            z = layer(z)
            if i == self.taps[k]:
                unit = z / (torch.sqrt(z.square().sum(1, keepdim=True) + _NO_NAN) + 1e-10)
                a, b = unit.split([len(x), len(y)])
                total = total + F.conv2d((a - b).square(), getattr(self, f"head{k}")).mean((1, 2, 3))
                k += 1
                if k == len(self.taps):
                    break
        return total


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020) on VGG-16, as in their package ``DISTS_pytorch``.

    The authors shrink larger images to a short side of 256 first; here images are taken as they are.

    Args:
        weights: torchvision's file of the backbone, or the folder that holds it; None: torch's hub folder.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: the file holds something else.
    """

    alpha: Tensor
    beta: Tensor
    window: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.layers = _backbone("vgg", weights)
        shared = read_checkpoint(_SHARED / "dists_models" / "weights.pt")
        total = shared["alpha"].sum() + shared["beta"].sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, (shared[name] / total).detach().flatten())
        window = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("window", torch.outer(window, window) / torch.outer(window, window).sum())
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(N,)`` between images ``(N, 3, H, W)`` in [0, 1]; one image on a side is compared with all.

        Raises:
            ValueError: other numbers of images.
        """
        check_paired(x, y)
        counts = [len(x), len(y)]
        features = self._features(torch.cat([x, y]))
        sizes = [z.shape[1] for z in features]
        similarity = x.new_zeros(())
        for z, alpha, beta in zip(features, self.alpha.split(sizes), self.beta.split(sizes), strict=True):
            means = z.mean((2, 3), keepdim=True)
            mean_a, mean_b = means.flatten(1).split(counts)
            texture = (2 * mean_a * mean_b + _SMALL) / (mean_a.square() + mean_b.square() + _SMALL)
            # The published E[ab] − E[a] E[b] loses its digits where a channel is nearly flat, and then d(x, x) < 0.
            a, b = (z - means).split(counts)
            variance = a.square().mean((2, 3)) + b.square().mean((2, 3))
            structure = (2 * (a * b).mean((2, 3)) + _SMALL) / (variance + _SMALL)
            similarity = similarity + (alpha * texture + beta * structure).sum(1)
        return 1 - similarity

    def _features(self, x: Tensor) -> list[Tensor]:
        """The image, then the last activation of each stage; pooling takes a root of smoothed squares."""
        found, z = [x], channels_innermost((x - self.mean) / self.std)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.MaxPool2d):
                kernel = self.window.expand(z.shape[1], 1, -1, -1)
                z = torch.sqrt(F.conv2d(z.square(), kernel, stride=2, padding=1, groups=z.shape[1]) + 1e-12)
            else:
                z = layer(z)
            if i in _TAPS["vgg"]:
                found.append(z)
        return found


def _backbone(net: Net, weights: str | Path | None) -> nn.ModuleList:
    """The convolutions of torchvision's network with the weights of a file, up to the last layer that counts."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" if weights is None else user_path(weights)
    file = folder / FILES[net] if folder.is_dir() or weights is None else folder
    if not file.is_file():
        raise FileNotFoundError(
            f"no backbone weights at {file}: nothing is downloaded here; bring torchvision's {FILES[net]}"
        )
    features = alexnet(weights=None).features if net == "alex" else vgg.make_layers(vgg.cfgs["D"])
    layers = features[: _TAPS[net][-1] + 1]
    state = read_checkpoint(file)
    for name, value in layers.state_dict().items():
        if f"features.{name}" not in state or state[f"features.{name}"].shape != value.shape:
            raise LipsimError(f"{file} has no features.{name} of the right shape; it is not torchvision's {FILES[net]}")
    layers.load_state_dict({name: state[f"features.{name}"] for name in layers.state_dict()})
    found = nn.ModuleList(layers)
    for layer in found:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # outputs that count are read again
    return found
