"""Devices that are not there."""

from __future__ import annotations

import pytest
import torch

from lipsim.evaluation.processes import processes
from lipsim.utils.errors import LipsimError


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "nonsense"])
def test_accelerators_that_are_not_there_are_refused_in_one_line(accelerator: str) -> None:
    with pytest.raises(LipsimError, match=f"no 1 device.* of the accelerator '{accelerator}' here"):
        processes(accelerator)
