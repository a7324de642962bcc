"""Attacks on similarity metrics: one a file, pure functions on an objective that is positive where it breaks."""

from lipsim.attacks.adversary import Adversary, adversarial_triplets
from lipsim.attacks.apgd import apgd
from lipsim.attacks.auto import SuiteResult, auto
from lipsim.attacks.deep_collision import deep_collision, features_up_to
from lipsim.attacks.first_operator import FirstOperator, first_operator, require_operator
from lipsim.attacks.kernel_projection import project_to_kernel
from lipsim.attacks.level_set import Traversal, level_set
from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.minimal_norm import minimal_norm
from lipsim.attacks.null_space import NullSpaceMove, Region, null_space, null_space_after, null_space_move
from lipsim.attacks.objectives import (
    ClassificationObjective,
    ConfidenceObjective,
    DistanceObjective,
    Objective,
    TwoAFCObjective,
)
from lipsim.attacks.one_pixel import one_pixel
from lipsim.attacks.pgd import pgd
from lipsim.attacks.registry import ATTACKS, Attack
from lipsim.attacks.soft_votes import SmoothedObjective
from lipsim.attacks.square import square
from lipsim.attacks.watch import Passes, WatchedObjective

__all__ = [
    "ATTACKS",
    "Adversary",
    "Attack",
    "ClassificationObjective",
    "ConfidenceObjective",
    "DistanceObjective",
    "FirstOperator",
    "NullSpaceMove",
    "Objective",
    "Passes",
    "Region",
    "SmoothedObjective",
    "SuiteResult",
    "Traversal",
    "TwoAFCObjective",
    "WatchedObjective",
    "adversarial_triplets",
    "apgd",
    "auto",
    "deep_collision",
    "features_up_to",
    "first_operator",
    "level_set",
    "mi_fgsm",
    "minimal_norm",
    "null_space",
    "null_space_after",
    "null_space_move",
    "one_pixel",
    "pgd",
    "project_to_kernel",
    "require_operator",
    "square",
]
