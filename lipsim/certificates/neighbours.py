"""Radii of what labelled neighbours say: recall@k, and the vote of the k nearest.

Notation as in :mod:`lipsim.certificates`.

Both are lower bounds: they let every item move up or down as soon as the one pair that stands in its way allows it,
whatever the others need. ``r_ij`` is the radius within which an item ``i`` stays before an item ``j``
(:func:`.ranking.signed_lower_radius`, which is 0 or less where it is not before it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.gallery import Gallery, unit_vectors
from lipsim.certificates.geometry import anchored_norm
from lipsim.certificates.numbers import check_count
from lipsim.certificates.ranking import farther_radius, nearest, signed_lower_radius

_MEMBERS = 8  # items of a class that are tried as the one that stays
_NEAREST = 2**14  # items that are compared one by one; no radius exceeds what the next one would need at least


@torch.no_grad()
def recall_radius(
    z: Tensor,
    gallery: Gallery,
    labels: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    *,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> Tensor:
    """Radius within which one of the ``k`` nearest items has the label of the query, ``(N, len(ks))`` float64.

    While fewer than ``k`` items of other labels are before some item ``y`` of the query's label, ``y`` or a better one
    of its label is among the ``k`` nearest. So the ``k``-th smallest ``r_yj`` over items ``j`` of other labels is a
    lower bound for every ``y``; the largest over the nearest eight is returned. 0 where there is none among the ``k``
    nearest, ∞ where fewer than ``k`` items have other labels.

    Args:
        z: queries ``(N, D)``.
        gallery: of ``M`` items.
        labels: of the gallery ``(M,)`` int64.
        query_labels: ``(N,)`` int64.
        ks: numbers of neighbours, at least one, each below ``M``.
        lipschitz: ``L``.
        feature_error: ``η``.

    Raises:
        ValueError: labels of another length, or a ``k`` out of range.

    Example:
        >>> gallery = Gallery(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        >>> z, labels, own = torch.tensor([[3.0, 4.0]]), torch.tensor([0, 1, 0]), torch.tensor([1])
        >>> print(recall_radius(z, gallery, labels, own, ks=[1]))
        tensor([[0.7071]], dtype=torch.float64)
    """
    ks = _check(gallery, labels, ks)
    if query_labels.shape != z.shape[:1]:
        raise LipsimError(f"expected a label for each of {len(z)} queries, got {tuple(query_labels.shape)}")
    z = z.to(gallery.features.device).double()
    found = z.new_zeros(len(z), len(ks))
    for row, own in enumerate(query_labels.tolist()):
        near = _Neighbourhood(z[row], gallery, max(ks), lipschitz, feature_error)
        same = near.items[labels[near.items] == own][:_MEMBERS]
        others = near.items[labels[near.items] != own]
        if not len(same):
            continue
        radius = near.radii(same, others)
        farther = near.farther(same)  # what the items that are not compared need at least
        most = min(max(ks), len(others))
        smallest = torch.minimum(radius.topk(most, largest=False).values, farther.unsqueeze(1)).amax(0)
        for column, k in enumerate(ks):
            found[row, column] = smallest[k - 1] if k <= most else farther.amax()
    return _known(found.clamp(min=0), z, gallery, lipschitz, feature_error)


@torch.no_grad()
def knn_radius(
    z: Tensor,
    gallery: Gallery,
    labels: Tensor,
    ks: Sequence[int],
    *,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The label that most of the ``k`` nearest items have, and a radius within which they do.

    If ``m`` of the ``k`` nearest are replaced, each of those that leave is behind all ``m`` that come in. So an item
    can leave no sooner than the ``m``-th of those outside overtakes it (the ``m``-th smallest ``r_ij`` over ``j``), and
    one can come in no sooner than it overtakes the ``m``-th of those inside. Within ε at most ``A`` can leave and ``B``
    come in, by label. The lead of the winner ``c`` over ``c'`` shrinks by ``min(A_c, m) + min(B_c', m)`` at most, less
    what has to leave of the label ``c'`` and to come in of ``c`` where there are too few others. The radius is the
    smallest ε at which that reaches the lead over some ``c'`` for some ``m``: a lower bound, and where no two labels
    are equally frequent at least the radius of the whole set of neighbours among those that are compared. For ``k = 1``
    any item of the label may be the nearest, as in :func:`recall_radius`.

    Args:
        z: queries ``(N, D)``.
        gallery: of ``M`` items.
        labels: of the gallery ``(M,)`` int64, from 0.
        ks: numbers of neighbours, at least one, each below ``M``.
        lipschitz: ``L``.
        feature_error: ``η``.

    Returns:
        ``(N, len(ks))`` each: labels, of equally frequent ones that of the nearest item, and radii in float64, which
        are 0 there; ∞ where nothing can change the vote.

    Raises:
        ValueError: labels of another length, or a ``k`` out of range.

    Example:
        >>> gallery = Gallery(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
        >>> winners, radius = knn_radius(torch.tensor([[3.0, 4.0]]), gallery, torch.tensor([0, 1, 1, 0]), ks=[1, 3])
        >>> print(winners, radius)
        tensor([[1, 1]]) tensor([[2.2361, 4.4721]], dtype=torch.float64)
    """
    ks = _check(gallery, labels, ks)
    z = z.to(gallery.features.device).double()
    ranked = nearest(z, gallery, max(ks))
    classes = int(labels.max()) + 1
    winners = torch.stack([most_frequent(labels[ranked[:, :k]]) for k in ks], 1)
    found = z.new_zeros(len(z), len(ks))
    for row, items in enumerate(ranked):
        near = _Neighbourhood(z[row], gallery, max(ks), lipschitz, feature_error)
        others = near.items[~torch.isin(near.items, items)]
        among, behind = near.radii(items, items).clamp(min=0), near.radii(items, others).clamp(min=0)
        farther = near.farther(items).amin()
        for column, k in enumerate(ks):
            inside = items[:k]
            votes = torch.bincount(labels[inside], minlength=classes)
            pairs = torch.cat([among[:k, k:], behind[:k]], 1)
            outside = labels[torch.cat([items[k:], others])]
            flip = _first_flip(pairs, labels[inside], outside, votes, int(winners[row, column]))
            found[row, column] = min(flip, float(farther))
    if 1 in ks:
        column = ks.index(1)
        options = {"lipschitz": lipschitz, "feature_error": feature_error}
        any_of_it = recall_radius(z, gallery, labels, winners[:, column], [1], **options)[:, 0]
        found[:, column] = torch.maximum(found[:, column], any_of_it)
    return winners, _known(found, z, gallery, lipschitz, feature_error)


def most_frequent(labels: Tensor) -> Tensor:
    """The most frequent label of each row, ``(N, k)`` int64 from the nearest on to ``(N,)``; the nearest of several."""
    each = (labels.unsqueeze(2) == labels.unsqueeze(1)).sum(2)
    first = (each == each.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    return labels.gather(1, first)[:, 0]


def _first_flip(pairs: Tensor, inside: Tensor, outside: Tensor, votes: Tensor, winner: int) -> float:
    """The smallest ε at which the winner's lead over some other label may be gone; ∞ where there is none.

    Args:
        pairs: ``(k, M)``, from which ε on each item outside is before each item inside.
        inside: labels ``(k,)``.
        outside: labels ``(M,)``.
        votes: by label, of those inside.
        winner: the label with most of them.
    """
    lead = votes[winner] - votes
    others = torch.ones_like(lead, dtype=torch.bool)
    others[winner] = False
    if not bool(others.any()):
        return math.inf
    smallest = int(lead[others].min())
    if smallest == 0:
        return 0.0
    most = min(pairs.shape)
    leaves = pairs.topk(most, dim=1, largest=False).values.mT
    comes = pairs.mT.topk(most, dim=1, largest=False).values.mT
    best = math.inf
    for m in range((smallest + 1) // 2, most + 1):
        leave, come = leaves[m - 1], comes[m - 1]

        def flips(away: Tensor, there: Tensor, m: int = m) -> bool:
            """Whether items inside and outside in these masks can change the vote by ``m`` exchanges."""
            gone, new = (
                torch.bincount(own[mask], minlength=len(votes)) for own, mask in ((inside, away), (outside, there))
            )
            if int(gone.sum()) < m or int(new.sum()) < m:
                return False
            loss = gone[winner].clamp(max=m) + new.clamp(max=m)
            loss -= (m - gone.sum() + gone).clamp(min=0) + (m - new.sum() + new[winner]).clamp(min=0)
            return bool((loss >= lead)[others].any())

        if int((leave < best).sum()) < m:  # and of more exchanges even fewer can leave
            break
        if not flips(leave < best, come < best):
            continue
        events: Tensor = torch.cat([leave, come]).unique()
        low, high = 0, int((events < best).sum()) - 1
        while low < high:
            middle = (low + high) // 2
            if flips(leave <= events[middle], come <= events[middle]):
                high = middle
            else:
                low = middle + 1
        best = float(events[low])
    return best


class _Neighbourhood:
    """The items nearest to a query ``(D,)``, of which radii are computed pair by pair.

    Attributes:
        items: the nearest first, but for the rounding of float32.
    """

    def __init__(self, z: Tensor, gallery: Gallery, k: int, lipschitz: float, feature_error: float) -> None:
        self.gallery, self.lipschitz, self.feature_error = gallery, lipschitz, feature_error
        self.unit, self.norm = unit_vectors(z, gallery.anchor), anchored_norm(z, gallery.anchor)
        similarity = gallery.similarities(self.unit.nan_to_num()[None])[0]
        top, self.items = similarity.topk(min(max(_NEAREST, 2 * k), len(gallery)))
        self.complete = len(self.items) == len(gallery)
        self._most = float(gallery.base(self.unit[None])[0]) + float(top[-1]) + gallery.slack

    def radii(self, own: Tensor, others: Tensor) -> Tensor:
        """``r_ij`` of items, ``(len(own), len(others))``."""
        return signed_lower_radius(
            self.unit,
            self.norm,
            self.gallery.unit(own),
            self.gallery.unit(others),
            lipschitz=self.lipschitz,
            feature_error=self.feature_error,
            least_norm=self.gallery.least_norm,
        )

    def farther(self, own: Tensor) -> Tensor:
        """What every item that is not among :attr:`items` needs at least to overtake each of some, ``(len(own),)``."""
        chord = torch.linalg.vector_norm(self.gallery.unit(own) - self.unit, dim=-1)
        if self.complete:
            return torch.full_like(chord, math.inf)
        return farther_radius(
            chord,
            max(0.0, 2 - 2 * self._most) ** 0.5,
            self.norm,
            lipschitz=self.lipschitz,
            feature_error=self.feature_error,
            gallery=self.gallery,
        )


def _known(radius: Tensor, z: Tensor, gallery: Gallery, lipschitz: float, feature_error: float) -> Tensor:
    """Radii, 0 where nothing is certified: without a bound, and for features that are not known well enough."""
    norm = anchored_norm(z, gallery.anchor)
    known = (norm > feature_error) & torch.isfinite(norm)
    if not (0 < lipschitz < math.inf and gallery.least_norm > feature_error):
        known = torch.zeros_like(known)
    return torch.where(known.unsqueeze(1) & ~torch.isnan(radius), radius, 0.0)


def _check(gallery: Gallery, labels: Tensor, ks: Sequence[int]) -> list[int]:
    """The numbers of neighbours, if they and the labels are of this gallery."""
    if labels.shape != (len(gallery),):
        raise LipsimError(f"expected a label for each of {len(gallery)} items, got {tuple(labels.shape)}")
    found = [check_count("k", k) for k in ks]
    if not found:
        raise LipsimError("expected at least one k, got none")
    for k in found:
        if k >= len(gallery):
            raise LipsimError(f"expected every k below {len(gallery)}, the size of the gallery, got k = {k}")
    return found
