"""Imports matplotlib whatever ``MPLBACKEND`` says; before anything else does, torchmetrics for one.

A notebook exports its own backend to the commands that it starts, and matplotlib refuses to be imported where the
package of that backend is not installed. The figures here need none: :mod:`lipsim.results.plots` writes files.
"""

from __future__ import annotations

import contextlib
import os
import sys

if "matplotlib" not in sys.modules:
    _backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if _backend is not None:
            os.environ["MPLBACKEND"] = _backend
    if _backend is not None:
        with contextlib.suppress(
            ValueError
        ):  # one that is not installed: matplotlib chooses when a window is asked for
            matplotlib.rcParams["backend"] = _backend
