"""1-Lipschitz encoders: each is a sequence of layers that :mod:`lipsim.audit` can bound."""

from lipsim.students.folded_network import FoldedNetwork
from lipsim.students.orthogonal_shift import OrthogonalShiftNetwork
from lipsim.students.projection import OrthogonalProjection
from lipsim.students.scattering import ScatteringNetwork, ScatteringTransform
from lipsim.students.sll_network import SLLNetwork
from lipsim.students.torchlip_network import TorchlipNetwork

__all__ = [
    "FoldedNetwork",
    "OrthogonalProjection",
    "OrthogonalShiftNetwork",
    "SLLNetwork",
    "ScatteringNetwork",
    "ScatteringTransform",
    "TorchlipNetwork",
]
