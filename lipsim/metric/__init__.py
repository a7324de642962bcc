"""The perceptual metric: distances with certificates, and the files that hold it."""

from lipsim.metric.distance import Distance
from lipsim.metric.encoders import register_encoder
from lipsim.metric.files import load, save
from lipsim.metric.image_files import (
    FileCertificate,
    SmoothedFileCertificate,
    certify_files,
    original_radii,
    smooth_files,
)
from lipsim.metric.modules import ImageDistance
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.smoothed import SmoothedMetric
from lipsim.metric.tiles import TiledMetric

__all__ = [
    "Distance",
    "FileCertificate",
    "ImageDistance",
    "PerceptualMetric",
    "SmoothedFileCertificate",
    "SmoothedMetric",
    "TiledMetric",
    "certify_files",
    "load",
    "original_radii",
    "register_encoder",
    "save",
    "smooth_files",
]
