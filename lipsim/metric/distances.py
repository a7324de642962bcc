"""Distances that every table compares with and that need no training."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from lipsim.certificates import TwoAFCCertificate, certified_pixels
from lipsim.metric.distance import Distance
from lipsim.utils.errors import LipsimError

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, the finest scale first
_WINDOW = 11


def pixel_l2(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of the pixels, ``(N, 3, H, W)`` twice to ``(N,)``; squares are summed in float64."""
    # A float32 sum of the equal squares of flat images is off by a thousand units in the last place at 224 pixels.
    difference = (x - y).flatten(1)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64).to(difference.dtype)
    return distance


def pixel_l2_certificate(reference: Tensor, left: Tensor, right: Tensor) -> TwoAFCCertificate:
    """Certificate of what :func:`pixel_l2` answers to N triplets ``(N, 3, H, W)`` in [0, 1], in closed form.

    The answer is on which side of the perpendicular bisector of the candidates the reference lies, and its radius the
    distance from there, ``|d₁² − d₀²|/(2‖left − right‖)``. A candidate that moves alone has to change its own distance
    by ``|d₁ − d₀|``. Where all move by ε each, the candidates change the difference of the distances by 2ε, and the
    reference has to come to where that is what is left of it (:func:`_joint_radius`). What float32 images, their
    differences and distances in :func:`pixel_l2` may be off by is taken off. Images that are not finite have no radius.
    """
    x, x0, x1 = (images.double().flatten(1) for images in (reference, left, right))
    near, far = (torch.linalg.vector_norm(x - other, dim=1) for other in (x0, x1))
    total, apart = near + far, torch.linalg.vector_norm(x0 - x1, dim=1)
    # Roundings to float32 lose a unit in the last place each, at the clean and at the moved point, where the distances
    # are up to twice as long. (NaN is not above 0.)
    slack = 64 * torch.finfo(torch.float32).eps * total
    free = (far - near).abs() - slack
    free = torch.where((free > 0) & torch.isfinite(free), free, 0.0)
    radius = torch.where((apart > 0) & (free > 0), free * total / (2 * apart), 0.0)
    return TwoAFCCertificate(
        prefers_left=far > near,
        margin=far - near,
        radius=radius,
        left_radius=free,
        right_radius=free,
        # Where a little more than the slack is left, both distances changing by 2ε is as good.
        joint_radius=torch.where(
            radius > 0, torch.fmax(_joint_radius(x - (x0 + x1) / 2, (x0 - x1) / 2, slack), free / 4), 0.0
        ),
        pixels=certified_pixels(reference, radius),
    )


def _joint_radius(middle: Tensor, half: Tensor, slack: Tensor) -> Tensor:
    """The distance ``ε`` to where two distances differ by ``2ε`` and a slack, ``(N,)``: to a hyperboloid.

    With ``X`` and ``Y`` the parts of the reference along and beside the line through the candidates, ``2c`` how far
    these are apart and ``a = ε + slack/2``, it is at least ``ε`` if ``a² + ε²/B(v) < v`` for some ``v`` in
    ``(a², c²)``, ``B(v) = X²/v − Y²/(c² − v) − 1``, for the reason in :mod:`lipsim.certificates.joint`. The best ``v``
    has ``B(B + 1) = −vB'``.

    Args:
        middle: reference less the middle of the candidates, ``(N, D)`` float64.
        half: half of what is between these, ``(N, D)``.
        slack: what distances are off by, ``(N,)``.
    """
    square = half.square().sum(1)
    along = (middle * half).sum(1).square() / square
    aside = (middle - ((middle * half).sum(1) / square).unsqueeze(1) * half).square().sum(1)
    low, high = torch.zeros_like(square), square * (1 - 2.0**-50)
    for _ in range(60):
        v = (low + high) / 2
        bound = along / v - aside / (square - v) - 1
        slope = along / v.square() + aside / (square - v).square()
        beyond = (bound <= 0) | (bound * (bound + 1) < v * slope)
        low, high = torch.where(beyond, low, v), torch.where(beyond, v, high)
    bound = along / low - aside / (square - low) - 1 - 16 * torch.finfo(low.dtype).eps * along / low
    whole, offset = 1 + 1 / bound, slack / 2
    radius = (torch.sqrt(offset.square() + whole * (low - offset.square())) - offset) / whole
    return torch.where((bound > 0) & (radius > 0), radius * (1 - 1e-9), 0.0)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """``1 − SSIM`` (Wang et al. 2004, an 11-pixel Gaussian window), in [0, 2], ``(N,)``."""
    similarity = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)  # a tuple only where the full image is asked for
    return 1 - similarity


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """``1 − MS-SSIM`` (Wang et al. 2003), ``(N,)``; small images have as many of the five scales as fit.

    An image of 64 pixels has three, whose exponents are scaled to the same sum; below 24 pixels only the first.
    """
    side = min(x.shape[-2:])
    count = sum(side // 2**k > _WINDOW - 1 and side > (_WINDOW - 1) * 2**k for k in range(len(_SCALES)))
    betas = _SCALES[: max(count, 1)]
    betas = tuple(beta * sum(_SCALES) / sum(betas) for beta in betas)
    similarity = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", betas=betas)
    return (1 - similarity).to(x.dtype)  # torchmetrics raises to powers in torch's default dtype


BASELINES: dict[str, Distance] = {"pixel l2": pixel_l2, "SSIM": ssim, "MS-SSIM": ms_ssim}


def check_names(names: Sequence[str], beside: Iterable[str] = ()) -> None:
    """Metrics of a table have names of their own, and not those of the distances beside them.

    Raises:
        ValueError: they have not.
    """
    if len(set(names)) < len(names):
        raise LipsimError(f"expected metrics of different names, got {', '.join(names)}")
    if taken := [name for name in names if name in set(beside)]:
        raise LipsimError(f"{', '.join(taken)} is the name of a distance that stands beside; give another, NAME=FILE")
