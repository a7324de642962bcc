"""The perceptual metric: distances with certificates, and the files that hold it."""

from lipsim.metric.distance import Distance
from lipsim.metric.encoders import register_encoder
from lipsim.metric.files import load, save
from lipsim.metric.image_files import FileCertificate, certify_files, original_radii
from lipsim.metric.perceptual_metric import PerceptualMetric

__all__ = [
    "Distance",
    "FileCertificate",
    "PerceptualMetric",
    "certify_files",
    "load",
    "original_radii",
    "register_encoder",
    "save",
]
