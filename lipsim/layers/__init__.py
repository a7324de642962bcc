"""1-Lipschitz layers. Each bounds its own Lipschitz constant; :mod:`lipsim.audit` composes the bounds."""

from lipsim.layers.activations import GroupSort, Householder, MaxMin
from lipsim.layers.adapters import AOCConv2d, ExplicitConv2d, ExplicitLinear, SpectralConv2d, SpectralLinear
from lipsim.layers.aol import AOLConv2d, AOLLinear
from lipsim.layers.base import LipschitzLayer, evaluation_mode, exact_copy, freeze, unfreeze
from lipsim.layers.cpl import CPLConv2d, CPLLinear
from lipsim.layers.explicit import FoldedResidualConv2d, FoldedResidualLinear, explicit_copy
from lipsim.layers.mixing import Branches, ParallelMixing, ResidualMixing
from lipsim.layers.orthogonal import OrthogonalLinear, OrthogonalPatches
from lipsim.layers.reshape import (
    Centering,
    ChannelPadding,
    ChannelShift,
    L2NormPool2d,
    ScaledAvgPool2d,
    SpaceToDepth,
    Truncation,
)
from lipsim.layers.scattering import Scattering
from lipsim.layers.sll import SLLConv2d, SLLLinear

__all__ = [
    "AOCConv2d",
    "AOLConv2d",
    "AOLLinear",
    "Branches",
    "CPLConv2d",
    "CPLLinear",
    "Centering",
    "ChannelPadding",
    "ChannelShift",
    "ExplicitConv2d",
    "ExplicitLinear",
    "FoldedResidualConv2d",
    "FoldedResidualLinear",
    "GroupSort",
    "Householder",
    "L2NormPool2d",
    "LipschitzLayer",
    "MaxMin",
    "OrthogonalLinear",
    "OrthogonalPatches",
    "ParallelMixing",
    "ResidualMixing",
    "SLLConv2d",
    "SLLLinear",
    "ScaledAvgPool2d",
    "Scattering",
    "SpaceToDepth",
    "SpectralConv2d",
    "SpectralLinear",
    "Truncation",
    "evaluation_mode",
    "exact_copy",
    "explicit_copy",
    "freeze",
    "unfreeze",
]
