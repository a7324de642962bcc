"""Places where a certificate is as large as it can be, and what is true there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim import certificates
from lipsim.metric import PerceptualMetric

FEATURES = 4
SIDE = 8
SAMPLES = 6
BEYOND = 1e-6  # how far beyond the truth an answer must have changed, relative


@dataclass(frozen=True)
class Setting:
    """An anchor, and the Lipschitz constant of an encoder that reaches it everywhere."""

    anchor: float
    lipschitz: float

    @property
    def options(self) -> dict[str, float]:
        """Keyword arguments of the certificates."""
        return {"anchor": self.anchor, "lipschitz": self.lipschitz}

    @property
    def metric(self) -> PerceptualMetric:
        """A metric of features that are given."""
        return PerceptualMetric(nn.Identity(), 1, self.anchor, lipschitz=self.lipschitz)

    @property
    def scale(self) -> float:
        """A length of features that the anchor matters to; below 1 without an anchor."""
        return max(self.anchor, 0.15)


# Constants on either side of 1, and without an anchor features shorter than 1, where the published radius overclaims.
SETTINGS = (Setting(0.0, 2.5), Setting(0.5, 0.5), Setting(1.0, 1.0), Setting(2.0, 2.5))


@dataclass(frozen=True)
class Case:
    """What a certificate claims on N samples, and what is true.

    Attributes:
        kind: which certificate.
        claimed: ``(N,)`` radii, or ends of an interval.
        truth: ``(N,)`` like it: nothing larger (for upper ends: smaller) is true.
        slack: how much less (more) may be claimed, relative to the truth, or absolute where that is 0.
        upper: the claims are upper ends.
        broken: ``(N,)``, whether the known change just beyond the truth breaks the answer; None where there is none.
        tolerance: how well the truth is known, like ``slack``.
    """

    kind: str
    claimed: Tensor
    truth: Tensor
    slack: float = 1e-9
    upper: bool = False
    broken: Tensor | None = None
    tolerance: float = 1e-12  # of truths computed in float64

    @property
    def excess(self) -> Tensor:
        """``(N,)`` how much more than the truth is claimed, relative to it."""
        excess = (self.claimed.double() - self.truth) / torch.where(self.truth > 0, self.truth, 1.0)
        return -excess if self.upper else excess

    def faults(self) -> list[str]:
        """What is wrong, one phrase each."""
        faults = []
        # Negated, so that NaN fails.
        if not (self.excess <= self.tolerance).all():
            faults.append(f"{self.kind} claims {float(self.excess.max()):.2g} too much")
        if not (self.excess >= -self.slack).all():
            faults.append(f"{self.kind} claims {-float(self.excess.min()):.2g} too little")
        if self.broken is not None and not self.broken.all():
            faults.append(f"{self.kind} holds beyond the truth")
        return faults


def random_features(draw: torch.Generator, rows: int) -> Tensor:
    """Random features."""
    return torch.randn(rows, FEATURES, dtype=torch.float64, generator=draw)


def unit(z: Tensor, anchor: float) -> Tensor:
    """Anchored features of length 1, ``(…, D + 1)``."""
    return F.normalize(torch.cat([z, torch.full_like(z[..., :1], anchor)], -1), dim=-1, eps=1e-300)


def distance(z: Tensor, y: Tensor, anchor: float) -> Tensor:
    """Cosine distance ``(N,)`` of anchored features."""
    return (unit(z, anchor) - unit(y, anchor)).square().sum(-1) / 2


def hyperplane(z: Tensor, first: Tensor, second: Tensor, anchor: float) -> tuple[Tensor, Tensor]:
    """Signed distance of features to where two unit vectors are equally near, and the normal; 0 for one vector."""
    normal = (first - second)[..., :-1]
    slope = normal.norm(dim=-1)
    value = (z * normal).sum(-1) + anchor * (first - second)[..., -1]
    slope = torch.where(slope > 0, slope, 1.0)
    return value / slope, normal / slope[..., None]


def nearest(z: Tensor, units: Tensor, anchor: float, k: int) -> Tensor:
    """``(N, M)`` bool, which are among the ``k`` nearest."""
    similarity = unit(z, anchor) @ units.mT
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(1, similarity.topk(k).indices, True)


def on_line(setting: Setting, turn: Tensor) -> Tensor:
    """Points of a line of features, given by the angle ``(N,)`` that their anchored vectors are from its foot."""
    foot = 2 * setting.scale
    z = torch.zeros(len(turn), FEATURES, dtype=torch.float64)
    z[:, 0], z[:, 1] = math.hypot(foot, setting.anchor) * torch.tan(turn), foot
    return z


def turned_around(pivot: Tensor, z: Tensor) -> Tensor:
    """Features as far from those of the pivot, and as long, in another plane."""
    axis = F.normalize(pivot, dim=1)
    along = (z * axis).sum(1)
    turned = along[:, None] * axis
    turned[:, 2] += (z.square().sum(1) - along.square()).sqrt()
    return turned


def at_angle(z: Tensor, angle: Tensor, norm: Tensor, anchor: float, axis: int) -> Tensor:
    """Features of a given anchored norm and angle to those of ``z``, which lie on the first axis."""
    own = (z.square().sum(1) + anchor**2).sqrt()
    along = (own * norm * torch.cos(angle) - anchor**2) / z[:, 0]
    features = torch.zeros_like(z)
    features[:, 0], features[:, axis] = along, (norm.square() - anchor**2 - along.square()).sqrt()
    return features


def in_plane(norm: Tensor, turn: float) -> Tensor:
    """Features of given norms ``(N,)`` in the plane of the first two axes."""
    z = torch.zeros(len(norm), FEATURES, dtype=torch.float64)
    z[:, 0], z[:, 1] = norm * math.cos(turn), norm * math.sin(turn)
    return z


def threshold_radii(x: Tensor, y: Tensor, thresholds: Tensor, options: dict[str, float]) -> Tensor:
    """Radii of samples with a threshold each."""
    radii = [
        certificates.threshold_radius(x[i : i + 1], y[i : i + 1], float(t), **options) for i, t in enumerate(thresholds)
    ]
    return torch.cat(radii) if radii else thresholds


def resized(images: Tensor) -> Tensor:
    """The resize that metrics see files through, to :data:`SIDE`."""
    return F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)


def no_images(z: Tensor) -> Tensor:
    """Images for the number of pixels, which these controls are not about."""
    return torch.full((len(z), 3, 1, 1), 0.5, dtype=torch.float64)
