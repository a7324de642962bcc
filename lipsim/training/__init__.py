"""The three stages as LightningModules, with their losses and schedules."""

import lipsim.utils.matplotlib_backend  # noqa: F401  before Lightning, which imports matplotlib
from lipsim.training.acceleration import Acceleration
from lipsim.training.distillation import Distillation
from lipsim.training.fine_tuning import FineTuning
from lipsim.training.global_batch import RateScaling
from lipsim.training.losses import (
    RMSE,
    CertifiedShare,
    Cosine,
    JointRadiusHinge,
    MarginHinge,
    RadiusHinge,
    Relational,
    ScaleFree,
)
from lipsim.training.muon import MuonWithAuxAdam
from lipsim.training.schedules import Constant, Triangular, WarmupCosine
from lipsim.training.teacher_tuning import TeacherTuning

__all__ = [
    "RMSE",
    "Acceleration",
    "CertifiedShare",
    "Constant",
    "Cosine",
    "Distillation",
    "FineTuning",
    "JointRadiusHinge",
    "MarginHinge",
    "MuonWithAuxAdam",
    "RadiusHinge",
    "RateScaling",
    "Relational",
    "ScaleFree",
    "TeacherTuning",
    "Triangular",
    "WarmupCosine",
]
