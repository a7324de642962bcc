"""Data module of a table of triplets."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lipsim.certificates.numbers import check_count
from lipsim.data.contracts import TripletSet
from lipsim.datamodules.base import OnError, TripletData
from lipsim.utils.paths import user_path


class TableData(TripletData):
    """Anyone's 2AFC study: a CSV file of triplets with votes (:class:`lipsim.data.sets.table.TableTriplets`).

    Training, validation and test are what its column ``split`` says. Without that column its *references* are divided:
    all triplets of one are in one part. Each part is evaluated as ``table``, and by the groups of its column ``group``.

    Args:
        file: the table; its paths are relative to its folder.
        image_size: side to which the images are resized.
        resize: "float" or "pil", as in :class:`TripletData`.
        framing: "stretch", "center-crop" or "pad", as in :class:`TripletData`.
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader.
        columns: what columns are called in the file, where not by our names, such as ``{"reference": "img_pivot"}``.
        val_fraction: share of the references that are for validation, where there is no column ``split``.
        test_fraction: share of those that are for testing; 1 tests on the whole table.
        implied: training triplets besides, of the training's images, with the votes that an ordinal embedding of its
            votes implies, see :func:`lipsim.data.ordinal.implied_votes`; for few images in many triplets. Weigh them by
            agreement.
        seed: of that draw and of the implied triplets.
        name: of the set in results, for reports of several studies.
        pack: a pack of the table's folder (``lipsim data pack``), whose images are read instead of the files.
        eight_bit: as in :class:`TripletData`.
        device_transforms: as in :class:`TripletData`.
        on_error: "fail" or "skip" of training images that cannot be read, as in :class:`TripletData`.
    """

    def __init__(
        self,
        file: Path = Path("data/triplets.csv"),
        image_size: int = 64,
        resize: str | None = None,
        framing: str | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        columns: dict[str, str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        implied: int = 0,
        seed: int = 0,
        name: str = "table",
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
            framing,
            eight_bit=eight_bit,
            device_transforms=device_transforms,
            on_error=on_error,
        )
        self.implied = check_count("implied", implied, least=0)
        self.file, self.set_name = user_path(file), name
        self.columns, self.seed, self.pack = columns, seed, pack
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def setup(self, stage: str) -> None:
        """Read the table, and list the image folders to see that nothing is missing."""
        if stage == "fit" and self.train_set is None:
            parts = self._parts(["train", "val"])
            self.train_set, self.val_sets = parts["train"], {self.set_name: parts["val"]}
            self._imply_votes(self.implied, self.seed)
        if stage == "validate" and not self.val_sets:
            self.val_sets = {self.set_name: self._parts(["val"])["val"]}
        if stage == "test" and not self.test_sets:
            self.test_sets = {self.set_name: self._parts(["test"])["test"]}

    def _parts(self, names: list[str]) -> dict[str, TripletSet]:
        return self._open(
            "table",
            names,
            self.file,
            columns=self.columns,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
            pack=self.pack,
            eight_bit=self.eight_bit,
        )
