"""The branch that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from lipsim.certificates.numbers import check_count
from lipsim.teachers.branch import RANDOM, Branch, BranchConfig
from lipsim.teachers.timm_branch import TimmBranch
from lipsim.utils.errors import LipsimError


def build_branch(config: BranchConfig, image_size: int) -> Branch:
    """The branch that a configuration names, with its weights where it names some.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: an unknown model, a feature or layers that it does not have, or weights that do not fit.
    """
    size = image_size if config.input_size is None else check_count("input_size", config.input_size)
    kind: Callable[[BranchConfig, int], Branch] = TimmBranch
    if config.model.startswith("open_clip/"):
        # open_clip takes seconds to import, which nobody should wait for who does not use it.
        from lipsim.teachers.open_clip_branch import OpenClipBranch

        kind = OpenClipBranch
    try:
        branch = kind(config, size)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise LipsimError(f"cannot build {config.model} with {config.options or 'its own options'}: {error}") from error
    if config.weights != RANDOM:
        branch.load(config.weights)
    return branch
