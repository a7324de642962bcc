"""Radii and bounds that hold for every encoder with a known Lipschitz constant: pure functions on feature tensors.

Notation (all features are ``f(x)``, shape ``(N, D)``, before anchor and projection; see :mod:`.geometry`):

- ``z, z0, z1``: features of reference, left and right; ``e = (z, κ)`` with the anchor ``κ``; ``p = e/‖e‖``;
- ``w, v``: feature part and anchor part of ``p(z0) − p(z1)``; the metric prefers left where ``g = ⟨z, w⟩ + κv > 0``;
- ``lipschitz``: an upper bound ``L`` on the Lipschitz constant of the encoder, ℓ2 to ℓ2 (see :mod:`lipsim.audit`);
- ``feature_error``: ``η``, how far the given features may be from those whose answer is certified, at the clean and at
  the perturbed point together, in feature units. 0 certifies exact arithmetic; twice the largest error of one float32
  embedding certifies the answer of the deployed float32 network.

Radii are ℓ2 distances in the space of the encoder's input, ``(N,)``, and certify every perturbation strictly shorter.
:mod:`.smoothing` alone needs no Lipschitz constant; what it says holds with a probability, of another answer.
Ties, NaN and zero denominators have radius 0. Everything follows from ``‖f(x) − f(x')‖ ≤ L‖x − x'‖`` alone.

Radii and bounds are computed in float64 and rounded outward: what the rounding of the arithmetic here can be
worth is taken off, and the result is rounded down (upper bounds: up) to the dtype of the features. Signed radii and
margins, which losses push, and the published radius, which proves nothing, stay in the dtype of the features as they
are. Features of any size that float64 can hold are scaled before they are squared, and radii beyond the largest finite
number of a dtype are that number.
"""

from lipsim.certificates.classification import class_radius
from lipsim.certificates.decisions import (
    candidate_radii,
    linear_margin,
    margin,
    published_radius,
    reference_radius,
    signed_reference_radius,
)
from lipsim.certificates.distances import distance_interval, threshold_radius
from lipsim.certificates.gallery import Gallery
from lipsim.certificates.geometry import Anchored
from lipsim.certificates.joint import joint_radius, signed_joint_radius
from lipsim.certificates.level_sets import (
    ClosestApproach,
    SegmentCertificate,
    SignedRadius,
    StarCertificate,
    answer_radius,
    certify_segments,
    certify_stars,
    closest_approach,
    same_radius,
)
from lipsim.certificates.neighbours import knn_radius, recall_radius
from lipsim.certificates.pixels import certified_pixels, l1_radius, linf_radius, original_radius, resize_norm
from lipsim.certificates.rank_correlation import kendall_interval, pearson_interval, spearman_interval
from lipsim.certificates.ranking import Ranking, nearest, rank
from lipsim.certificates.retrieval import retrieval_radius
from lipsim.certificates.smoothing import (
    SmoothedCertificate,
    binomial_lower_bound,
    certify_counts,
    mean_interval,
    smoothed_mean_interval,
    smoothed_radius,
)
from lipsim.certificates.sums import Term, certify_sum, sum_interval, sum_margin
from lipsim.certificates.tiles import certify_tiles, tiled_distance_interval, tiled_margin, tiled_threshold_radius
from lipsim.certificates.triangles import TriangleCertificate, barycentric_grid, certify_triangles
from lipsim.certificates.triplets import TwoAFCCertificate, certify_triplets

__all__ = [
    "Anchored",
    "ClosestApproach",
    "Gallery",
    "Ranking",
    "SegmentCertificate",
    "SignedRadius",
    "SmoothedCertificate",
    "StarCertificate",
    "Term",
    "TriangleCertificate",
    "TwoAFCCertificate",
    "answer_radius",
    "barycentric_grid",
    "binomial_lower_bound",
    "candidate_radii",
    "certified_pixels",
    "certify_counts",
    "certify_segments",
    "certify_stars",
    "certify_sum",
    "certify_tiles",
    "certify_triangles",
    "certify_triplets",
    "class_radius",
    "closest_approach",
    "distance_interval",
    "joint_radius",
    "kendall_interval",
    "knn_radius",
    "l1_radius",
    "linear_margin",
    "linf_radius",
    "margin",
    "mean_interval",
    "nearest",
    "original_radius",
    "pearson_interval",
    "published_radius",
    "rank",
    "recall_radius",
    "reference_radius",
    "resize_norm",
    "retrieval_radius",
    "same_radius",
    "signed_joint_radius",
    "signed_reference_radius",
    "smoothed_mean_interval",
    "smoothed_radius",
    "spearman_interval",
    "sum_interval",
    "sum_margin",
    "threshold_radius",
    "tiled_distance_interval",
    "tiled_margin",
    "tiled_threshold_radius",
]
