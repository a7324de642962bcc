"""Any torch model by a name: a network of torchvision or timm, an exported metric, or a function that builds one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.metric import load
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.sampling import cpu_seed
from lipsim.utils.weights import load_weights, plain_names, read_checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMES = (
    "torchvision/NAME (torchvision/resnet50), timm/NAME (timm/vit_base_patch16_224), efficientnet-lite0 to 2, an "
    "exported metric (a .safetensors file, or the name of a bundled one), or MODULE:FUNCTION of your own, which "
    "returns a torch module for images in [0, 1]"
)


@dataclass(frozen=True)
class Model:
    """A model that takes images in [0, 1].

    Attributes:
        name: what it was asked for by.
        network: the module that was named, without what normalises its input.
        module: images ``(N, 3, H, W)`` in [0, 1] to whatever it answers, in evaluation mode.
        image_size: side of the images that it is usually given.
        resize: how image files become its input (:class:`lipsim.data.transforms.Preprocess`).
        framing: what of them it sees, likewise; "stretch" too where a metric cuts its input into tiles.
    """

    name: str
    network: nn.Module
    module: nn.Module
    image_size: int
    resize: str = "float"
    framing: str = "stretch"


class Normalized(nn.Module):
    """A network behind the normalisation of its input, ``(x − mean)/std`` for each channel.

    Args:
        network: what follows.
        mean: of each channel, or of all.
        std: the same.
        as_list: hand on a list of images, which torchvision's detectors take.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        as_list: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.as_list = network, as_list
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        """Whatever the network answers to images ``(N, 3, H, W)`` in [0, 1]."""
        x = (x - self.mean) / self.std
        return self.network(list(x) if self.as_list else x)


def load_model(
    name: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
) -> Model:
    """Build the model of a name, in evaluation mode and without gradients of its weights; nothing is downloaded.

    Args:
        name: one of the kinds of :data:`NAMES`.
        weights: a local file of the named network's state; None: random ones, where the name brings no weights itself.
        image_size: side of its input; None: its usual one.
        seed: of random weights.
        num_classes: how many classes it tells apart, for networks of torchvision and timm; None: as published.

    Raises:
        FileNotFoundError: no such file, and no model of this name.
        ValueError: weights that do not fit, or a function that returns no module.
    """
    library, slash, rest = name.partition("/")
    with cpu_seed(seed), warnings.catch_warnings():
        # Advice on weights that are given or random here.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        if slash and library == "torchvision":
            model = _torchvision(name, rest, image_size, num_classes, trained=weights is not None)
        elif slash and library == "timm":
            model = _timm(name, rest, image_size, num_classes)
        elif name.startswith("efficientnet-"):
            model = _efficientnet(name, weights)
            weights = None
        elif _is_function(name):
            model = _function(name, image_size)
        else:
            metric = _metric(name)
            images = metric.preprocess
            framing = "stretch" if images.framing == "tiles" else images.framing
            model = Model(name, metric.encoder, metric.encoder, images.image_size, images.resize, framing)
    if image_size is not None and image_size != model.image_size:
        raise LipsimError(f"expected --image-size {model.image_size}, which {name} has, got {image_size}")
    if weights is not None:
        file = user_path(weights)
        state = read_checkpoint(file)
        for key in ("state_dict", "model_state_dict", "model"):
            state = state[key] if isinstance(state.get(key), Mapping) else state
        own = model.network.state_dict().keys()
        load_weights(model.network, plain_names(state, file, own), str(file))
    model.module.eval().requires_grad_(False)
    return model


def _torchvision(name: str, network: str, image_size: int | None, num_classes: int | None, *, trained: bool) -> Model:
    from torchvision import models  # seconds to import

    if network not in models.list_models():
        raise FileNotFoundError(f"torchvision has no model {network}; torchvision.models.list_models() names them")
    builder = models.get_model_builder(network)
    options: dict[str, Any] = {"weights": None}
    if num_classes is not None:
        options["num_classes"] = num_classes
    as_list = builder.__module__.startswith("torchvision.models.detection")
    if as_list or builder.__module__.startswith("torchvision.models.segmentation"):
        options["weights_backbone"] = None
    if network in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # a truncated normal by scipy, minutes
        options["transform_input"] = trained  # as torchvision has it wherever there are weights, which are of it
    if network.startswith("vit_") and image_size is not None:
        options["image_size"] = image_size
    built = models.get_model(network, **options)
    # Detectors normalise inside; nearly everything else of torchvision has ImageNet's statistics.
    published = None if as_list else models.get_model_weights(network).DEFAULT.transforms()
    mean, std = (tuple(getattr(published, key, known)) for key, known in zip(("mean", "std"), IMAGENET, strict=True))
    module = Normalized(built, as_list=True) if as_list else Normalized(built, mean, std)
    # That of the published weights, for classifiers; but vision transformers are built for 224, whatever those are of.
    cropped = None if network.startswith("vit_") else getattr(published, "crop_size", None)
    return Model(name, built, module, image_size or (cropped[0] if cropped else 224))


def _timm(name: str, network: str, image_size: int | None, num_classes: int | None) -> Model:
    import timm  # seconds to import

    if not timm.is_model(network.partition(".")[0]):
        raise FileNotFoundError(f"timm has no model {network}; timm.list_models() names them")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None and network.startswith(("vit_", "deit_", "swin", "beit")):
        options["img_size"] = image_size
    built: Any = timm.create_model(network, pretrained=False, **options)
    mean, std, size = (built.pretrained_cfg[key] for key in ("mean", "std", "input_size"))
    return Model(name, built, Normalized(built, tuple(mean), tuple(std)), image_size or size[1])


def _efficientnet(name: str, weights: str | Path | None) -> Model:
    from lipsim.teachers.efficientnet_lite import EfficientNetLite

    network = EfficientNetLite.pretrained(name.removeprefix("efficientnet-"), weights)
    return Model(name, network.backbone, Normalized(network.backbone, (0.5,), (0.5,)), network.image_size)


def _is_function(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _function(name: str, image_size: int | None) -> Model:
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FileNotFoundError(
            f"cannot find {function} in the Python module {module} ({error}); PYTHONPATH=. finds modules of this folder"
        ) from error
    try:
        built = build if isinstance(build, nn.Module) else build()
    except Exception as error:  # of whatever kind: it is the user's own code
        raise LipsimError(
            f"expected {name}() to return a torch module, but it failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(built, nn.Module):
        raise LipsimError(f"expected {name} to return a torch module, got {type(built).__name__}")
    size = image_size or getattr(built, "image_size", None)
    if not isinstance(size, int):
        raise LipsimError(
            f"the image size of {name} is unknown; give --image-size, or the module an attribute image_size"
        )
    return Model(name, built, built, size)


def _metric(name: str) -> Any:
    try:
        return load(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; a model is {NAMES}") from None


def named_outputs(output: Any, prefix: str = "output") -> dict[str, Tensor]:
    """The tensors in what a model answers, whatever containers it puts them into, by a name for each.

    Raises:
        ValueError: something that is neither a tensor nor a container of tensors.
    """
    if isinstance(output, Tensor):
        return {prefix: output}
    if isinstance(output, Mapping):
        items = [(f"{prefix}.{key}", value) for key, value in output.items()]
    elif isinstance(output, list | tuple):
        items = [(f"{prefix}.{key}", value) for key, value in enumerate(output)]
    elif hasattr(output, "logits"):  # the named tuples and data classes of Hugging Face
        items = [(f"{prefix}.logits", output.logits)]
    else:
        raise LipsimError(f"expected a model that returns tensors, got {type(output).__name__} in {prefix}")
    return {name: tensor for key, value in items for name, tensor in named_outputs(value, key).items()}
