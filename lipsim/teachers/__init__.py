"""Teachers: encoders whose embedding a 1-Lipschitz student learns to follow."""

from lipsim.teachers.vit import SmallViT

__all__ = ["SmallViT"]
