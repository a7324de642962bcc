"""Files of images, read and embedded for an index: each content once."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from lipsim.data.transforms import Preprocess, load_image
from lipsim.metric.index_files import Records
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError

_SETTLED = 2 * 10**9  # ns: a file that is older when it is read has another time when it is changed
_THREADS = 4  # that read and decode files


@dataclass(frozen=True)
class _File:
    """A file as it was read: an image where it has to be embedded, or the reason for which it cannot be used."""

    image: Tensor | None = None
    sha256: bytes = b""
    size: int = 0
    time: int = 0
    reason: str = ""


def is_unchanged(path: Path, records: Records, row: int) -> bool:
    """Whether a file is surely the one of a record, by its size and time."""
    try:
        status = path.stat()
    except OSError:  # reading it says what is wrong
        return False
    return (status.st_size, status.st_mtime_ns) == (records.sizes[row], records.times[row])


def embed_files(
    metric: PerceptualMetric,
    root: Path | None,
    names: Sequence[str],
    by_hash: dict[bytes, tuple[int, int]],
    blocks: Sequence[Records],
    batch_size: int,
    advance: Callable[[int], None] | None,
) -> tuple[Records, int, dict[str, str]]:
    """Read files, and embed those whose content has no embedding yet, each content once.

    Args:
        metric: embeds.
        root: folder of the files; None: their names are whole paths.
        names: of the files.
        by_hash: hash of a content → the block and the row in it of its embedding.
        blocks: of embeddings that are there.
        batch_size: images embedded at once.
        advance: called with how many more files are done.

    Returns:
        Records of those that can be used, the number embedded, and the reasons of the others.
    """
    found = Records(features=torch.empty(0, 0))
    features: list[Tensor] = []
    fresh: dict[bytes, Tensor] = {}  # by content: in another batch it would have other last digits
    skipped: dict[str, str] = {}
    embedded = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(names), batch_size):
            some = names[start : start + batch_size]
            files = list(
                pool.map(lambda name: _read_file(Path(root or "", name), metric.preprocess, by_hash, fresh), some)
            )
            images = {file.sha256: file.image for file in files if file.image is not None}
            if images:
                batch = torch.stack([*images.values()]).to(metric.device, metric.dtype)
                fresh.update(zip(images, metric.embed(batch).float().cpu().unbind(0), strict=True))
            for name, file in zip(some, files, strict=True):
                if file.reason:
                    skipped[name] = file.reason
                    continue
                if file.sha256 in fresh:
                    feature = fresh[file.sha256]
                else:
                    block, row = by_hash[file.sha256]
                    feature = blocks[block].features[row]
                if not bool(torch.isfinite(feature).all()):
                    skipped[name] = "its features are not finite"
                    continue
                embedded += images.pop(file.sha256, None) is not None
                features.append(feature)
                found.names.append(name)
                found.hashes.append(file.sha256)
                found.sizes.append(file.size)
                found.times.append(file.time)
            if advance is not None:
                advance(len(some))
    stacked = torch.stack(features) if features else torch.empty(0, 0)
    return Records(found.names, stacked, found.hashes, found.sizes, found.times), embedded, skipped


def _read_file(path: Path, preprocess: Preprocess, *known: Container[bytes]) -> _File:
    """Read one file; its image only where no embedding of its content, by its hash, is known."""
    try:
        now = time.time_ns()
        status = path.stat()
        content = path.read_bytes()
        own = sha256(content).digest()
        image = None
        if not any(own in contents for contents in known):
            image = load_image(path, preprocess, content)
    except (LipsimError, OSError) as error:
        return _File(reason=str(error))
    settled = status.st_mtime_ns if now - status.st_mtime_ns > _SETTLED else -1
    return _File(image, own, status.st_size, settled)
