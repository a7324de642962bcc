"""Certifiably robust perceptual similarity metrics."""

from lipsim.export import load
from lipsim.metric import PerceptualMetric, TwoAFCCertificate

__version__ = "0.1.0"

__all__ = ["PerceptualMetric", "TwoAFCCertificate", "__version__", "load"]
