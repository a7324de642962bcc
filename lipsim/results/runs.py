"""Runs to compare: which there are, and whether they saw the same data."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lipsim.results.file import data_hashes, read_results
from lipsim.results.schema import (
    AttackedSection,
    AttackedSet,
    BenchmarkSection,
    CertifiedSection,
    CertifiedSet,
    NullSpaceSet,
    Results,
    RetrievalSection,
    RetrievalSet,
    SmoothedSection,
    SmoothedSet,
    Source,
    SummedSection,
    SummedSet,
)
from lipsim.results.seeds import by_name
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


@dataclass(frozen=True)
class Run:
    """One run: the name that tables give it, its directory and the contents of its results.json."""

    name: str
    directory: Path
    results: Results

    @property
    def certified(self) -> CertifiedSection | None:
        """What was certified, if it was."""
        return self.results.get("certified")

    @property
    def smoothed(self) -> SmoothedSection | None:
        """What randomized smoothing certified, if it did."""
        return self.results.get("smoothed")

    @property
    def summed(self) -> SummedSection | None:
        """What was certified of the sum with another metric, if it was."""
        return self.results.get("summed")

    @property
    def attacked(self) -> AttackedSection | None:
        """What was attacked, if it was."""
        return self.results.get("attacked")

    @property
    def benchmark(self) -> BenchmarkSection | None:
        """A row of the benchmark, if the run is one."""
        return self.results.get("benchmark")

    @property
    def retrieval(self) -> RetrievalSection | None:
        """What searches found, if there were any."""
        return self.results.get("retrieval")

    @property
    def searched_sets(self) -> Mapping[str, RetrievalSet]:
        """Set of queries → what searches with it found; empty where there were none."""
        return self.retrieval["sets"] if self.retrieval else {}

    @property
    def certified_sets(self) -> Mapping[str, CertifiedSet]:
        """Test set → what is certified there; empty where nothing was."""
        return self.certified["sets"] if self.certified else {}

    @property
    def measured(self) -> Source | None:
        """The first section that says which weights and data it is of, of what an evaluation measures."""
        found = self.certified or self.smoothed or self.summed or self.attacked or self.retrieval
        return found or self.results.get("null_space")

    @property
    def null_space_sets(self) -> Mapping[str, NullSpaceSet]:
        """Test set → what null-space search found there; empty where nothing was searched."""
        section = self.results.get("null_space")
        return section["sets"] if section else {}

    @property
    def smoothed_sets(self) -> Mapping[str, SmoothedSet]:
        """Test set → what smoothing certified there; empty where nothing was smoothed."""
        return self.smoothed["sets"] if self.smoothed else {}

    @property
    def summed_sets(self) -> Mapping[str, SummedSet]:
        """Test set → what is certified there of the sum with another metric; empty where nothing was."""
        return self.summed["sets"] if self.summed else {}

    @property
    def attacked_sets(self) -> Mapping[str, AttackedSet]:
        """Test set → what attacks left there; empty where nothing was attacked."""
        return self.attacked["sets"] if self.attacked else {}


def load_runs(paths: Sequence[str], *, seeds: bool = False) -> list[Run]:
    """Read runs that are given as ``DIRECTORY``, ``…/results.json`` or ``NAME=DIRECTORY``.

    Args:
        paths: of the runs; ``*`` in a directory stands for all that there are.
        seeds: whether several runs may have one name: they differ in their seed then, and tables have their mean.

    Raises:
        FileNotFoundError: no results.json.
        ValueError: it cannot be read, holds no scores, or two runs have one name.
    """
    runs = []
    for path in paths:
        for name, file in find_results(path):
            run = Run(name, file.parent, read_results(file))
            if not _sets(run) and not run.searched_sets and not run.benchmark:
                where = (
                    f"those of lipsim attack-tables are in {file.with_name('tables.md')}, and one with another in "
                    "lipsim attack-tables A B"
                    if "attack_tables" in run.results
                    else "run scripts/evaluate.py"
                )
                raise LipsimError(f"{file} has neither certified nor attacked scores; {where}")
            runs.append(run)
    names = [run.name for run in runs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated and not seeds:
        raise LipsimError(
            f"several runs are called {', '.join(repeated)}; tell them apart by NAME=DIRECTORY, or pass --seeds where "
            "they differ in their seed alone"
        )
    return runs


def find_results(path: str) -> list[tuple[str, Path]]:
    """Name and results.json, there or not, of a run that is given as :func:`load_runs` takes it.

    Of all the runs that a pattern means, which a shell leaves as it is in ``NAME=runs/*``.

    Raises:
        FileNotFoundError: the pattern means no folder.
    """
    name, equals, place = path.partition("=")
    folder = user_path(path).parent
    # A path whose folder has the sign in its name, as those of sweeps do, is one before its file is there.
    if not equals or user_path(path).exists() or ("=" in str(folder) and folder.is_dir()):
        name, place = "", path
    file = user_path(place) if place.endswith(".json") else user_path(place) / "results.json"
    if "*" not in place or file.exists():
        return [(name or file.absolute().parent.name, file)]
    folders = sorted(Path(path) for path in glob.glob(str(file.parent)) if Path(path).is_dir())
    if not folders:
        raise FileNotFoundError(f"no folder {place}")
    return [(name or folder.absolute().name, folder / file.name) for folder in folders]


def set_names(runs: Sequence[Run]) -> list[str]:
    """Every test set of some runs, once."""
    return list(dict.fromkeys(name for run in runs for name in _sets(run)))


def _searched(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.searched_sets))


def _sets(run: Run) -> list[str]:
    return [*run.certified_sets, *run.smoothed_sets, *run.summed_sets, *run.attacked_sets, *run.null_space_sets]


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader of the tables has to know: sets of different data under one name, one result under two seeds."""
    different = [line for name in [*set_names(runs), *_searched(runs)] if (line := different_data(runs, name))]
    return [*different, *_repeated_weights(runs)]


def _repeated_weights(runs: Sequence[Run]) -> list[str]:
    """A warning for each name under which the same weights stand twice."""
    lines = []
    for name, group in by_name((run.name, run) for run in runs).items():
        hashes = [section["weights_sha256"] for run in group if (section := run.measured)]
        if len(set(hashes)) < len(hashes):
            lines.append(f"Runs called {name} have the same weights: they are no different seeds.")
    return lines


def different_data(runs: Sequence[Run], name: str) -> str | None:
    """A warning where runs saw different data under one name."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        for fingerprint in {hashes[name] for hashes in data_hashes(run.results) if name in hashes}:
            seen.setdefault(fingerprint, []).append(run.name)
    groups = "; ".join(", ".join(names) for names in seen.values())
    return f"Different data under the name {name}: {groups}. Their scores do not compare." if len(seen) > 1 else None
