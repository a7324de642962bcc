"""The perceptual metric: distances with certificates, and the files that hold it."""

from lipsim.metric.combinations import average_weights, join
from lipsim.metric.comparisons import Comparison, FileDistance, SameCertificate, compare_files, rank_files, same_files
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
from lipsim.metric.saturating_sum import SaturatingSum
from lipsim.metric.smoothed import SmoothedMetric
from lipsim.metric.thresholds import Threshold
from lipsim.metric.tiles import TiledMetric

__all__ = [
    "Comparison",
    "Distance",
    "FileCertificate",
    "FileDistance",
    "ImageDistance",
    "PerceptualMetric",
    "SameCertificate",
    "SaturatingSum",
    "SmoothedFileCertificate",
    "SmoothedMetric",
    "Threshold",
    "TiledMetric",
    "average_weights",
    "certify_files",
    "compare_files",
    "join",
    "load",
    "original_radii",
    "rank_files",
    "register_encoder",
    "same_files",
    "save",
    "smooth_files",
]
