"""Training on what can be read: samples whose images cannot are left out of their batch, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from lipsim.data.transforms import UnreadableImageError


class Unread(NamedTuple):
    """Stands for a sample that could not be read."""

    sample: int
    reason: str


class PartlyRead(NamedTuple):
    """A batch, and what it lacks."""

    batch: Any
    unread: list[Unread]


class NothingRead:
    """A batch of which no sample could be read."""

    def __len__(self) -> int:
        return 0


class ReadableSamples(Dataset[Any]):
    """A data set that gives an :class:`Unread` in place of a sample whose image is missing or cannot be read.

    Args:
        source: the data set, read sample by sample.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.source[index]
        except (UnreadableImageError, OSError) as error:
            return Unread(int(index), str(error))


class ReadableBatch:
    """A ``collate_fn`` that leaves out what could not be read: batches get shorter, and nothing takes its place.

    Args:
        collate: of the samples that there are.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """The batch, as a :class:`PartlyRead` where something is missing, of :class:`NothingRead` where all is."""
        read = [sample for sample in samples if not isinstance(sample, Unread)]
        if len(read) == len(samples):
            return self.collate(read)
        batch = self.collate(read) if read else NothingRead()
        return PartlyRead(batch, [sample for sample in samples if isinstance(sample, Unread)])
