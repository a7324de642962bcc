"""Teachers: encoders whose embedding a 1-Lipschitz student learns to follow."""

from lipsim.teachers.branch import BranchConfig
from lipsim.teachers.dreamsim import DreamSim, Ensemble
from lipsim.teachers.vit import SmallViT

__all__ = ["BranchConfig", "DreamSim", "Ensemble", "SmallViT"]
