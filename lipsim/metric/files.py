"""Metrics as files: safetensors with a JSON header that rebuilds the metric, and nothing that runs code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.audit import UnboundedModuleError, lipschitz_bound
from lipsim.certificates.numbers import check_count, check_number
from lipsim.layers import freeze
from lipsim.layers.base import FoldedLayer
from lipsim.layers.encoder import dtype_of
from lipsim.metric.bounds import CLAIM_TOLERANCE
from lipsim.metric.encoders import encoder_name, registered_names
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.rebuild import build_encoder
from lipsim.metric.thresholds import Threshold
from lipsim.metric.tiles import TiledMetric
from lipsim.students import FoldedNetwork
from lipsim.teachers.lora_tuning import has_adapter, merged
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_sha256, parse_json, write_safetensors
from lipsim.utils.framings import DEFAULT_GRID, FRAMINGS
from lipsim.utils.paths import packaged, user_path
from lipsim.utils.weights import load_weights, read_checkpoint, read_safetensors

FORMAT = "lipsim-metric"
VERSION = 1
AUDITED = "audited"
BUNDLED = packaged("checkpoints")
DEFAULT = "photos"  # of the bundled metrics
_AUDITED_NOW = 2**24  # parameters that an audit takes two seconds for, at most; 0.1 of them for the bundled metrics


def save(metric: PerceptualMetric, path: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write a metric so that :func:`load` gives it back.

    Args:
        metric: the metric, whose encoder is of this package or of a class that
            :func:`lipsim.metric.register_encoder` has registered. Its Lipschitz bound is stored as it stands, LoRA
            layers are written merged. In half precision derived weights are written as they are rounded, by a
            :class:`lipsim.students.FoldedNetwork`: rounded parameters would derive others.
        path: ``….safetensors``; parent folders are made.
        notes: anything else to keep in the header (JSON); None: :attr:`PerceptualMetric.notes`, of the file that the
            metric is from.

    Raises:
        ValueError: the encoder is of a class that no header can name, in half precision with a bound, or with a
            declared bound that no audit confirms, as loading the file will.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from lipsim.students import OrthogonalProjection
        >>> metric = PerceptualMetric(OrthogonalProjection(image_size=8, out_features=4), image_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(metric, f"{folder}/own.safetensors"))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(again(x, 1 - x), metric(x, 1 - x), atol=1e-6)
        True
    """
    path, threshold, given = user_path(path), metric.threshold, metric
    notes = metric.notes if notes is None else notes
    framing, metric = _framing(metric), _of_a_tile(metric)
    encoder = _written(metric.encoder)
    header = {**describe(metric, encoder), **framing, "notes": notes}
    _check_declared(metric)
    if header["lipschitz"] == AUDITED:
        header["lipschitz"] = metric.lipschitz
    header["feature_error"] = metric.feature_error
    if isinstance(given, TiledMetric) and given.tile_error > metric.feature_error:  # declared of all tiles together
        header |= {"feature_error": given.tile_error, "feature_error_kind": given.feature_error_kind}
    if threshold is not None:
        header["threshold"] = threshold.header()
    metadata = {"format": FORMAT, "version": str(VERSION), "metric": json.dumps(header)}
    write_safetensors(path, encoder.state_dict(), metadata)
    return path


def _check_declared(metric: PerceptualMetric) -> None:
    """Refuse a declared bound that the audit of whoever loads the file would refuse, and then nobody could load it.

    Raises:
        ValueError: no bound is known for the encoder, or a larger one.
    """
    declared = metric.declared_lipschitz
    if declared is None or declared == math.inf:
        return
    why, remedy = "a file's bound is audited when it is loaded", "or set metric.lipschitz = math.inf"
    try:
        audited = lipschitz_bound(metric.encoder, metric.image_size).total
    except UnboundedModuleError as error:
        raise LipsimError(f"{why}: {error}; {remedy}") from error
    if audited > declared * (1 + CLAIM_TOLERANCE):
        raise LipsimError(
            f"{why}: the encoder has {audited:.9g}, more than the declared {declared:.9g}; declare that, {remedy}"
        )


def _written(encoder: nn.Module) -> nn.Module:
    """The encoder whose state a file holds, and computes with.

    Raises:
        ValueError: its derived weights are in half precision, and no file can hold them.
    """
    encoder = merged(encoder)
    folded = any(isinstance(module, FoldedLayer) for module in encoder.modules())
    if not folded or dtype_of(encoder) in (torch.float32, torch.float64):
        return encoder
    try:
        return FoldedNetwork.from_encoder(encoder)
    except LipsimError as error:
        raise LipsimError(
            f"cannot save a {type(encoder).__name__} in half precision: its weights are rounded after they are "
            "derived, which no file can say; save it in float32, and call .half() after loading"
        ) from error


def describe(metric: PerceptualMetric, encoder: nn.Module) -> dict[str, Any]:
    """What rebuilds a metric with this encoder besides its weights (JSON).

    ``lipschitz`` is None without a bound, else "audited"; ``feature_error`` is searched for again when it is loaded.

    Raises:
        ValueError: the encoder is of a class that no header can name, or has LoRA layers.
    """
    kind = encoder_name(encoder)
    if kind is None:
        raise LipsimError(
            f"cannot export an encoder of class {type(encoder).__name__}; known are {', '.join(registered_names())}, "
            "and others that lipsim.metric.register_encoder has registered"
        )
    if has_adapter(encoder):
        raise LipsimError(f"this {kind} has LoRA layers beside its weights; lipsim.metric.save merges them")
    try:
        json.dumps(encoder.config)
    except TypeError as error:
        raise LipsimError(
            f"cannot export {kind}: the arguments of its constructor are kept as JSON, and one is none ({error})"
        ) from error
    return {
        "encoder": kind,
        "config": encoder.config,
        "image_size": metric.image_size,
        "anchor": metric.anchor,
        "lipschitz": AUDITED if metric.has_bound else None,
        "feature_error": metric.declared_feature_error,
        "feature_error_kind": metric.feature_error_kind,
        "resize": metric.preprocess.resize,
        **_framing(metric),
    }


def _framing(metric: PerceptualMetric) -> dict[str, Any]:
    """What a header says of how images come to a metric, besides their size and resize."""
    if isinstance(metric, TiledMetric):
        return {"framing": "tiles", "grid": metric.grid}
    return {"framing": metric.preprocess.framing}


def _of_a_tile(metric: PerceptualMetric) -> PerceptualMetric:
    """The metric whose weights a file holds: of one tile, where there are tiles."""
    return metric.tile if isinstance(metric, TiledMetric) else metric


def load(path: str | Path = DEFAULT, *, framing: str | None = None, grid: int | None = None) -> PerceptualMetric:
    """Load a metric, in evaluation mode and with folded weights.

    Args:
        path: a ``.safetensors`` file, a ``.ckpt`` that a stage of this package saved in training, or the name of a
            bundled metric ("photos", the default, "photos_wide", "scattering" or "quickstart").
        framing: how images come to it, "stretch", "center-crop", "pad" or "tiles" (see
            :class:`lipsim.data.Preprocess`); None: as the file says, "stretch" where it says nothing.
        grid: of tiles, how many there are a side; None: as the file says, or 2.

    Returns:
        The metric, a :class:`lipsim.metric.TiledMetric` with "tiles".

    Raises:
        FileNotFoundError: no such file, nor a bundled metric of that name.
        ValueError: the file is truncated, of another kind, its weights do not fit the encoder it names, or it claims a
            smaller Lipschitz bound than they have. Networks of more than 16 million parameters are audited at the
            first use of their bound, and refused then.

    Example:
        >>> metric = load()
        >>> metric.image_size, metric.anchor, f"{metric.lipschitz:.4f}"
        (64, 1.0, '1.0000')
    """
    file = resolve(path)
    if framing not in (None, *FRAMINGS):
        raise LipsimError(f"expected framing to be one of {', '.join(FRAMINGS)}, got {framing!r}")
    header, state = _read_checkpoint(file) if file.suffix == ".ckpt" else _read_export(file)
    if grid is not None:
        check_count("grid", grid)
        if (given := header.get("framing", "stretch") if framing is None else framing) != "tiles":
            raise LipsimError(f"a grid is of the framing tiles, got the framing {given!r}; pass framing='tiles'")
    try:
        if header["encoder"] not in registered_names():
            raise LipsimError(
                f"it names the encoder {header['encoder']}, which this version does not have; update lipsim, or import "
                "the module that registers it first"
            )
        check_count("image_size", header["image_size"])
        own, own_grid = header.get("framing", "stretch"), header.get("grid", DEFAULT_GRID)
        if own not in FRAMINGS:
            raise LipsimError(f"it names the framing {own!r}, which this version does not have; update lipsim")
        framing = own if framing is None else framing
        grid = check_count("grid", own_grid if grid is None else grid)
        declared = header["lipschitz"]
        # 0 is that of weights that have all collapsed.
        claims = declared not in (None, AUDITED)
        floor = check_number("Lipschitz bound", declared) if claims else 0.0
        encoder = build_encoder(header["encoder"], header["config"], state)
        metric = PerceptualMetric(
            encoder,
            header["image_size"],
            anchor=header["anchor"],
            lipschitz=math.inf,
            feature_error=header["feature_error"],
            resize=header["resize"],
            framing="stretch" if framing == "tiles" else framing,
        )
        claimed = header.get("threshold")
        threshold = None if claimed is None else Threshold.from_header(claimed)
    except KeyError as error:
        raise LipsimError(f"cannot rebuild the metric in {file}: its header has no {error}") from error
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # sizes that no layer can have, too
        raise LipsimError(f"cannot rebuild the metric in {file}: {str(error).splitlines()[0]}") from error
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        encoder.to(dtypes.pop())
    load_weights(encoder, state, str(file))
    metric.requires_grad_(False)
    freeze(metric)
    if declared is not None:
        # Computed, not assumed: a header cannot claim less than the weights have, nor than their arithmetic loses.
        now = sum(parameter.numel() for parameter in encoder.parameters()) <= _AUDITED_NOW
        metric.require_lipschitz(floor, f"the metric in {file}" if claims else "", now=now)
        metric.require_feature_error(metric.declared_feature_error)
    if framing == "tiles":
        metric = TiledMetric(metric, grid)
    # It was chosen on images that came to the metric as its file says.
    metric.threshold = threshold if (framing, grid) == (own, own_grid) else None
    notes = header.get("notes")
    metric.notes = dict(notes) if isinstance(notes, dict) else {}
    return metric


def write_threshold(source: str | Path, path: str | Path, threshold: Threshold, metric: PerceptualMetric) -> Path:
    """Copy the file of a metric with a threshold in its header; all else in it stays as it is, bit by bit.

    But for the framing: the file says from now on how images came to the metric that the threshold was chosen for.

    Args:
        source: a ``.safetensors`` file, a training checkpoint, which is exported first, or a bundled name.
        path: ``….safetensors``, perhaps the same; it is replaced as a whole or not at all.
        threshold: what the header has from now on.
        metric: of that file, as :func:`load` gave it.

    Raises:
        FileNotFoundError: no such metric.
        ValueError: the file is no metric.
        OSError: the file cannot be written.
    """
    file, path = resolve(source), user_path(path)
    if file.suffix == ".ckpt":
        metric.threshold = threshold
        return save(metric, path)
    header, state = _read_export(file)
    _, metadata = read_safetensors(file)
    given = _framing(metric)
    if given != {"framing": "stretch", **{name: header[name] for name in ("framing", "grid") if name in header}}:
        header = {**{name: value for name, value in header.items() if name != "grid"}, **given}
    metadata["metric"] = json.dumps({**header, "threshold": threshold.header()})
    write_safetensors(path, state, metadata)
    return path


@dataclass(frozen=True)
class FileFacts:
    """What the file of a metric says about it.

    Attributes:
        file: where it is.
        sha256: of the file.
        header: what rebuilds the metric; see :func:`describe`.
        values: how many numbers its tensors have, buffers included.
    """

    file: Path
    sha256: str
    header: dict[str, Any]
    values: int


def read_facts(path: str | Path = DEFAULT) -> FileFacts:
    """What a file says about the metric in it, which is not built.

    Raises:
        FileNotFoundError: no such file, nor a bundled metric of that name.
        ValueError: the file is truncated or of another kind.
    """
    file = resolve(path)
    header, state = _read_checkpoint(file) if file.suffix == ".ckpt" else _read_export(file)
    return FileFacts(file, file_sha256(file), header, sum(tensor.numel() for tensor in state.values()))


def holds(path: Path, metric: PerceptualMetric) -> bool:
    """Whether a ``.safetensors`` file has just the weights of a metric; a damaged file has not."""
    try:
        _, state = _read_export(path)
    except ValueError:
        return False
    own = _written(_of_a_tile(metric).encoder).state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name].cpu(), tensor) for name, tensor in state.items())


def _read_export(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and encoder weights of a ``.safetensors`` file."""
    state, metadata = read_safetensors(file)
    if metadata.get("format") != FORMAT:
        raise LipsimError(
            f"{file} is no exported metric (format {metadata.get('format')!r}); lipsim.metric.save writes them"
        )
    version = metadata.get("version", "0")
    if not version.isdecimal():
        raise LipsimError(f"{file} is damaged, its format version is {version!r}; export it again")
    if int(version) > VERSION:
        raise LipsimError(f"{file} has format version {version}, newer than {VERSION}; update lipsim")
    try:
        header = parse_json(metadata["metric"])
        if not isinstance(header, dict):
            raise LipsimError(f"its header is a {type(header).__name__}")
        return header, state
    except (KeyError, ValueError) as error:
        raise LipsimError(f"cannot rebuild the metric in {file}: {error!r}") from error


def _read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and encoder weights of a training checkpoint."""
    content = read_checkpoint(file)
    try:
        header, state = parse_json(content[FORMAT]), content["state_dict"]
    except (KeyError, TypeError, ValueError) as error:
        raise LipsimError(
            f"{file} does not say how to rebuild a metric; it is no checkpoint of a stage of this package, or one with "
            "an encoder of another package or with LoRA layers: export the metric when training ends"
        ) from error
    if (
        not isinstance(header, dict)
        or not isinstance(state, dict)
        or not all(isinstance(t, Tensor) for t in state.values())
    ):
        raise LipsimError(f"{file} is damaged, its weights are no tensors by name; train or export it again")
    prefix = "metric.encoder."
    return header, {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def resolve(path: str | Path) -> Path:
    """The file of a metric that is given by path or by the name of a bundled one.

    Raises:
        FileNotFoundError: neither.
    """
    file = user_path(path)
    if file.is_file():
        return file
    bundled = {p.stem: p for p in BUNDLED.glob("*.safetensors")}
    if str(path) in bundled:
        return bundled[str(path)]
    names = f"; bundled metrics: {', '.join(sorted(bundled))}" if bundled else ""
    raise FileNotFoundError(f"no metric file {path}{names}")
