"""Files of an image index: safetensors that say which images there are, and whose embeddings these are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lipsim.layers.fingerprint import structure
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.teachers.lora_tuning import merged
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json, sha256, state_fingerprint, write_file
from lipsim.utils.weights import read_safetensors

FORMAT = "lipsim-index"
VERSION = 1
_AGAIN = "remove the file and index the folder again"
_KINDS = (("features", torch.float32), ("hashes", torch.uint8), ("sizes", torch.int64), ("times", torch.int64))
_PARTS = "[0-9]*.safetensors"  # of an update that goes on; hidden files are of one that was killed while it wrote


@dataclass(frozen=True, eq=False)
class Records:
    """What is known of ``M`` image files.

    Attributes:
        names: of the files, relative to the folder of the index, or whole paths.
        features: ``(M, D)`` float32.
        hashes: SHA-256 of the contents, 32 bytes each.
        sizes: of the files, in bytes.
        times: when they were last changed, in ns; -1 where that was so shortly before they were read that the file may
            have been changed again without another time.
    """

    names: list[str] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    hashes: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


def gather(blocks: Sequence[Records], chosen: Sequence[tuple[int, int]]) -> Records:
    """Some records, by block and row, in this order; features are copied once."""
    kept = [blocks[b] for b, _ in chosen]
    rows = [row for _, row in chosen]
    size = next((block.features.shape[1] for block in kept), 0)
    features = torch.empty(len(chosen), size)
    block_of, row_of = torch.tensor([b for b, _ in chosen]), torch.tensor(rows)
    for number, block in enumerate(blocks):
        mask = block_of == number
        if bool(mask.any()):
            features[mask] = block.features[row_of[mask]]
    return Records(
        [block.names[i] for block, i in zip(kept, rows, strict=True)],
        features,
        [block.hashes[i] for block, i in zip(kept, rows, strict=True)],
        [block.sizes[i] for block, i in zip(kept, rows, strict=True)],
        [block.times[i] for block, i in zip(kept, rows, strict=True)],
    )


def embedding_fingerprint(metric: PerceptualMetric) -> str:
    """SHA-256 over all that an embedding of a file depends on: encoder, weights, and how images come to it.

    Not over the anchor, the bound, or anything else that is only used to compare embeddings. The same for a metric in
    memory and for the files that it is exported to.
    """
    encoder = merged(metric.encoder)
    preprocess = {k: v for k, v in vars(metric.preprocess).items() if isinstance(v, str | int | float | bool)}
    content = {
        "metric": type(metric).__name__,
        "encoder": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "config": json.loads(json.dumps(getattr(encoder, "config", None), default=str)),
        "weights": state_fingerprint(encoder.state_dict()),
        "dtype": str(metric.dtype),
        "preprocess": preprocess,
    }
    config = content["config"]
    if config is None or (isinstance(config, dict) and "tile" in config and config["tile"] is None):
        # Else the configuration, of a tile's encoder too, says what the layers between the weights are.
        kept = encoder.state_dict().keys()
        outside = {name: tensor for name, tensor in encoder.named_buffers() if name not in kept}
        content["structure"] = [structure(encoder), state_fingerprint(outside)]
    return sha256(json.dumps(content, sort_keys=True))


def write_records(path: Path, records: Records, header: dict[str, Any], skipped: dict[str, str]) -> None:
    """Write records as a whole or not at all.

    Args:
        path: the file.
        records: the images.
        header: what to keep besides (JSON).
        skipped: files that could not be used → the reason.
    """
    tensors = {
        "features": records.features.contiguous(),
        "hashes": torch.from_numpy(np.frombuffer(b"".join(records.hashes), np.uint8).copy()).view(-1, 32),
        "sizes": torch.tensor(records.sizes, dtype=torch.int64),
        "times": torch.tensor(records.times, dtype=torch.int64),
        # Not in the header, which may hold 100 MB at most.
        **_packed("names", records.names),
        **_packed("skipped", [text for pair in skipped.items() for text in pair]),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "index": json.dumps(header)}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_records(path: Path) -> tuple[Records, dict[str, Any], dict[str, str]]:
    """What :func:`write_records` wrote. Features stay mapped from the file until they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no index, damaged, or of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no index {path}; lipsim index FOLDER --output {path} writes one")
    try:
        tensors, metadata = read_safetensors(path)
    except LipsimError as fault:
        said = str(fault).removesuffix("get it again").rstrip(" :;")
        raise LipsimError(f"{said}; if it was an index, {_AGAIN}") from fault
    if metadata.get("format") != FORMAT:
        raise LipsimError(
            f"{path} is no index of images (format {metadata.get('format')!r}); lipsim index FOLDER writes one"
        )
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > VERSION:
        raise LipsimError(f"{path} has format version {version}, newer than {VERSION}; update lipsim")
    try:
        header = parse_json(metadata["index"])
        names, skipped = _unpacked("names", tensors), _unpacked("skipped", tensors)
        count = len(names)
        for name, dtype in _KINDS:
            if tensors[name].dtype != dtype or len(tensors[name]) != count:
                raise LipsimError(f"{name} are {tuple(tensors[name].shape)} {tensors[name].dtype}")
        if tensors["hashes"].shape != (count, 32) or tensors["features"].ndim != 2 or not isinstance(header, dict):
            raise LipsimError("tensors of other shapes")
        if not all(isinstance(header.get(key), str) for key in ("fingerprint", "metric")):
            raise LipsimError("its header does not say whose embeddings it has")
        if not isinstance(header.get("root"), str | None):
            raise LipsimError(f"the folder of the images is {header['root']!r}")
        if len(skipped) % 2:
            raise LipsimError("a file that was left out without the reason")
        error = header.get("feature_error")
        if not isinstance(error, float) or not 0 <= error < math.inf:
            raise LipsimError(f"feature_error is {error!r}")
        if not bool(torch.isfinite(tensors["features"]).all()):
            raise LipsimError("features that are not finite")
        records = Records(
            names,
            tensors["features"],
            [row.tobytes() for row in tensors["hashes"].numpy()],
            tensors["sizes"].tolist(),
            tensors["times"].tolist(),
        )
    except (KeyError, ValueError) as error:
        raise LipsimError(f"{path} is damaged ({error}); {_AGAIN}") from error
    return records, header, dict(zip(skipped[::2], skipped[1::2], strict=True))


def write_part(unfinished: Path, records: Records, fingerprint: str, feature_error: float) -> None:
    """Keep what an update has embedded, in one more file of its folder, and the error of these embeddings."""
    # By number and not by time, which a clock that is set back gives twice.
    number = 1 + max((int(file.stem) for file in unfinished.glob(_PARTS)), default=0)
    header = {"fingerprint": fingerprint, "metric": "", "feature_error": feature_error}
    write_records(unfinished / f"{number:020d}.safetensors", records, header, {})


def read_parts(unfinished: Path | None, fingerprint: str) -> tuple[list[Records], float]:
    """What an update that was cut short has left, of the same metric, and the largest error of its embeddings.

    They may have been computed on another device.
    """
    parts, error = [], 0.0
    for path in sorted(unfinished.glob(_PARTS)) if unfinished is not None and unfinished.is_dir() else ():
        records, header, _ = read_records(path)
        if header["fingerprint"] == fingerprint:
            parts.append(records)
            error = max(error, header["feature_error"])
    return parts, error


def _packed(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as one tensor of bytes, and where each ends."""
    content = [os.fsencode(text) for text in texts]
    ends = np.cumsum([len(text) for text in content], dtype=np.int64)
    joined = np.frombuffer(b"".join(content), np.uint8).copy()
    return {name: torch.from_numpy(joined), f"{name}_ends": torch.from_numpy(ends)}


def _unpacked(name: str, tensors: dict[str, Tensor]) -> list[str]:
    content, ends = tensors[name].numpy().tobytes(), tensors[f"{name}_ends"].tolist()
    if tensors[f"{name}_ends"].dtype != torch.int64 or tensors[f"{name}_ends"].ndim != 1:
        raise LipsimError(f"the ends of {name}")
    if ends != sorted(ends) or (ends[-1] if ends else 0) != len(content) or (ends and ends[0] < 0):
        raise LipsimError(f"the ends of {name}")
    return [os.fsdecode(content[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
