"""What the certificates of a metric stand on: how far its encoder stretches, and how far its features are off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lipsim import audit
from lipsim.audit.arithmetic import ERROR_FACTOR, largest_feature_error
from lipsim.certificates.numbers import check_number
from lipsim.layers.fingerprint import Fingerprint, fingerprint
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import state_fingerprint

# Relative, of a claimed bound below an audited one. Weights that are derived again in float32 on another machine are
# not the same to the last digit: what bounds exceed 1 by is that rounding, 9e-6 in a network of 27 layers.
CLAIM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Claim:
    """A bound that a file states for some weights."""

    source: str
    bound: float
    weights: str | None  # their fingerprint on any device; None: those at hand

    def check(self, audited: float, encoder: nn.Module) -> None:
        """Refuse a claim below what was audited; nothing was claimed of weights that have changed since."""
        if audited <= self.bound * (1 + CLAIM_TOLERANCE):
            return
        if self.weights is None or self.weights == state_fingerprint(encoder.state_dict()):
            raise LipsimError(
                f"{self.source} claims the Lipschitz bound {self.bound:.9g}, but its weights have {audited:.9g}: it is "
                "damaged or was altered; export the metric again"
            )


@dataclass(frozen=True)
class _Found:
    """A number that was found out about an encoder, and what the encoder was then."""

    value: float
    content: Fingerprint

    def is_about(self, content: Fingerprint | None) -> bool:
        return self.content == content


class EncoderBounds:
    """The Lipschitz bound of an encoder, and the error of one of its embeddings.

    Each is declared, or found out from the encoder: the bound by an audit, the error by a search. What was found out is
    used for as long as the encoder is what it was then, bit by bit, and found out again after any change. While a part
    of the encoder is in training mode, it is found out at every use.

    The encoder is an argument and no part of this: whoever holds both may replace it.

    Args:
        lipschitz: a declared bound, ``math.inf`` where there is none; None: audits, at the first use.
        feature_error: a declared error, in feature units.
    """

    def __init__(self, lipschitz: float | None, feature_error: float) -> None:
        self._declared: float | None = None  # the Lipschitz bound; None: it is audited
        self._least = 0.0  # what is used in place of a smaller audited one
        self._claim: _Claim | None = None  # to hold against the next audit
        self._audited: _Found | None = None
        self._error = 0.0  # of an embedding; the least, where it is searched for
        self._searches = False
        self._searched: _Found | None = None
        if lipschitz is not None:
            self.declare_lipschitz(lipschitz)
        self.declare_feature_error(feature_error)

    @property
    def has_lipschitz(self) -> bool:
        """Whether there is a bound, without computing it."""
        return self._declared != math.inf

    @property
    def declared_lipschitz(self) -> float | None:
        """The bound as it was declared, ``math.inf`` where there is none; None: it is audited."""
        return self._declared

    @property
    def declared_feature_error(self) -> float:
        """The error as it was declared, without a search."""
        return self._error

    def declare_lipschitz(self, bound: float) -> None:
        """Use this bound from now on, whatever the encoder."""
        self._declared = check_number("Lipschitz bound", bound, above=True, finite=False)
        self._least, self._audited, self._claim = 0.0, None, None

    def require_lipschitz(
        self, least: float, encoder: nn.Module, image_size: int, source: str = "", *, now: bool = True
    ) -> None:
        """Audit, and never use a bound below ``least``.

        Args:
            least: the bound.
            encoder: what it is about.
            image_size: of the encoder.
            source: the file that claims it of these weights, and is refused where they have more; empty: none does.
            now: audit here, and not at the first use.

        Raises:
            ValueError: the claim is below what the weights have.
        """
        self._least = check_number("Lipschitz bound", least)
        self._declared, self._audited, self._claim = None, None, None
        if source:
            self._claim = _Claim(source, least, None if now else state_fingerprint(encoder.state_dict()))
        if now:
            self.audit(encoder, image_size)

    def declare_feature_error(self, error: float) -> None:
        """Use this error from now on, whatever the encoder."""
        self._error = check_number("feature_error", error)
        self._searches, self._searched = False, None

    def require_feature_error(self, least: float) -> None:
        """Search from now on, where there is a Lipschitz bound, and never use an error below ``least``."""
        self.declare_feature_error(least)
        self._searches = True

    def audit(self, encoder: nn.Module, image_size: int) -> audit.LipschitzReport:
        """Bound the encoder as it is, and use an audited bound from now on.

        Raises:
            lipsim.audit.UnboundedModuleError: there is none.
            ValueError: a file claims less of these very weights.
        """
        content = fingerprint(encoder, image_size)  # before: a change during the audit must not be taken for audited
        report = audit.lipschitz_bound(encoder, image_size)
        if self._claim is not None:
            self._claim.check(report.total, encoder)
            self._claim = None
        self._declared, self._audited = None, _Found(report.total, content)
        return report

    def lipschitz(self, encoder: nn.Module, image_size: int) -> float:
        """The bound that radii divide by."""
        content = _content(encoder, image_size) if self._declared is None else None
        return self._lipschitz(encoder, image_size, content)

    def feature_error(self, encoder: nn.Module, image_size: int) -> float:
        """The error that certificates subtract, of one embedding."""
        searches = self._searches and self.has_lipschitz
        return self._feature_error(encoder, image_size, _content(encoder, image_size) if searches else None)

    def both(self, encoder: nn.Module, image_size: int) -> tuple[float, float]:
        """Lipschitz bound and feature error; the encoder is read once for both."""
        found_out = self._declared is None or (self._searches and self.has_lipschitz)
        content = _content(encoder, image_size) if found_out else None
        return self._lipschitz(encoder, image_size, content), self._feature_error(encoder, image_size, content)

    def _lipschitz(self, encoder: nn.Module, image_size: int, content: Fingerprint | None) -> float:
        if self._declared is not None:
            return self._declared
        if self._audited is None or not self._audited.is_about(content):
            self.audit(encoder, image_size)
        assert self._audited is not None
        return max(self._audited.value, self._least)

    def _feature_error(self, encoder: nn.Module, image_size: int, content: Fingerprint | None) -> float:
        if not self._searches or not self.has_lipschitz:
            return self._error
        if self._searched is None or not self._searched.is_about(content):
            # Fingerprints tell dtypes and devices apart: another of them computes with other rounding.
            before = fingerprint(encoder, image_size) if content is None else content
            found = ERROR_FACTOR * largest_feature_error(encoder, image_size, thorough=False)
            self._searched = _Found(found, before)
        return max(self._error, self._searched.value)


def _content(encoder: nn.Module, image_size: int) -> Fingerprint | None:
    """What the encoder is now; None in training mode, where nothing that was found out before is used."""
    in_training = any(module.training for module in encoder.modules())
    return None if in_training else fingerprint(encoder, image_size)
