"""1-Lipschitz encoders: each is a sequence of layers that :mod:`lipsim.audit` can bound."""

from lipsim.students.hierarchical import HierarchicalSLL
from lipsim.students.projection import OrthogonalProjection
from lipsim.students.sll_network import SLLNetwork

__all__ = ["HierarchicalSLL", "OrthogonalProjection", "SLLNetwork"]
