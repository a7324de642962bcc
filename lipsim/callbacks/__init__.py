"""Callbacks that certify and attack in validation and test, on any number of processes."""

import lipsim.utils.matplotlib_backend  # noqa: F401  before Lightning, which imports matplotlib
from lipsim.callbacks.attack_robustness import AttackRobustness
from lipsim.callbacks.base import TripletCallback
from lipsim.callbacks.certify_radii import CertifyRadii
from lipsim.callbacks.certify_retrieval import CertifyRetrieval
from lipsim.callbacks.certify_smoothed import CertifySmoothed
from lipsim.callbacks.certify_sum import CertifySum
from lipsim.callbacks.export_metric import ExportMetric
from lipsim.callbacks.interruption import Interruption
from lipsim.callbacks.null_space_robustness import NullSpaceRobustness
from lipsim.callbacks.progress_bar import RunProgressBar
from lipsim.callbacks.progress_lines import ProgressLines
from lipsim.callbacks.run_folder import RunCheckpoint, RunFolder, SaveOnException
from lipsim.callbacks.run_report import RunReport
from lipsim.callbacks.triplet_gallery import TripletGallery

__all__ = [
    "AttackRobustness",
    "CertifyRadii",
    "CertifyRetrieval",
    "CertifySmoothed",
    "CertifySum",
    "ExportMetric",
    "Interruption",
    "NullSpaceRobustness",
    "ProgressLines",
    "RunCheckpoint",
    "RunFolder",
    "RunProgressBar",
    "RunReport",
    "SaveOnException",
    "TripletCallback",
    "TripletGallery",
]
