"""Checks of batches: images in their range, triplets with votes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipsim.data.labelled import LabelledBatch
from lipsim.data.triplet import Triplet
from lipsim.utils.checks import check_range
from lipsim.utils.errors import LipsimError


def images_of(batch: Any) -> Tensor:
    """All images of a batch, ``(M, 3, H, W)``: of triplets, of images with labels, or the batch itself."""
    if isinstance(batch, Triplet):
        return torch.cat(batch.images())
    if isinstance(batch, LabelledBatch):
        return batch.images
    images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return images


def check_images(batch: Any) -> None:
    """Refuse a batch of images that an encoder should never see.

    Raises:
        ValueError: NaN or infinite values, or values outside [0, 1].
    """
    where = f" (triplets {batch.index.tolist()[:8]}…)" if isinstance(batch, Triplet) else ""
    for images in batch.images() if isinstance(batch, Triplet) else (images_of(batch),):
        check_range(images, where)


def check_votes(batch: Triplet) -> None:
    """Refuse triplets that nobody has judged: a score of them would be an invention.

    Raises:
        ValueError: votes that are NaN or outside [0, 1].
    """
    bad = batch.index[~((batch.right_vote >= 0) & (batch.right_vote <= 1))]
    if len(bad):
        raise LipsimError(f"triplets {bad.tolist()[:8]} have no vote in [0, 1]; give the votes or leave them out")
