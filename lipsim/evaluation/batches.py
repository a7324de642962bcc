"""Batches as the callbacks of an evaluation get them: embedded once, and certified at most once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lipsim import certificates
from lipsim.attacks.objectives import Target
from lipsim.certificates import Anchored, TwoAFCCertificate
from lipsim.data import Triplet
from lipsim.metric import PerceptualMetric
from lipsim.utils.precision import full_precision

Features = tuple[Tensor, Tensor, Tensor]
_RADII: dict[Target, str] = {
    "reference": "radius",
    "left": "left_radius",
    "right": "right_radius",
    "all": "joint_radius",
}


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Ordinary tensors without gradients, in full precision.

    Lightning evaluates in inference mode, whose tensors no attack can differentiate through, and under autocast.
    """
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        yield


@dataclass(eq=False)
class EvaluatedBatch:
    """A batch of triplets as every callback of an evaluation gets it: embedded once, and certified at most once.

    What is certified is so when the first callback asks, with the bound and the error of the features that the metric
    has by then. The tensors are for all callbacks: none may change them in place.

    Attributes:
        metric: the metric.
        triplets: the batch.
        features: ``(z, z0, z1)`` in full precision, ``(N, D)`` each, before anchor and projection.
    """

    metric: PerceptualMetric
    triplets: Triplet
    features: Features

    @classmethod
    def of(cls, metric: PerceptualMetric, triplets: Triplet, features: Features) -> EvaluatedBatch:
        """With features that have left inference mode."""
        with outside_inference_mode():
            z, z0, z1 = (f.clone() for f in features)
        return cls(metric, triplets, (z, z0, z1))

    @cached_property
    @outside_inference_mode()
    def projected(self) -> tuple[Anchored, Anchored, Anchored]:
        """The features in float64, anchored and projected: what :mod:`lipsim.certificates` takes for features too."""
        e, e0, e1 = (Anchored(f, self.metric.anchor) for f in self.features)
        return e, e0, e1

    @cached_property
    @outside_inference_mode()
    def margin(self) -> Tensor:
        """``(N,)``, float64: positive where left is nearer."""
        return certificates.margin(*self.projected, anchor=self.metric.anchor)

    @cached_property
    @outside_inference_mode()
    def options(self) -> dict[str, float]:
        """Of the certificates of this batch: anchor, bound and error of the features.

        Raises:
            ValueError: weights or features in half precision, which nothing is certified for.
        """
        self.metric.check_precision(*self.features)
        return self.metric.certificate_options

    @cached_property
    @outside_inference_mode()
    def certificate(self) -> TwoAFCCertificate:
        """Every radius; 0 where the metric has no bound."""
        e, e0, e1 = self.projected
        return certificates.certify_triplets(self.triplets.reference, e, e0, e1, **self.options)

    @cached_property
    @outside_inference_mode()
    def published_radius(self) -> Tensor:
        """LipSim's own formula, ``(N,)``: for comparison only."""
        anchor, lipschitz = self.options["anchor"], self.options["lipschitz"]
        return certificates.published_radius(*self.projected, anchor=anchor, lipschitz=lipschitz)

    @outside_inference_mode()
    def radius(self, target: Target) -> Tensor:
        """The radius within which the answers stay when the images named move, ``(N,)``, and no other one."""
        if "certificate" in vars(self):  # computed already, for another callback
            found: Tensor = getattr(self.certificate, _RADII[target])
            return found
        e, e0, e1 = self.projected
        if target == "reference":
            return certificates.reference_radius(e, e0, e1, **self.options)
        if target == "all":
            return certificates.joint_radius(e, e0, e1, **self.options)
        return certificates.candidate_radii(e, e0, e1, **self.options)[0 if target == "left" else 1]


@dataclass(frozen=True, eq=False)
class EvaluatedImages:
    """A batch of images with labels as callbacks get it.

    Attributes:
        features: ``(N, D)``, in full precision, before anchor and projection.
    """

    features: Tensor


# What Lightning hands from a step to the callbacks has to be a mapping.
Evaluation = dict[str, EvaluatedBatch] | dict[str, EvaluatedImages]
