"""Rows of numbers keyed by sample index, gathered over processes, each sample once."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lipsim.metrics import unique_first


class SampleTable:
    """Collects columns of per-sample numbers over batches; :meth:`gather` brings all processes' rows together."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}

    def append(self, index: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Add rows: ``index`` (N,) int64 and columns (N,)."""
        for name, column in {"index": index, **columns}.items():
            self._columns.setdefault(name, []).append(column.detach())

    def gather(self) -> dict[str, Tensor]:
        """All rows of all processes in the order of the sample index, repeated samples once, on the CPU.

        Every process must call this; every process gets the same.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        gathered = {}
        for name, parts in self._columns.items():
            column = torch.cat(parts)
            gathered[name] = torch.cat(gather_all_tensors(column) if distributed else [column]).cpu()
        if not gathered:
            return {}
        _, first = unique_first(gathered["index"])
        return {name: column[first] for name, column in gathered.items()}


def rows_by_group(rows: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Gathered rows of each group that has any.

    Args:
        rows: columns ``(M,)`` with the sample index among them, as :meth:`SampleTable.gather` returns them.
        groups: name → ``(N,)`` bool mask over the samples of the set.
    """
    chosen = {name: mask[rows["index"]] for name, mask in groups.items()}
    return {
        name: {key: column[mask] for key, column in rows.items()} for name, mask in chosen.items() if bool(mask.any())
    }


def write_csv(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write columns of equal length with a header; floats keep the digits that bring them back. Replaces as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    os.replace(temporary, path)
