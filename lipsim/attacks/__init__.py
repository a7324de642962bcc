"""Attacks on similarity metrics: one a file, pure functions on an objective that is positive where it breaks."""

from lipsim.attacks.adversary import Adversary
from lipsim.attacks.apgd import apgd
from lipsim.attacks.auto import SuiteResult, auto
from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.minimal_norm import minimal_norm
from lipsim.attacks.null_space import FirstOperator, first_operator, null_space, project_to_kernel
from lipsim.attacks.objectives import ClassificationObjective, DistanceObjective, Objective, TwoAFCObjective
from lipsim.attacks.one_pixel import one_pixel
from lipsim.attacks.pgd import pgd
from lipsim.attacks.registry import ATTACKS, Attack
from lipsim.attacks.square import square
from lipsim.attacks.watch import Passes, WatchedObjective

__all__ = [
    "ATTACKS",
    "Adversary",
    "Attack",
    "ClassificationObjective",
    "DistanceObjective",
    "FirstOperator",
    "Objective",
    "Passes",
    "SuiteResult",
    "TwoAFCObjective",
    "WatchedObjective",
    "apgd",
    "auto",
    "first_operator",
    "mi_fgsm",
    "minimal_norm",
    "null_space",
    "one_pixel",
    "pgd",
    "project_to_kernel",
    "square",
]
