"""A published LipSim checkpoint becomes a metric of this package.

The published files hold ``convs.{i}.{kernel,bias,q}`` and ``linear.{1+i}.{weight,bias,q}`` behind prefixes of their
wrappers, and the same tensors again under ``base.1`` and ``base.2``. Every tensor is accounted for: what this network
has no place for is refused and not dropped, since it could change the distances or the Lipschitz constant.

The published convolutions have a ``q`` and do not use it: ``exp(q)`` and ``exp(−q)`` multiply the same axis of
``|W Wᵀ|`` and cancel, so that it got no gradient and is random in every file. The paper's formula, which
:class:`lipsim.layers.SLLConv2d` follows, would make another network of it. It is set to 0 here, where both agree and
the block is 1-Lipschitz as for every ``q``; the linear blocks use theirs in both and keep it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.students import SLLNetwork
from lipsim.students.sll_network import PRESETS
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_sha256
from lipsim.utils.paths import user_path
from lipsim.utils.weights import load_weights, read_checkpoint

# DataParallel, the published metric around its network, the wrapper that normalises the input, and torch.compile.
_PREFIXES = re.compile(r"((module|backbone|model|_orig_mod)\.)*")
# linear.0 is a flatten. No leading zeros, so that no two numbers mean the same layer.
_CONV = re.compile(r"(?:convs|base\.1)\.(0|[1-9]\d{0,3})\.(kernel|bias|q)")
_LINEAR = re.compile(r"(?:linear|base\.2)\.([1-9]\d{0,3})\.(weight|bias|q)")
_UNUSED = re.compile(r"convs\.\d+\.q")
_NORMALISATION = re.compile(r"(?:normali[sz]er?\.)?(mean|std)")
_BOOKKEEPING = re.compile(r"epoch|global_step|optim|sched|lr_sched|warmup")


_PUBLISHED_KERNEL, _PUBLISHED_WIDTH = 3, 5


@dataclass(frozen=True)
class Conversion:
    """A converted metric and where it came from.

    Attributes:
        metric: the published network under this package's geometry and audit.
        preset: the published size that it equals, or None.
        epoch: as the checkpoint says, or None.
        sha256: of the checkpoint file.
        ignored: keys of the state that the published evaluation drops as well (``alpha``).
        left_out: what lay beside the state: the optimizer and other bookkeeping.
        upcast_from: dtypes in half precision that were brought to float32, which is exact.
        zeroed: the parameters that the published code has and does not use, set to 0.
    """

    metric: PerceptualMetric
    preset: str | None
    epoch: int | None
    sha256: str
    ignored: tuple[str, ...]
    left_out: tuple[str, ...]
    upcast_from: tuple[str, ...]
    zeroed: tuple[str, ...]

    def notes(self, source: Path) -> dict[str, Any]:
        """What the header of the converted file says about its origin."""
        return {
            "source": source.name,
            "source_sha256": self.sha256,
            "epoch": self.epoch,
            "preset": self.preset,
            "ignored": list(self.ignored),
            "left_out": list(self.left_out),
            "upcast_from": list(self.upcast_from),
            "zeroed": list(self.zeroed),
        }

    def __str__(self) -> str:
        metric, encoder = self.metric, self.metric.encoder
        assert isinstance(encoder, SLLNetwork)
        c = encoder.config
        first = 16 * (encoder.image_size // 16)
        rows = {
            "network": f"{self.preset or 'no'} preset",
            "convolutions": f"{c['depth']} of {c['channels']} channels, inner width {c['conv_width']}",
            "linear blocks": f"{c['linear_depth']} of inner width {c['linear_width']}",
            "images": f"{metric.image_size} pixels (the weights fit {first} to {first + 15}), "
            f"resized as {metric.preprocess.resize!r}",
            "features": f"{c['out_features']}, anchor {metric.anchor:g}",
            "Lipschitz bound": f"{metric.lipschitz:.9g} (audited)",
            "epoch": "not said" if self.epoch is None else str(self.epoch),
            "ignored keys": ", ".join(self.ignored) or "none",
            "left out": ", ".join(self.left_out) or "nothing",
            "set to 0": f"q of the {len(self.zeroed)} convolutions, which the published code does not use",
        }
        if self.upcast_from:
            rows["upcast"] = f"{', '.join(self.upcast_from)} to float32, exactly"
        return "\n".join(f"{name:<17}{value}" for name, value in rows.items())


def convert(
    source: str | Path,
    image_size: int | None = None,
    out_features: int = 1792,
    anchor: float = 1.0,
    resize: str = "pil",
) -> Conversion:
    """Read a published checkpoint strictly.

    Args:
        source: the checkpoint, as ``torch.save`` wrote it.
        image_size: side of the input. The weights fix it up to the 16 sizes that are pooled to the same side; None
            takes the multiple of 16.
        out_features: features to keep, the dimension of the teacher (1792 for the DreamSim ensemble).
        anchor: constant coordinate appended to the features. The published evaluation has none: its distances are
            those of 0, and its radii overclaim where features are short. With 1 distances differ slightly and are
            Lipschitz everywhere.
        resize: how images come to ``image_size``: "pil", as in the published evaluation, or "float", a map of known
            norm.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, needs more than tensors and plain containers, or holds another network; or an
            option does not fit the weights.
    """
    path = user_path(source)
    if image_size is not None and image_size < 16:
        raise LipsimError(f"expected an image size of at least 16, got {image_size}")
    if out_features < 1:
        raise LipsimError(f"expected at least one output feature, got {out_features}")
    if not 0 <= anchor < math.inf:
        raise LipsimError(f"expected a finite anchor ≥ 0, got {anchor}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    sha256 = file_sha256(path)
    raw, beside = _read(path)
    state, ignored = _account(raw, path)
    zeroed = tuple(name for name in state if _UNUSED.fullmatch(name))
    upcast_from = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()} - {"float32"}))
    encoder = _build(state | {name: torch.zeros_like(state[name]) for name in zeroed}, image_size, out_features, path)
    epoch = beside.get("epoch")
    return Conversion(
        metric=PerceptualMetric(encoder, encoder.image_size, anchor=anchor, resize=resize).eval(),
        preset=_preset(encoder),
        epoch=epoch if isinstance(epoch, int) else None,
        sha256=sha256,
        ignored=ignored,
        left_out=tuple(sorted(beside.keys() - {"epoch"})),
        upcast_from=upcast_from,
        zeroed=zeroed,
    )


def _read(path: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The state dict, and what lies beside it in the file."""
    checkpoint = read_checkpoint(path, namespaces=False)
    if "model_state_dict" not in checkpoint:
        return checkpoint, {}
    state = checkpoint["model_state_dict"]
    if not isinstance(state, dict):
        raise LipsimError(f"expected a dict of weights as model_state_dict in {path}, got {type(state).__name__}")
    beside = {str(name): value for name, value in checkpoint.items() if name != "model_state_dict"}
    # A tensor that is not the optimizer's belongs to the metric: the published fine-tuning can store an offset there.
    unknown = [name for name, value in beside.items() if not _BOOKKEEPING.match(name) and _holds_tensors(value)]
    if unknown:
        raise LipsimError(f"{path} has tensors beside model_state_dict that may belong to its metric: {_list(unknown)}")
    return state, beside


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Tensor)


def _account(raw: dict[Any, Any], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights under ``convs.{i}.…`` and ``linear.{i}.…``, each once, and the keys that are ignored."""
    aliases: dict[str, list[str]] = {}
    normalisation, ignored, unknown = [], [], []
    for key, value in raw.items():
        bare = _PREFIXES.sub("", key, count=1) if isinstance(key, str) else ""
        conv, linear = _CONV.fullmatch(bare), _LINEAR.fullmatch(bare)
        if "alpha" in bare.split(".")[-1]:
            ignored.append(key)
        elif not isinstance(value, Tensor):
            unknown.append(str(key))
        elif conv:
            aliases.setdefault(f"convs.{conv[1]}.{conv[2]}", []).append(key)
        elif linear:
            aliases.setdefault(f"linear.{linear[1]}.{linear[2]}", []).append(key)
        elif _NORMALISATION.fullmatch(bare):
            normalisation.append(key)
        else:
            unknown.append(str(key))
    missing = [name for name in _expected(aliases) if name not in aliases]
    faults = [f"unknown keys: {_list(unknown)}"] if unknown else []
    faults += [f"missing: {_list(missing)}"] if missing else []
    if faults:
        raise LipsimError(f"{path} does not hold the published network: {'; '.join(faults)}")
    for key in [*normalisation, *(key for keys in aliases.values() for key in keys)]:
        _check_tensor(key, raw[key], path)
    for key in normalisation:
        neutral = 0.0 if key.endswith("mean") else 1.0
        if not (raw[key] == neutral).all():
            raise LipsimError(
                f"{path} normalises its input ({key} = {raw[key].flatten().tolist()[:3]}), which changes the Lipschitz "
                "constant; the published networks have mean 0 and std 1"
            )
    for first, *others in aliases.values():
        for other in others:
            if raw[first].dtype != raw[other].dtype or not torch.equal(raw[first], raw[other]):
                raise LipsimError(f"{path} holds the same weights twice, and they differ: {first} and {other}")
    return {name: raw[keys[0]] for name, keys in aliases.items()}, tuple(sorted(ignored))


def _expected(names: Iterable[str]) -> list[str]:
    """The names of a network as deep as the highest layer found, of one layer of each kind at least."""
    highest = {"convs": 0, "linear": 1}
    for name in names:
        kind, number, _ = name.split(".")
        highest[kind] = max(highest[kind], int(number))
    convs = [f"convs.{i}.{tensor}" for i in range(highest["convs"] + 1) for tensor in ("kernel", "bias", "q")]
    linear = [f"linear.{i}.{tensor}" for i in range(1, highest["linear"] + 1) for tensor in ("weight", "bias", "q")]
    return convs + linear


def _check_tensor(key: str, tensor: Tensor, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise LipsimError(f"expected plain dense tensors, got another kind for {key} in {path}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LipsimError(f"expected float32 or half precision, got {tensor.dtype} for {key} in {path}")
    if not torch.isfinite(tensor).all():
        raise LipsimError(f"{key} in {path} has values that are not finite")


def _build(state: dict[str, Tensor], image_size: int | None, out_features: int, path: Path) -> SLLNetwork:
    """The network that the shapes of the weights tell, with these weights."""
    kernel, weight = state["convs.0.kernel"], state["linear.1.weight"]
    if kernel.ndim != 4 or kernel.shape[2:] != (_PUBLISHED_KERNEL,) * 2 or kernel.shape[0] < 1 or kernel.shape[1] < 3:
        raise LipsimError(
            f"expected convs.0.kernel of shape (inner width, 3 or more channels, 3, 3), got {tuple(kernel.shape)} in "
            f"{path}"
        )
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise LipsimError(
            f"expected linear.1.weight of shape (inner width, features), got {tuple(weight.shape)} in {path}"
        )
    (conv_width, channels), (linear_width, features) = kernel.shape[:2], weight.shape
    image_size = _image_size(features, channels, image_size, path)
    if features < out_features:
        raise LipsimError(
            f"expected at least {out_features} features, the linear blocks in {path} have {features}; give the "
            "dimension of the teacher it was distilled from as --out-features"
        )
    encoder = SLLNetwork(
        image_size,
        out_features,
        channels,
        depth=sum(name.startswith("convs.") for name in state) // 3,
        linear_depth=sum(name.startswith("linear.") for name in state) // 3,
        linear_width=linear_width,
        conv_width=conv_width,
    )
    own = encoder.state_dict()
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[_own_name(name)].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[_own_name(name)].shape
    ]
    if wrong:
        raise LipsimError(f"wrong shapes beside convs.0.kernel and linear.1.weight in {path}: {_list(wrong)}")
    load_weights(encoder, {_own_name(name): tensor.float() for name, tensor in state.items()}, str(path))
    return encoder


def _own_name(name: str) -> str:
    """The name in :class:`SLLNetwork`, whose linear blocks come after two pools and a flatten."""
    kind, number, tensor = name.split(".")
    return f"1.{number}.{tensor}" if kind == "convs" else f"5.{int(number) - 1}.{tensor}"


def _image_size(features: int, channels: int, image_size: int | None, path: Path) -> int:
    """The side of the input, whose two 4 × 4 pools leave ``(S // 16)²`` pixels."""
    side = math.isqrt(features // channels)
    if side < 1 or channels * side**2 != features:
        raise LipsimError(
            f"the linear blocks in {path} take {features} features, which are no square image of {channels} channels"
        )
    if image_size is not None and image_size // 16 != side:
        raise LipsimError(
            f"images of {image_size} pixels leave {channels * (image_size // 16) ** 2} features, the linear blocks in "
            f"{path} take {features}; choose --image-size from {16 * side} to {16 * side + 15}"
        )
    return 16 * side if image_size is None else image_size


def _preset(encoder: SLLNetwork) -> str | None:
    size = tuple(encoder.config[key] for key in ("depth", "channels", "linear_depth", "linear_width"))
    names = [name for name, preset in PRESETS.items() if preset == size]
    return names[0] if names and encoder.config["conv_width"] == _PUBLISHED_WIDTH else None


def _list(names: Sequence[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
