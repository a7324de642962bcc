"""Data module of NIGHTS."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lipsim.data.contracts import TripletSet
from lipsim.data.sets.nights import MIN_VOTES
from lipsim.data.triplet import Split
from lipsim.datamodules.base import OnError, TripletData
from lipsim.utils.paths import user_path


class NightsData(TripletData):
    """NIGHTS (Fu et al. 2023): its splits, each evaluated as ``nights`` and by part, ImageNet references and others.

    Args:
        root: folder with data.csv, ref/ and distort/; nothing is downloaded.
        image_size: side to which the 768 × 768 images are resized.
        resize: "float" or "pil", as in :class:`TripletData`.
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader; decoding is slow, so that one feeds few images a second.
        min_votes: triplets with fewer agreeing judges are left out of every split.
        pack: a pack of ``root`` (``lipsim data pack``), whose images are read instead of the files; ``root`` then needs
            data.csv alone.
        eight_bit: as in :class:`TripletData`.
        device_transforms: as in :class:`TripletData`.
        on_error: "fail" or "skip" of training images that cannot be read, as in :class:`TripletData`.
    """

    def __init__(
        self,
        root: Path = Path("data/nights"),
        image_size: int = 224,
        resize: str | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        min_votes: int = MIN_VOTES,
        pack: Path | None = None,
        eight_bit: bool = False,
        device_transforms: list[nn.Module] | None = None,
        on_error: OnError = "fail",
    ) -> None:
        super().__init__(
            batch_size,
            num_workers,
            image_size,
            resize,
            eight_bit=eight_bit,
            device_transforms=device_transforms,
            on_error=on_error,
        )
        self.root, self.min_votes, self.pack = user_path(root), min_votes, pack

    def setup(self, stage: str) -> None:
        """Read the table, and list the image folders to see that nothing is missing."""
        if stage in ("fit", "validate") and not self.val_sets:
            self.val_sets = {"nights": self._split("val")}
        if stage == "fit" and self.train_set is None:
            self.train_set = self._split("train")
        if stage == "test" and not self.test_sets:
            self.test_sets = {"nights": self._split("test")}

    def _split(self, split: Split) -> TripletSet:
        return self._open(
            "nights", [split], self.root, min_votes=self.min_votes, pack=self.pack, eight_bit=self.eight_bit
        )[split]
