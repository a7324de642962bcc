"""Certifiably robust perceptual similarity metrics."""

import lipsim.utils.matplotlib_backend  # noqa: F401  first, before what imports matplotlib
from lipsim import attacks, audit, certificates, data, students, teachers
from lipsim.certificates import TwoAFCCertificate
from lipsim.metric import PerceptualMetric, load

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
