"""How the C library gets its memory, on which a large network on a processor can spend half of its time."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of glibc's malloc.h, and what they become here.
_NEVER_TRIM = (-1, -1)  # M_TRIM_THRESHOLD
_GROW_BY_64_MIB = (-2, 2**26)  # M_TOP_PAD: room for the next block to be a little larger than the one before
_NO_MAPPINGS = (-4, 0)  # M_MMAP_MAX
_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, instead of giving it back to the system every time.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed, so that the system clears each page of each
    activation of each batch. A process that keeps its memory takes them from where the last batch's were. It then holds
    its peak, about a tenth more than otherwise, until it ends. ``benchmarks/allocator.py`` has what this is worth: much
    for convolutional teachers, nothing for our students in training. For whole programs, not for a library in somebody
    else's process: nothing calls it on import. Another C library, and a process whose environment already says how
    malloc shall be (``MALLOC_MMAP_MAX_``, ``GLIBC_TUNABLES``, …), is left as it is.

    Returns:
        whether this process keeps its memory now.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in (_NO_MAPPINGS, _NEVER_TRIM, _GROW_BY_64_MIB))
