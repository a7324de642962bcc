"""Certifiably robust perceptual similarity metrics."""

import lipsim._matplotlib  # noqa: F401  first, before what imports matplotlib
from lipsim import attacks, audit, certificates, data, students, teachers
from lipsim.export import load
from lipsim.metric import PerceptualMetric, TwoAFCCertificate

__version__ = "0.1.0"

__all__ = [
    "PerceptualMetric",
    "TwoAFCCertificate",
    "__version__",
    "attacks",
    "audit",
    "certificates",
    "data",
    "load",
    "students",
    "teachers",
]
