"""Attacks on similarity metrics: one a file, pure functions on an objective that is positive where it breaks."""

from lipsim.attacks.minimal_norm import minimal_norm
from lipsim.attacks.null_space import FirstOperator, first_operator, null_space, project_to_kernel
from lipsim.attacks.objectives import DistanceObjective, Objective, TwoAFCObjective
from lipsim.attacks.pgd import pgd

__all__ = [
    "DistanceObjective",
    "FirstOperator",
    "Objective",
    "TwoAFCObjective",
    "first_operator",
    "minimal_norm",
    "null_space",
    "pgd",
    "project_to_kernel",
]
