"""Data module of a folder of classes, to search in."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from lipsim.data.labelled import LabelledBatch, LabelledImages, collate_labelled
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.datamodules.base import TripletData
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


class LabelledFolderData(TripletData):
    """Images with labels: a gallery to search in and queries to search with, ``PART/CLASS/…/IMAGE``.

    It is for :class:`lipsim.callbacks.CertifyRetrieval`; nothing is trained on it. The classes are those of the
    gallery, see :class:`lipsim.data.sets.labelled_folder.LabelledFolder`. No query is in the gallery: the parts are
    different folders, neither of them within the other, and no file is in both, by links for example.

    Args:
        root: folder that has both parts; nothing is downloaded.
        gallery: folder of the images that are searched in, relative to it.
        queries: folder of those that are searched with.
        image_size: side to which the images are resized.
        resize: "float" or "pil", as in :class:`TripletData`.
        batch_size: images in a batch of one process.
        num_workers: loading processes.
        name: of the set in results, for reports of several folders.

    Raises:
        ValueError: a part is the other one, or within it.
    """

    def __init__(
        self,
        root: Path = Path("data/photos"),
        gallery: str = "train",
        queries: str = "val",
        image_size: int = 64,
        resize: str | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        name: str = "search",
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, resize)
        self.root, self.gallery_part, self.query_part, self.set_name = user_path(root), gallery, queries, name
        self.gallery: LabelledFolder | None = None
        self.queries: LabelledImages | None = None
        self.collate = collate_labelled
        searched, asked = (self.root / gallery).resolve(), (self.root / queries).resolve()
        if searched == asked:
            raise LipsimError(f"expected queries in another folder than the gallery, got {gallery} for both")
        if searched.is_relative_to(asked) or asked.is_relative_to(searched):  # each image of the one is in the other
            raise LipsimError(
                f"expected queries and gallery in folders beside each other, got {queries} and {gallery}, of which one "
                "is within the other"
            )

    @property
    def test_names(self) -> list[str]:
        """The one set."""
        return [self.set_name]

    def setup(self, stage: str) -> None:
        """List both folders.

        Raises:
            FileNotFoundError: one is missing or has no images.
            ValueError: another stage than a test, images outside the folder of a class, queries of other classes, or a
                query that is a file of the gallery.
        """
        if stage != "test":
            raise LipsimError("a gallery with queries is for `lipsim evaluate`; train on other data")
        assert self.preprocess is not None
        self.gallery = LabelledFolder(self.root / self.gallery_part, self.preprocess)
        own = LabelledFolder(self.root / self.query_part, self.preprocess, self.gallery.classes)
        searched = set(_files(self.gallery))
        if twice := [str(name) for name, file in zip(own.names, _files(own), strict=True) if file in searched]:
            raise LipsimError(
                f"{len(twice)} of {len(own)} queries in {own.folder} are files of the gallery {self.gallery.folder}, "
                f"too (first: {twice[0]}), and would find themselves; take the links away"
            )
        self.queries = LabelledImages(own, self.preprocess, self.gallery)

    def test_dataloader(self) -> list[DataLoader[LabelledBatch]]:
        assert self.queries is not None
        return [self._loader(self.queries)]


def _files(images: LabelledFolder) -> list[tuple[int, int] | Path]:
    """Device and number of each file, behind all links; its path where a file system has no numbers."""
    paths = [images.folder / str(name) for name in images.names]
    states = [path.stat() for path in paths]
    return [(s.st_dev, s.st_ino) if s.st_ino else path.resolve() for s, path in zip(states, paths, strict=True)]
