"""A published teacher by its name alone: a DreamSim model, or one backbone with DreamSim's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lipsim.teachers.branch import BranchConfig
from lipsim.teachers.catalogue import BACKBONES, VARIANTS
from lipsim.teachers.dreamsim import DreamSim, Ensemble
from lipsim.teachers.packages import PACKAGE
from lipsim.utils.errors import LipsimError


def named_teacher(
    name: str,
    weights: str | Path | None = None,
    *,
    image_size: int = 224,
    input_size: int | None = None,
    layers: Sequence[int] = (),
    adapter: bool = True,
) -> Ensemble:
    """A teacher with the weights that are published for it.

    Args:
        name: one of :data:`lipsim.teachers.catalogue.VARIANTS`, else a backbone as in
            :class:`lipsim.teachers.BranchConfig`, such as "efficientnet_lite0".
        weights: file or folder; None: ``checkpoints/dreamsim`` for a DreamSim model, and the installed package for a
            backbone that has one.
        image_size: side of the images that it takes.
        input_size: of backbones, the side that images are resized to inside, see :class:`lipsim.teachers.BranchConfig`.
        layers: of backbones, the layers whose features it has in place of the last one's.
        adapter: of DreamSim models, whether to merge their LoRA adapter.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: an unknown name, an option that it does not have, or weights that do not fit.
    """
    if name in VARIANTS:
        if input_size is not None or layers:
            raise LipsimError(f"expected no input size and no layers of the DreamSim model {name}, but of a backbone")
        return DreamSim(name, "checkpoints/dreamsim" if weights is None else weights, image_size, adapter)
    known = BACKBONES.get(name)
    if weights is None:
        if known is None or not known.package:
            raise LipsimError(
                f"expected --weights, a file or a folder, for {name}: a package brings those of "
                f"{', '.join(each for each, backbone in BACKBONES.items() if backbone.package)} alone"
            )
        weights = PACKAGE
    return Ensemble([BranchConfig(name, weights, layers=tuple(layers), input_size=input_size)], image_size)
