"""The branch that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lipsim.certificates.numbers import check_count
from lipsim.teachers.branch import RANDOM, Branch, BranchConfig
from lipsim.teachers.timm_branch import TimmBranch
from lipsim.utils.errors import LipsimError

# Arguments by which timm and open_clip read files or fetch something. What a metric's file says of its encoder is a
# stranger's: it describes layers, and weights come from where the caller says.
_OUTSIDE = re.compile(r"pretrained|checkpoint|cache|path|file|url|^hf_|hub")


def build_branch(config: BranchConfig, image_size: int) -> Branch:
    """The branch that a configuration names, with its weights where it names some.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: an unknown model, a feature or layers that it does not have, options that would read a file or fetch
            one, or weights that do not fit.
    """
    _check_describes_layers(config.model, config.options)
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


def _check_describes_layers(model: str, options: Any) -> None:
    """Refuse a name or options by which a library would read a file, or fetch one.

    Raises:
        ValueError: they would.
    """
    if ":" in model:  # hf-hub:, local-dir:
        raise LipsimError(f"expected the name of a model, got {model!r}; weights go into the field weights")
    items = options.items() if isinstance(options, dict) else enumerate(options) if isinstance(options, list) else ()
    for key, value in items:
        if isinstance(key, str) and _OUTSIDE.search(key):
            raise LipsimError(f"expected options that describe the layers of {model}, got {key}")
        if isinstance(value, str) and (":" in value or "/" in value):
            raise LipsimError(f"expected options that describe the layers of {model}, got {key} = {value!r}")
        _check_describes_layers(model, value)
