"""1-Lipschitz layers. Each bounds its own Lipschitz constant; :mod:`lipsim.audit` composes the bounds."""

from lipsim.layers.activations import MaxMin
from lipsim.layers.base import LipschitzLayer, freeze, unfreeze
from lipsim.layers.orthogonal import OrthogonalLinear
from lipsim.layers.reshape import Centering, ChannelPadding, ScaledAvgPool2d, SpaceToDepth, Truncation
from lipsim.layers.sll import SLLConv2d, SLLLinear

__all__ = [
    "Centering",
    "ChannelPadding",
    "LipschitzLayer",
    "MaxMin",
    "OrthogonalLinear",
    "SLLConv2d",
    "SLLLinear",
    "ScaledAvgPool2d",
    "SpaceToDepth",
    "Truncation",
    "freeze",
    "unfreeze",
]
