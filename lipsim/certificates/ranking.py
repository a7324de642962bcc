"""The nearest items of a gallery, and how far a query may move before one of them changes its rank.

Notation as in :mod:`lipsim.certificates`. An item ``i`` stays before an item ``j`` while the query moves by less than
``r_ij``, the :func:`reference_radius` of the two, which is exact: a minimum over pairs is as well. There are ``k·M``
pairs, and nearly all of them can be left out unseen. With ``a`` and ``b`` the chords ``‖p(z) − p(y)‖`` from the query
to the two, ``⟨e, w⟩ = ‖e‖(b² − a²)/2`` and ``‖w‖ ≤ a + b``: a lower bound on ``r_ij`` that depends on the similarity of
``j`` alone and grows as it falls. Whatever is less similar than some threshold is therefore out of the question, and
one product of matrices in float32, with its rounding, says what that is. The rest is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.certificates.decisions import reference_radius
from lipsim.certificates.errors import LipsimError
from lipsim.certificates.gallery import Gallery, unit_vectors
from lipsim.certificates.geometry import anchored_norm
from lipsim.certificates.numbers import check_constants, check_count
from lipsim.certificates.rounding import rounding_error

_SIMILARITIES = 2**25  # of a block of queries with the whole gallery
_NUMBERS = 2**22  # in float64, of candidates of a block of queries, or of pairs
_SPARE = 32  # candidates that are looked at besides the 2k most similar ones
_NEXT = 4  # items behind the k nearest that give the first upper bounds


@dataclass(frozen=True, eq=False)
class Ranking:
    """The ``k`` nearest items of each query, nearest first, and radii for the query in input pixels.

    Attributes:
        items: ``(N, k)`` int64, rows of the gallery; of equal ones the first comes first.
        rank_radius: ``(N, k)`` float64: within it the item at this rank has it still, as all that are nearer stay so
            and all that are farther as well. That of rank 1 is the radius of the top-1 answer. Ties have 0.
        set_radius: ``(N,)`` float64: within it the ``k`` nearest are these, in whatever order; ∞ where there are no
            others.
    """

    items: Tensor
    rank_radius: Tensor
    set_radius: Tensor


@dataclass(frozen=True)
class _Setting:
    gallery: Gallery
    k: int
    lipschitz: float
    feature_error: float

    def pairs(self, z: Tensor, query: Tensor, item: Tensor, other: Tensor) -> Tensor:
        """:func:`reference_radius` ``(P,)`` of rows of ``z`` with two items each."""
        found = [
            reference_radius(
                z[q],
                self.gallery.features[i].double(),
                self.gallery.features[j].double(),
                anchor=self.gallery.anchor,
                lipschitz=self.lipschitz,
                feature_error=self.feature_error,
            )
            for q, i, j in zip(*(t.split(max(1, _NUMBERS // z.shape[-1])) for t in (query, item, other)), strict=True)
        ]
        return torch.cat(found)

    def nearest_possible(self, norm: Tensor, chord: Tensor, radius: Tensor) -> Tensor:
        """Cosine below which no item can come to within ``radius`` of overtaking one at a ``chord``, in its shape.

        The positive root in ``b`` of ``‖e‖(b² − a²)/2 − η(a + b) − (‖e‖ + η)β = RL(a + b + β)``; the left side over the
        last bracket is the lower bound, as :func:`reference_radius` has it with the error of the features.
        """
        error = self.feature_error / norm
        beta = 2 * self.feature_error / (self.gallery.least_norm - self.feature_error)
        beta += 2 * rounding_error(self.gallery.features)
        reach = radius * (self.lipschitz * (1 + 1e-6)) / norm
        free = chord.square() / 2 + error * chord + (1 + error) * beta + reach * (chord + beta)
        least = 1 - ((error + reach) + ((error + reach).square() + 2 * free).sqrt()).square() / 2
        # What is 0 already cannot become smaller; what is not finite excludes nothing.
        return torch.where(radius > 0, least.nan_to_num(nan=-2.0, neginf=-2.0), 2.0)


@torch.no_grad()
def rank(z: Tensor, gallery: Gallery, *, k: int, lipschitz: float = 1.0, feature_error: float = 0.0) -> Ranking:
    """The ``k`` nearest items of queries ``(N, D)`` in float64, with the exact radii of their ranks and of their set.

    Raises:
        ValueError: not ``1 ≤ k ≤ M``, or features of another length.

    Example:
        >>> gallery = Gallery(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        >>> found = rank(torch.tensor([[3.0, 4.0]]), gallery, k=2)
        >>> found.items.tolist(), [f"{radius:.4f}" for radius in found.rank_radius[0].tolist()]
        ([[1, 0]], ['0.7071', '0.7071'])
        >>> print(f"{found.set_radius.item():.4f}")  # (3, 4) goes left until the third is nearer than the first
        3.0000
    """
    check_constants(gallery.anchor, lipschitz, feature_error)
    k = check_count("k", k)
    if k > len(gallery):
        raise LipsimError(f"expected 1 ≤ k ≤ {len(gallery)} (the size of the gallery), got k = {k}")
    if z.ndim != 2 or z.shape[-1] != gallery.features.shape[-1]:
        raise LipsimError(f"expected queries (N, {gallery.features.shape[-1]}), got {tuple(z.shape)}")
    z, setting = z.to(gallery.features.device).double(), _Setting(gallery, k, lipschitz, feature_error)
    candidates = min(len(gallery), 2 * k + _SPARE)
    block = max(1, min(_SIMILARITIES // len(gallery), _NUMBERS // (candidates * (z.shape[-1] + 1))))
    parts = [_rank_block(rows, setting, candidates) for rows in z.split(block)]
    return Ranking(
        torch.cat([part.items for part in parts]),
        torch.cat([part.rank_radius for part in parts]),
        torch.cat([part.set_radius for part in parts]),
    )


@torch.no_grad()
def nearest(z: Tensor, gallery: Gallery, k: int) -> Tensor:
    """The items of :func:`rank` alone, ``(N, k)`` int64."""
    return rank(z, gallery, k=k, lipschitz=math.inf).items


def _rank_block(z: Tensor, setting: _Setting, candidates: int) -> Ranking:
    """:func:`rank` of so few queries that all their similarities are in memory at once."""
    gallery, k, count = setting.gallery, setting.k, len(z)
    unit = unit_vectors(z, gallery.anchor)
    norm, base = anchored_norm(z, gallery.anchor), gallery.base(unit)
    similarity = gallery.similarities(unit.nan_to_num())
    top, found = similarity.topk(candidates)
    # In float64: near-duplicates are ordered and told apart by what float32 rounds away.
    found = found.sort(-1).values
    cosine = (gallery.unit(found) * unit.unsqueeze(1)).sum(-1).nan_to_num(nan=-2.0)
    order = cosine.argsort(dim=-1, descending=True, stable=True)
    found, cosine = found.gather(1, order), cosine.gather(1, order)
    items = found[:, :k]
    certain = (norm > setting.feature_error) & torch.isfinite(norm)
    whole = candidates == len(gallery)
    # Items that may be among the k nearest and are not among the candidates; these queries look at more of them.
    wide = ~certain.new_full((count,), whole) & ~(top[:, -1] < top[:, k - 1] - 2 * gallery.slack)
    rank_radius, set_radius = (z.new_zeros(shape) for shape in ((count, k), (count,)))
    if k == len(gallery):
        set_radius[:] = math.inf
    bound = 0 < setting.lipschitz < math.inf and gallery.least_norm > setting.feature_error
    rows = (certain & ~wide).nonzero().flatten() if bound else certain.new_zeros(0).nonzero().flatten()
    if len(rows):
        chord = torch.linalg.vector_norm(gallery.unit(items[rows]) - unit[rows].unsqueeze(1), dim=-1)
        inside, first = _first_bounds(z[rows], norm[rows], chord, setting, found[rows])
        needed = _needed(setting, norm[rows], chord, inside, first)
        unseen = (base[rows] + top[rows, -1] + gallery.slack).unsqueeze(1) >= needed
        wide[rows] |= unseen.any(1) & (not whole)
        later = min(_NEXT, candidates - k)
        # Pairs of an item inside with a candidate behind the first few that may be nearer to overtaking it than those.
        near = cosine[rows, k + later :].unsqueeze(1) + gallery.slack >= needed.unsqueeze(2)
        q, i, j = near.nonzero().unbind(1)
        radius = setting.pairs(z[rows], q, items[rows][q, i], found[rows][q, k + later + j])
        first.view(-1).scatter_reduce_(0, q * k + i, radius, "amin")
        rank_radius[rows] = torch.minimum(inside, first)
        if k < len(gallery):
            set_radius[rows] = first.amin(1)
    for row in wide.nonzero().flatten().tolist():
        items[row], rank_radius[row], set_radius[row] = _rank_widely(
            z[row], unit[row], norm[row], similarity[row] + base[row], setting, certified=bound and bool(certain[row])
        )
    return Ranking(items, rank_radius, set_radius)


def _first_bounds(z: Tensor, norm: Tensor, chord: Tensor, setting: _Setting, found: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of the ``k`` nearest, the smallest radius with another one, and with one of the first few behind them.

    Args:
        z: queries ``(n, D)``.
        norm: of the queries ``(n,)``.
        chord: from the query to each of the ``k``, ``(n, k)``.
        setting: with the gallery.
        found: ``(n, C)`` items, nearest first.

    Returns:
        ``(n, k)`` each; ∞ where there is no other.
    """
    k, count = setting.k, len(z)
    inside, first = (z.new_full((count, k), math.inf) for _ in range(2))

    def compute(query: Tensor, i: Tensor, j: Tensor) -> None:
        radius = setting.pairs(z, query, found[query, i], found[query, j])
        behind = j >= k
        first.view(-1).scatter_reduce_(0, (query * k + i)[behind], radius[behind], "amin")
        for member in (i, j):  # a pair inside is about the rank of both
            inside.view(-1).scatter_reduce_(0, (query * k + member)[~behind], radius[~behind], "amin")

    width = k + min(_NEXT, found.shape[1] - k)
    later = torch.ones(k, width, dtype=torch.bool, device=z.device).triu(1)
    close = later & ~later.triu(1 + _NEXT)
    close[:, k:] = True
    i, j = close.nonzero().unbind(1)
    query = torch.arange(count, device=z.device).repeat_interleave(len(i))
    compute(query, i.repeat(count), j.repeat(count))
    # Of the other pairs inside, those that may be nearer to changing places than what is known of either.
    least = farther_radius(
        chord.unsqueeze(2),
        chord.unsqueeze(1),
        norm.view(-1, 1, 1),
        lipschitz=setting.lipschitz,
        feature_error=setting.feature_error,
        gallery=setting.gallery,
    )
    most = torch.maximum(inside.unsqueeze(2), inside.unsqueeze(1))
    compute(*((later & ~close)[:, :k] & ~(least > most)).nonzero().unbind(1))
    return inside, first


def _needed(setting: _Setting, norm: Tensor, chord: Tensor, inside: Tensor, first: Tensor) -> Tensor:
    """Cosine from which on an item behind the ``k`` nearest has to be looked at for each of them, ``(n, k)``."""
    # For its rank what is above `inside` does not count; for the set, what is above the smallest of all.
    most = torch.maximum(torch.minimum(inside, first), first.amin(1, keepdim=True))
    return setting.nearest_possible(norm.unsqueeze(1), chord, most)


def _rank_widely(
    z: Tensor, unit: Tensor, norm: Tensor, cosine: Tensor, setting: _Setting, *, certified: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rank` of one query that has many items at nearly one distance, which are looked at in chunks.

    Args:
        z: ``(D,)``.
        unit: its unit vector ``(D + 1,)``.
        norm: its norm.
        cosine: with all items ``(M,)``, in float32 and off by the gallery's slack.
        setting: with the gallery.
        certified: whether radii can be above 0.
    """
    gallery, k, slack = setting.gallery, setting.k, setting.gallery.slack
    chunk = max(1, _NUMBERS // len(unit))
    # `cosine` is the sum of two numbers in float32, rounded once more.
    slack += 2.0**-22
    cosine = cosine.nan_to_num(nan=-2.0)  # of a query that is not finite, which takes any items
    near = (cosine >= cosine.topk(k).values[-1] - 2 * slack).nonzero().flatten()
    exact = torch.cat([(gallery.unit(part) * unit).sum(-1) for part in near.split(chunk)]).nan_to_num(nan=-2.0)
    order = exact.argsort(dim=-1, descending=True, stable=True)
    near = near[order]
    items = near[:k]
    if not certified:
        none = z.new_full((), math.inf if k == len(gallery) else 0.0)
        return items, z.new_zeros(k), none
    others = cosine.clone()
    others[near] = exact[order].to(others.dtype)
    others[items] = -math.inf
    found = torch.cat([items, others.topk(min(_NEXT, len(gallery) - k)).indices])
    own = gallery.unit(items)
    chord = torch.linalg.vector_norm(own - unit, dim=-1)
    inside, first = _first_bounds(z[None], norm[None], chord[None], setting, found[None])
    needed = _needed(setting, norm[None], chord[None], inside, first)[0]
    inside, first = inside[0], first[0]
    todo = (others + slack >= needed.amin()).nonzero().flatten()
    todo = todo[~torch.isin(todo, found)]
    for part in todo.split(chunk) if len(todo) else ():
        lower, upper = _radius_interval(setting, unit, norm, own, gallery.unit(part))
        first_upper = torch.minimum(first, upper.amin(1))
        most = torch.maximum(torch.minimum(inside, first_upper), first_upper.amin())
        i, j = (lower <= most.unsqueeze(1)).nonzero().unbind(1)
        radius = setting.pairs(z[None], torch.zeros_like(i), items[i], part[j])
        first.scatter_reduce_(0, i, radius, "amin")
    set_radius = first.amin() if k < len(gallery) else z.new_full((), math.inf)
    return items, torch.minimum(inside, first), set_radius


def _radius_interval(
    setting: _Setting, unit: Tensor, norm: Tensor, own: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds ``(k, C)`` below and above what :meth:`_Setting.pairs` gives, from products of matrices in float64.

    Args:
        setting: with the gallery.
        unit: of the query ``(D + 1,)``.
        norm: of the query.
        own: unit vectors ``(k, D + 1)`` of items that are nearer.
        others: of items that are not, ``(C, D + 1)``.
    """
    lower = signed_lower_radius(
        unit,
        norm,
        own,
        others,
        lipschitz=setting.lipschitz,
        feature_error=setting.feature_error,
        least_norm=setting.gallery.least_norm,
    )
    gap, slope, rounding = _gap_and_slope(unit, own, others)
    least = (slope - rounding).clamp(min=0).sqrt()
    upper = (gap + rounding).clamp(min=0) * norm / (least * setting.lipschitz) * (1 + 1e-6)
    return lower * (1 - 1e-6) - 1e-300, upper.nan_to_num(nan=math.inf, posinf=math.inf)


def signed_lower_radius(
    unit: Tensor,
    norm: Tensor,
    own: Tensor,
    others: Tensor,
    *,
    lipschitz: float,
    feature_error: float,
    least_norm: float,
) -> Tensor:
    """Lower bound ``(k, C)`` on how far a query has to move until ``others`` are nearer than ``own``, signed.

    Never above the exact :func:`reference_radius` where an item of ``own`` is nearer, and not positive where it is not.
    It is computed from products of matrices, and is below the exact one by what their rounding is worth: noticeably
    only between near-duplicates. Arguments as those of :func:`_radius_interval`; ``least_norm`` is that of a gallery.
    """
    gap, slope, rounding = _gap_and_slope(unit, own, others)
    width = (slope + rounding).sqrt()
    beta = 2 * feature_error / (least_norm - feature_error) if least_norm > feature_error else math.inf
    error = feature_error / norm
    # As in reference_radius; the rounding of matrix products takes the place of that of scalar ones.
    top = gap - error * width - (1 + error) * (beta + rounding)
    radius = norm * top / ((width + beta) * lipschitz)
    # A numerator below 0 divides to less than it should by a width that is too large: only its sign counts then.
    radius = torch.where(torch.isfinite(radius), radius * (1 - 1e-9), -math.inf)
    return torch.where(radius > 0, radius, torch.where(top < 0, -math.inf, 0.0)) if lipschitz > 0 else top * 0


def farther_radius(
    chord: Tensor, other: Tensor | float, norm: Tensor, *, lipschitz: float, feature_error: float, gallery: Gallery
) -> Tensor:
    """Lower bound on how far a query has to move until an item at the chord ``other`` or beyond overtakes one nearer.

    It needs no product of the two: see the head of this module. Signed; arguments broadcast.
    """
    if not (0 < lipschitz < math.inf and gallery.least_norm > feature_error):
        return torch.zeros_like(chord)
    error, rounding = feature_error / norm, 2 * rounding_error(gallery.features)
    beta = 2 * feature_error / (gallery.least_norm - feature_error) + rounding
    top = (other**2 - chord.square()) / 2 - error * (chord + other) - (1 + error) * beta
    return norm * top / ((chord + other + beta) * lipschitz) * (1 - 1e-9)


def _gap_and_slope(unit: Tensor, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor, float]:
    """``⟨p, p_i − p_j⟩`` and the square of ``‖w_ij‖``, ``(k, C)`` each, and what both may be off by."""
    rounding = 4 * rounding_error(unit)
    gap = (own @ unit).unsqueeze(1) - others @ unit
    squares = own[:, :-1].square().sum(-1).unsqueeze(1) + others[:, :-1].square().sum(-1)
    return gap, (squares - 2 * (own[:, :-1] @ others[:, :-1].mT)).clamp(min=0), rounding
