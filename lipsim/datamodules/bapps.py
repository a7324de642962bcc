"""Data module of BAPPS."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from lipsim.data.sets.bapps import BappsTriplets
from lipsim.datamodules.base import OnError, TripletData
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


class BappsData(TripletData):
    """BAPPS 2AFC (Zhang et al. 2018), evaluated as ``bapps``, all triplets alike, and by subset.

    The test set is the official validation part, on which the field reports; validation holds triplets out of the
    training part, so that nothing is chosen by what is reported. A test needs the official validation part only.

    Args:
        root: folder that has 2afc/; nothing is downloaded.
        image_size: side to which the patches are resized.
        resize: "float" or "pil", as in :class:`TripletData`.
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader.
        train_subsets: by name; None: traditional, cnn and mix.
        test_subsets: by name; None: traditional, cnn, superres, deblur, color and frameinterp.
        val_triplets: held out of the training part.
        seed: of the choice of these.
        pack: a pack of ``root`` (``lipsim data pack``), whose images are read instead of the files.
        eight_bit: as in :class:`TripletData`.
        device_transforms: as in :class:`TripletData`.
        on_error: "fail" or "skip" of training images that cannot be read, as in :class:`TripletData`.
    """

    def __init__(
        self,
        root: Path = Path("data/bapps"),
        image_size: int = 64,
        resize: str | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        train_subsets: list[str] | None = None,
        test_subsets: list[str] | None = None,
        val_triplets: int = 2000,
        seed: int = 0,
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
        if val_triplets < 1:
            raise LipsimError(f"expected val_triplets of at least 1, got {val_triplets}")
        self.root = user_path(root)
        self.train_subsets, self.test_subsets = train_subsets, test_subsets
        self.val_triplets, self.seed, self.pack = val_triplets, seed, pack

    def setup(self, stage: str) -> None:
        """List the files that the stage needs.

        Raises:
            ValueError: validation would leave nothing to train on.
        """
        if stage in ("fit", "validate") and self.train_set is None:
            whole = self._part("train", self.train_subsets)
            if len(whole) <= self.val_triplets:
                raise LipsimError(
                    f"val_triplets = {self.val_triplets} leave nothing to train on; BAPPS at {self.root} has "
                    f"{len(whole)} training triplets"
                )
            rows = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.seed))
            held_out, rest = rows[: self.val_triplets].sort().values, rows[self.val_triplets :].sort().values
            self.train_set, self.val_sets = whole.select(rest), {"bapps": whole.select(held_out)}
        if stage == "test" and not self.test_sets:
            self.test_sets = {"bapps": self._part("val", self.test_subsets)}

    def _part(self, part: str, subsets: list[str] | None) -> BappsTriplets:
        return cast(
            BappsTriplets,
            self._open("bapps", [part], self.root, subsets=subsets, pack=self.pack, eight_bit=self.eight_bit)[part],
        )
