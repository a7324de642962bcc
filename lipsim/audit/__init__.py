"""Lipschitz bounds: proven ones, lower ones that an attack reaches, and what bounds stand on."""

from lipsim.audit.bounds import (
    LayerBound,
    LipschitzReport,
    UnboundedModuleError,
    conv2d_bound,
    linear_bound,
    lipschitz_bound,
)
from lipsim.audit.verdict import AuditVerdict, check

__all__ = [
    "AuditVerdict",
    "LayerBound",
    "LipschitzReport",
    "UnboundedModuleError",
    "check",
    "conv2d_bound",
    "linear_bound",
    "lipschitz_bound",
]
