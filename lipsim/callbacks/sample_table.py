"""Rows of numbers, one a sample, gathered over processes, each position of a set once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim.utils import files
from lipsim.utils.sampling import unique_first


class SampleTable:
    """Collects columns of per-sample numbers over batches; :meth:`gather` brings all processes' rows together."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}

    def append(self, index: Tensor, columns: Mapping[str, Tensor], position: Tensor | None = None) -> None:
        """Add rows: ``index`` (N,) int64, columns (N,), ``position`` (N,) int64 in the set, by default the index."""
        position = index if position is None else position
        for name, column in {"index": index, "position": position, **columns}.items():
            self._columns.setdefault(name, []).append(column.detach())

    def gather(self) -> dict[str, Tensor]:
        """All rows of all processes in the order of the position, repeated ones once, on the CPU.

        Every process must call this, also one without rows; every process gets the same.
        """
        own = {name: torch.cat(parts).cpu() for name, parts in self._columns.items()}
        found = [columns for columns in gather_objects(own) if columns]
        if not found:
            return {}
        gathered = {name: torch.cat([columns[name] for columns in found]) for name in found[0]}
        _, first = unique_first(gathered["position"])
        return {name: column[first] for name, column in gathered.items()}

    def positions(self) -> list[int]:
        """Position of each row of this process, in the order in which they came."""
        return torch.cat(self._columns["position"]).tolist() if self._columns else []


def gather_objects(value: Any) -> list[Any]:
    """What each process gives, in the order of their ranks, on every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def rows_by_group(rows: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Gathered rows of each group that has any.

    Args:
        rows: columns ``(M,)`` with the position among them, as :meth:`SampleTable.gather` returns them.
        groups: name → ``(N,)`` bool mask over the positions of the set.
    """
    chosen = {name: mask[rows["position"]] for name, mask in groups.items()}
    return {
        name: {key: column[mask] for key, column in rows.items()} for name, mask in chosen.items() if bool(mask.any())
    }


def csv_columns(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathered rows as a file has them: with the position only where it is not the index."""
    same = torch.equal(rows["index"], rows["position"])
    return {name: column for name, column in rows.items() if name != "position" or not same}


def write_csv(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write columns of equal length with a header; floats keep the digits that bring them back. Replaces as a whole."""
    files.write_csv(path, columns, zip(*(column.tolist() for column in columns.values()), strict=True))
