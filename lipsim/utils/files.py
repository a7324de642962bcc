"""Files and what is in them: hashes, and removing what a run has left."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def remove_files(directory: Path, patterns: Iterable[str], keep: Collection[Path] = ()) -> None:
    """Remove files that match one of some patterns, and folders that this empties.

    Args:
        directory: where they are; it stays.
        patterns: of paths relative to it.
        keep: files, and folders whose files stay.
    """
    for path in [path for pattern in patterns for path in directory.glob(pattern)]:
        if path.is_file() and path not in keep and path.parent not in keep:
            path.unlink()
            if path.parent != directory and not any(path.parent.iterdir()):
                path.parent.rmdir()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a state dict: which weights a number belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
