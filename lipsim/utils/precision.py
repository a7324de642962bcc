"""Full precision, whatever the surroundings say: certificates are computed nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

# Each of these may be lowered on its own, and set_float32_matmul_precision("medium") lowers the CPU's too.
_BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # set at import
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
)


class _Settings:
    """The settings of the process, as they were before the first of the blocks that are open now."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.blocks = 0
        self.before: list[str] = []

    def enter(self) -> None:
        with self.lock:
            if not self.blocks:
                self.before = [backend.fp32_precision for backend in _BACKENDS]
            self.blocks += 1
            for backend in _BACKENDS:  # every time: something may have lowered them inside another block
                backend.fp32_precision = "ieee"

    def leave(self) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks:
                for backend, precision in zip(_BACKENDS, self.before, strict=True):
                    # What equals the setting it inherits, torch.backends.fp32_precision, inherits it again: torch does
                    # not tell whether it did.
                    backend.fp32_precision = "none"
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision


_SETTINGS = _Settings()


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast, TF32 and bf16 matrix products off inside the block, and restore the settings after it.

    Autocast belongs to a thread. The other settings belong to the process: blocks may nest and run in several threads
    at once, and the settings come back when the last one ends. Products of other threads are in full precision until
    then, and a change of these settings inside is undone.
    """
    _SETTINGS.enter()
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _SETTINGS.leave()
