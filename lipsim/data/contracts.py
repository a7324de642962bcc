"""What an evaluation asks of its data: the contracts of a set of triplets and of a data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet
from lipsim.utils.progress import Progress

Parts = Mapping[str, Tensor]


@runtime_checkable
class Listed(Protocol):
    """A data set that says what it consists of."""

    def manifest(self) -> Sequence[str]:
        """Names of files and votes, a line a triplet, without reading an image; none where the images say it all."""


@runtime_checkable
class Resized(Protocol):
    """A data set that says how its images are resized."""

    @property
    def preprocess(self) -> Preprocess | None:
        """How files become the images of the triplets; None where no image is resized: any metric can take them."""


@runtime_checkable
class Grouped(Protocol):
    """A data set that names parts of itself."""

    @property
    def groups(self) -> Parts:
        """Parts that are scored apart as well: name → ``(N,)`` bool mask over the set."""


@runtime_checkable
class TripletSet(Listed, Resized, Grouped, Protocol):
    """Triplets with votes by their position.

    A set of somebody's own may lack any of it, and is asked for each apart.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Triplet: ...


@runtime_checkable
class Implying(Protocol):
    """A set of triplets of which few images are in many, so that their votes imply others."""

    def with_implied(self, count: int, *, seed: int = 0, progress: Progress | None = None) -> TripletSet:
        """These and more triplets of the same images, see :func:`lipsim.data.ordinal.implied_votes`."""


@runtime_checkable
class TripletDataModule(Protocol):
    """A Lightning data module that says what its loaders serve.

    One of somebody's own may lack any of it: :func:`facts_of` reads what is there.
    """

    @property
    def preprocess(self) -> Preprocess | None:
        """As of :class:`TripletSet`; known before :meth:`setup`."""

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders."""

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of their loaders."""

    @property
    def val_groups(self) -> Mapping[str, Parts]:
        """Parts of each validation set that are scored apart as well, see :attr:`test_groups`."""

    @property
    def test_groups(self) -> Mapping[str, Parts]:
        """Set name → part name → ``(N,)`` bool mask over the set."""

    def follow(self, preprocess: Preprocess) -> None:
        """Resize and frame as a metric expects, unless told otherwise when made; to be called before :meth:`setup`."""

    def setup(self, stage: str) -> None: ...

    def val_dataloader(self) -> Any: ...

    def test_dataloader(self) -> Any: ...


@dataclass(frozen=True)
class DataFacts:
    """What a data module says of the sets of one stage.

    Attributes:
        names: of the sets, in the order of their loaders; may be fewer than these.
        groups: set name → part name → mask over the set.
        preprocess: how image files are resized; None: no image is, or ``tells_resize`` is false.
        tells_resize: whether it says so.
    """

    names: list[str]
    groups: Mapping[str, Parts]
    preprocess: Preprocess | None
    tells_resize: bool


def facts_of(data: object, stage: Literal["val", "test"]) -> DataFacts:
    """What a data module says of itself, of :class:`TripletDataModule`; None, for loaders without one, says nothing."""
    return DataFacts(
        names=list(getattr(data, f"{stage}_names", None) or []),
        groups=getattr(data, f"{stage}_groups", None) or {},
        preprocess=getattr(data, "preprocess", None),
        tells_resize=hasattr(data, "preprocess"),
    )


def groups_of(dataset: object) -> Parts:
    """The parts of a data set that are scored apart as well; none where it names none."""
    return dataset.groups if isinstance(dataset, Grouped) else {}


def resizes_of(dataset: object) -> set[str]:
    """How a data set resizes its image files, :attr:`lipsim.data.Preprocess.way`; empty where nobody says.

    Through torch's subsets and concatenations.
    """
    if isinstance(dataset, Subset):
        return resizes_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return {resize for part in dataset.datasets for resize in resizes_of(part)}
    preprocess = dataset.preprocess if isinstance(dataset, Resized) else None
    return {preprocess.way} if isinstance(preprocess, Preprocess) else set()
