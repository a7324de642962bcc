"""Randomized smoothing: what Gaussian noise on images proves about any metric, one without a bound too.

The *smoothed* metric gives the answer that the metric gives most often when noise ``N(0, σ²)`` is added to every value
of the images that may move. That answer, not the one of the metric itself, is what is certified here, and only with
probability ``1 − α`` over the draws of noise: what comes in are counts of them. Radii are ℓ2 distances in the space of
the encoder's input, ``(N,)``, float64, and certify every perturbation strictly shorter.

Two facts carry everything. For any measurable ``h`` with values in [0, 1], ``Φ⁻¹(E h(x + σZ))`` is a Lipschitz function
of ``x`` with the constant ``1/σ`` (Salman et al. 2019, Lemma 2; for indicators, the Neyman-Pearson argument of Cohen et
al. 2019, Thm. 1). And a mean of draws is near its expectation: Clopper and Pearson's exact bound where ``h`` is 0 or 1,
Hoeffding's 1963 inequality in its sharp form, Thm. 1, where it lies between.

The draws have to be independent of each other, and those that choose an answer of those that certify it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.numbers import check_count, check_number
from lipsim.certificates.rounding import EPS, round_down

_HALVINGS = 100  # of [0, 1], past the spacing of float64 everywhere that a bound lies


@dataclass(frozen=True)
class SmoothedCertificate:
    """The smoothed answers to N triplets. All fields are ``(N,)``, except ``counts``.

    Attributes:
        prefers_left: bool; False where it abstains too.
        abstained: bool: the draws do not tell which answer is the more frequent one; the radius is 0.
        radius: what moves may move by less than this, each, and the smoothed answer stays.
        single_radius: where several have noise: one of them, whichever it is, may move by less than this if the others
            stay; √k times the radius of k images. Where one has noise it is the radius.
        p_lower: the probability of the answer under noise is at least this, with probability ``1 − α``.
        counts: ``(N, 3)`` int64, how many of the draws said left, right, and neither.
    """

    prefers_left: Tensor
    abstained: Tensor
    radius: Tensor
    single_radius: Tensor
    p_lower: Tensor
    counts: Tensor

    @property
    def choice(self) -> Tensor:
        """``(N,)`` float64: 1 for left, −1 for right, 0 where it abstains; what scores take for a margin."""
        sign = torch.where(self.prefers_left, 1.0, -1.0).double()
        return torch.where(self.abstained, 0.0, sign)

    def to(self, *args: Any, **kwargs: Any) -> SmoothedCertificate:
        """Move every tensor to a device."""
        return SmoothedCertificate(*(getattr(self, field.name).to(*args, **kwargs) for field in fields(self)))


def certify_counts(
    selection: Tensor, counts: Tensor, *, sigma: float, alpha: float = 0.001, moving: int = 1
) -> SmoothedCertificate:
    """The certificate of N answers from counts of draws: CERTIFY of Cohen et al. 2019 for a question with two answers.

    The first draws choose an answer; others say how frequent it is. A tie of the metric counts against either answer.

    Args:
        selection: ``(N, 3)`` int64, how many of the first draws said left, right, and neither.
        counts: the same of the others, as many for each triplet.
        sigma: standard deviation of the noise on each value of an image.
        alpha: probability, for each answer, that its certificate is wrong.
        moving: how many images have noise on them, all at once. When each of ``k`` moves by less than ``ε``, the stack
            of them moves by less than ``√k·ε``, so the radius of each is that of the stack over ``√k``.

    Raises:
        ValueError: no such counts, or numbers out of range.

    Example:
        >>> certificate = certify_counts(torch.tensor([[9, 1, 0]]), torch.tensor([[990, 10, 0]]), sigma=0.25)
        >>> print(bool(certificate.prefers_left), f"{certificate.p_lower.item():.4f} {certificate.radius.item():.4f}")
        True 0.9760 0.4945
    """
    check_count("moving", moving)
    for given in (selection, counts):
        if given.ndim != 2 or given.shape[1] != 3 or given.dtype != torch.int64 or len(given) != len(counts):
            raise LipsimError(f"expected counts (N, 3) in int64, got {tuple(given.shape)} in {given.dtype}")
        if bool((given < 0).any()):
            raise LipsimError(f"expected counts of draws, 0 or more, got {int(given.min())}")
    trials = counts.sum(1).unique().tolist()
    if len(trials) > 1:
        raise LipsimError(f"expected as many draws for each triplet, got {trials}")
    left = selection[:, 0] >= selection[:, 1]
    successes = torch.where(left, counts[:, 0], counts[:, 1])
    p_lower = binomial_lower_bound(successes, trials[0], alpha) if trials else torch.zeros_like(successes).double()
    single = smoothed_radius(p_lower, sigma)
    radius = round_down(single / math.sqrt(moving), single.dtype) if moving > 1 else single
    known = radius > 0
    return SmoothedCertificate(left & known, ~known, radius, single, p_lower, counts)


def binomial_lower_bound(successes: Tensor, trials: int, alpha: float) -> Tensor:
    """Lower bound of Clopper and Pearson 1934 on a probability, ``(N,)`` float64, one-sided at ``1 − α``.

    The largest ``p`` at which as many successes, or more, have a probability of at most ``α``; the quantile ``α`` of
    the Beta distribution with ``k`` and ``n − k + 1``. From the sum of the binomial probabilities, rounded down.

    Args:
        successes: ``(N,)`` int64, ``k``.
        trials: ``n``.
        alpha: probability, for each, that the bound is above the truth.

    Example:
        >>> print(f"{binomial_lower_bound(torch.tensor([100]), 100, 0.001).item():.6f}")  # 0.001 ** (1/100)
        0.933254
    """
    check_count("trials", trials)
    alpha = _probability("alpha", alpha)
    found = successes.tolist()
    if successes.dtype != torch.int64 or any(not 0 <= k <= trials for k in found):
        raise LipsimError(f"expected successes in int64 from 0 to the number of trials {trials}, got {found[:8]}")
    bounds = [_lower_bound(k, trials, alpha) for k in found]
    return torch.tensor(bounds, dtype=torch.float64, device=successes.device)


def smoothed_radius(p_lower: Tensor, sigma: float) -> Tensor:
    """Radius ``σ·Φ⁻¹(p)`` of an answer whose probability under noise is at least ``p``, ``(N,)`` float64; 0 up to ½.

    No larger radius holds for every metric: with a half-space for a decision it is the distance to its boundary (Cohen
    et al. 2019, Thm. 1 and 2).

    Example:
        >>> print(smoothed_radius(torch.tensor([0.5, 0.8413447460685429]), sigma=2.0))
        tensor([0.0000, 2.0000], dtype=torch.float64)
    """
    sigma = check_number("sigma", sigma, above=True)
    p = p_lower.double()
    # Below, the quantile is negative; a probability of 1 is known of no metric. (NaN is neither.)
    known = (p > 0.5) & (p < 1)
    quantile = torch.special.ndtri(torch.where(known, p, 0.5)) * (1 - 64 * EPS)
    return round_down(torch.where(known, sigma * quantile, 0.0), torch.float64)


def mean_interval(mean: Tensor, samples: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Interval ``(lower, upper)``, ``(N,)`` float64, that holds an expectation with probability ``1 − α``.

    Of independent draws with values in [0, 1], of any distribution. Each end fails with probability ``α/2`` at most:
    it is where ``n·KL(mean, μ) = ln(2/α)`` with the divergence of two Bernoulli variables (Hoeffding 1963, Thm. 1).

    Args:
        mean: ``(N,)``, of the draws.
        samples: how many draws, ``n``.
        alpha: probability, for each interval, that the expectation lies outside.

    Example:
        >>> low, high = mean_interval(torch.tensor([0.5]), 1000, 0.001)
        >>> print(f"{low.item():.4f} {high.item():.4f}")
        0.4386 0.5614
    """
    low, short = _mean_ends(mean, samples, alpha)
    return low, _complement(short)


def smoothed_mean_interval(
    mean: Tensor, samples: int, eps: float, *, sigma: float, alpha: float = 0.001
) -> tuple[Tensor, Tensor]:
    """Interval of ``E h(x + δ + σZ)`` over all ``‖δ‖₂ ≤ eps``, ``(N,)`` float64, with probability ``1 − α``.

    ``Φ(Φ⁻¹(μ) ∓ eps/σ)`` at the ends ``μ`` of :func:`mean_interval`.

    Args:
        mean: ``(N,)``, of ``h`` at ``samples`` noisy copies of ``x``, values in [0, 1].
        samples: how many.
        eps: ℓ2 budget.
        sigma: standard deviation of the noise.
        alpha: probability, for each interval, that it does not hold.

    Example:
        >>> low, high = smoothed_mean_interval(torch.tensor([0.9]), 10_000, 0.1, sigma=0.25)
        >>> print(f"{low.item():.3f} {high.item():.3f}")
        0.793 0.960
    """
    shift = check_number("eps", eps) / check_number("sigma", sigma, above=True)
    low, short = _mean_ends(mean, samples, alpha)
    return _shifted_down(low, shift), _complement(_shifted_down(short, shift))


def _mean_ends(mean: Tensor, samples: int, alpha: float) -> tuple[Tensor, Tensor]:
    """The lower end of :func:`mean_interval`, and how much the upper end is below 1, which may be tiny."""
    check_count("samples", samples)
    mean = mean.double()
    if not bool(((mean >= 0) & (mean <= 1)).all()):
        raise LipsimError("expected means of values in [0, 1]")
    # Enlarged by more than float64 loses in the divergence.
    budget = math.log(2 / _probability("alpha", alpha)) / samples * (1 + 64 * EPS) + 64 * EPS
    return _divergent(mean, budget), _divergent(1 - mean, budget)


def _complement(p: Tensor) -> Tensor:
    """``1 − p`` of probabilities, rounded up."""
    found = 1 - p
    # One half of a unit in the last place of 1 at most is lost below it.
    return torch.where(p > 0, found.nextafter(torch.ones_like(p)), found)


def _shifted_down(p: Tensor, shift: float) -> Tensor:
    """``Φ(Φ⁻¹(p) − shift)``, rounded down."""
    moved = torch.special.ndtri(p) - shift
    low = moved - torch.where(torch.isfinite(moved), 64 * EPS * (1 + moved.abs()), 0.0)
    # Not ndtr, which is 1 + erf here and keeps no digits of small probabilities.
    return round_down(0.5 * torch.erfc(-low / math.sqrt(2)) * (1 - 64 * EPS), torch.float64)


def _divergent(mean: Tensor, budget: float) -> Tensor:
    """The smallest ``μ ≤ mean`` with ``KL(mean, μ) ≤ budget``, by bisection, rounded down."""
    low, high = torch.zeros_like(mean), mean.clone()
    entropy = torch.special.xlogy(mean, mean) + torch.special.xlogy(1 - mean, 1 - mean)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        cross = torch.special.xlogy(mean, middle) + torch.special.xlog1py(1 - mean, -middle)
        beyond = entropy - cross > budget
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return low


@lru_cache(maxsize=65536)
def _lower_bound(successes: int, trials: int, alpha: float) -> float:
    if successes == 0:
        return 0.0
    k = torch.arange(successes, trials + 1, dtype=torch.float64)
    count = torch.tensor(float(trials), dtype=torch.float64)
    size = torch.lgamma(count + 1)
    ways = size - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    # More than float64 loses in logarithms of that size.
    goal = math.log(alpha) - 32 * EPS * (1 + float(size) + abs(math.log(alpha)))
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        tail = torch.logsumexp(ways + k * math.log(middle) + (trials - k) * math.log1p(-middle), 0)
        if float(tail) <= goal:
            low = middle
        else:
            high = middle
    return low


def _probability(name: str, value: float) -> float:
    """A number above 0 and below 1."""
    value = check_number(name, value, above=True)
    if value >= 1:
        raise LipsimError(f"expected {name} < 1, got {value}")
    return value
