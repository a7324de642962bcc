"""The perceptual metric: distances with certificates, and the files that hold it."""

from lipsim.metric.files import load, save
from lipsim.metric.perceptual_metric import PerceptualMetric

__all__ = ["PerceptualMetric", "load", "save"]
