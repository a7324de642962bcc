"""Principal axes of a teacher's embeddings: a target of fewer features for a student that has fewer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipsim.certificates.numbers import check_count
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.utils.errors import LipsimError

MAX_ROWS = 20_000  # images that the axes are fitted to; more change the last digits
TRAINING = b"train/"  # where those lie, so that no held-out image has a part in it


def principal_axes(cache: EmbeddingCache, num_axes: int) -> Tensor:
    """The axes along which embeddings are longest, ``(D, num_axes)`` float32 with orthonormal columns.

    Of all projections ``P`` onto so many dimensions this one keeps the inner products ``⟨P t(x), P t(y)⟩`` of these
    embeddings closest to the teacher's (in squares: Eckart and Young 1936), and with them its cosine distances. The
    mean is *not* subtracted, as principal component analysis usually has it: that would turn every embedding by an
    angle of its own, and the student would follow other distances than the teacher's. Where the mean is long, the first
    axis is about its direction. Signs are such that the largest entry of an axis is positive, on every machine.

    Args:
        cache: its images under ``train/`` are fitted, all of them where there is no such folder; of more than
            :data:`MAX_ROWS` as many evenly spaced ones. All views count.
        num_axes: how many, at most as many as there are features or embeddings.

    Raises:
        ValueError: more than that, or an embedding is damaged.
    """
    check_count("number of axes", num_axes)
    rows = np.flatnonzero(np.strings.startswith(cache.paths, TRAINING))
    rows = rows if len(rows) else np.arange(len(cache))
    if len(rows) > MAX_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_ROWS).round().astype(int)]
    features, views = cache.description.features, len(cache.description.views)
    if num_axes > min(features, len(rows) * views):
        raise LipsimError(
            f"expected at most {min(features, len(rows) * views)} axes of {len(rows) * views} embeddings of {features} "
            f"features in {cache.folder}, got {num_axes}; ask for fewer, or make a cache of more images"
        )
    moment = torch.zeros(features, features, dtype=torch.float64)
    for part in np.array_split(rows, -(-len(rows) // 1024)):
        embeddings = torch.from_numpy(np.concatenate([cache.embeddings(int(row)) for row in part])).double()
        moment += embeddings.T @ embeddings
    axes = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :num_axes]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    signed: Tensor = axes * largest.sign()
    return signed.float().contiguous()
