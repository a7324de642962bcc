"""Images of a folder with a teacher's embeddings from a cache, for distillation."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lipsim.data.embeddings.cache import COMMAND, EmbeddingCache
from lipsim.data.sets.folder import VIEWS, FolderImages
from lipsim.utils.errors import LipsimError

CHECKED_FILES = 32  # when a set is opened; every file is checked whenever it is read


class EmbeddedImages(NamedTuple):
    """A batch of images ``(N, 3, H, W)`` with the teacher's embedding ``(N, D)`` of each."""

    images: Tensor
    embedding: Tensor


class EmbeddedFolder(Dataset[EmbeddedImages]):
    """The images of a folder, each with the teacher's embedding of the very view that is shown.

    Args:
        images: the images.
        cache: embeddings of the same images.
        prefix: path of the folder relative to that of the cached images, such as "train/".

    Raises:
        ValueError: the cache lacks images or views, is of another transform, or of other content (of 32 images here, of
            every other when it is read).
    """

    def __init__(self, images: FolderImages, cache: EmbeddingCache, prefix: str) -> None:
        cache.check_images(images)
        self.images, self.cache = images, cache
        self.rows = cache.find(np.strings.add(os.fsencode(prefix), images.names))
        lacking = np.flatnonzero(self.rows < 0)
        if len(lacking):
            raise LipsimError(
                f"{len(lacking)} of {len(images)} images in {images.folder} are not in the cache {cache.folder} "
                f"(first: {prefix}{os.fsdecode(bytes(images.names[lacking[0]]))}); run {COMMAND} again with the folder "
                "of data.root as --images, it embeds what is missing"
            )
        for index in np.linspace(0, len(images) - 1, min(len(images), CHECKED_FILES)).astype(int):
            self._content(int(index))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EmbeddedImages:
        """One image ``(3, S, S)`` and the embedding ``(D,)`` of its view."""
        image = self.images.load(index, self._content(index))
        view = self.images.draw_view(index)
        return EmbeddedImages(VIEWS[view](image), self.cache.embedding(int(self.rows[index]), view))

    def _content(self, index: int) -> bytes | None:
        """The file of an image, which is the one that was embedded; None where the image is in a pack."""
        file, packed = self.images.path(index), self.images.sha256(index)
        if packed is not None:
            self.cache.check_sha256(int(self.rows[index]), file, packed)
            return None
        content = file.read_bytes()
        self.cache.check_content(int(self.rows[index]), file, content)
        return content
