"""Lipschitz bounds: proven ones, lower ones that an attack reaches, and what bounds stand on."""

from lipsim.audit.bounds import (
    LayerBound,
    LipschitzReport,
    UnboundedModuleError,
    conv2d_bound,
    linear_bound,
    lipschitz_bound,
)

__all__ = ["LayerBound", "LipschitzReport", "UnboundedModuleError", "conv2d_bound", "linear_bound", "lipschitz_bound"]
