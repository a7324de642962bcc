"""What the votes on some triplets say about the others: a point for each image, found from votes alone.

Where the same few images are judged in many triplets, the votes know more than each says by itself. An *ordinal
embedding* gives each image a point such that distances of points explain the votes; it has no input but the votes, so
that nothing bounds how it depends on pixels, and it says nothing about other images. It is good for two things: the
votes that it implies on all other triplets of these images are more to train on, with less noise in each; and the share
of held-out majorities that it has right is an estimate of what any metric could learn from those votes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates.numbers import check_count, check_number
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

DECAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # among which the held-out votes choose
_FOLDS = 5
_NOTHING = 0.98 * math.log(2)  # log-loss of votes left out above which they are as good as a coin's
_OPTIONS = {"maxiter": 300, "maxcor": 20}
_IMAGES_OF_A_TRIPLET = 3


@dataclass(frozen=True)
class OrdinalEmbedding:
    """Points of M images in F independent fits, and how well they say what people will vote.

    Attributes:
        points: ``(F, M, dim)`` float64; an image that no vote is about is near 0 where there is a decay.
        decay: weight of ``‖point‖²/2`` beside the log-loss of a vote.
        held_out_loss: mean log-loss, in nats, of votes that a fit with this decay had not seen; ``log 2`` is a coin's.
            NaN where the decay was given.
    """

    points: Tensor
    decay: float
    held_out_loss: float

    def right_share(self, ids: Tensor) -> Tensor:
        """The share of judges ``(N,)`` that would choose right, by the mean of the fits, float32.

        Args:
            ids: ``(N, 3)`` int64: reference, left, right, positions among the images.
        """
        triplets = _Triplets.of(ids)
        shares = torch.stack([torch.sigmoid(triplets.log_odds(points)) for points in self.points])
        return shares.mean(0).float()


def embed_votes(
    ids: Tensor,
    right_vote: Tensor,
    *,
    num_images: int | None = None,
    dim: int = 10,
    decay: float | None = None,
    fits: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> OrdinalEmbedding:
    """The ordinal embedding of votes: t-distributed stochastic triplets (van der Maaten and Weinberger 2012).

    A judge chooses right with probability ``k(x, x₁)/(k(x, x₀) + k(x, x₁))``, where ``k`` is Student's kernel with
    ``dim − 1`` degrees of freedom; points maximise the likelihood of all votes under a normal prior. Some ten seconds
    of a core for 10,000 votes on 100 images, in proportion to the votes.

    Args:
        ids: ``(N, 3)`` int64: reference, left, right, positions among the images.
        right_vote: ``(N,)`` in [0, 1], the fraction of the judges who chose right.
        num_images: how many images there are; None: up to the last that occurs.
        dim: of the points, at least 2.
        decay: precision of the prior; None: the largest of :data:`DECAYS` whose log-loss of votes left out is within
            one standard error of the least (Breiman et al. 1984).
        fits: independent starts, whose answers are averaged.
        seed: of the starts and of what is left out.
        progress: where to tell how far it is.

    Raises:
        ValueError: no votes, images outside of their number, votes outside [0, 1], or too few votes to leave some out.
    """
    check_count("dim", dim, least=2)
    check_count("fits", fits)
    num_images = _check_votes(ids, right_vote, num_images)
    generator = torch.Generator().manual_seed(seed)
    triplets, vote = _Triplets.of(ids), right_vote.double()
    loss = math.nan
    if decay is None:
        question, count = _questions(ids)
        if count < _FOLDS:
            raise LipsimError(
                f"expected votes on at least {_FOLDS} triplets to choose a decay by, got {count}; pass decay"
            )
        # Other judges of a triplet would give away what was left out.
        fold = torch.randperm(count, generator=generator)[question] % _FOLDS
        losses = {each: torch.zeros_like(vote) for each in DECAYS}
        for each in DECAYS:
            for left_out in range(_FOLDS):
                if progress is not None:
                    progress(f"choosing the decay: {each:g}, part {left_out + 1} of {_FOLDS}")
                points = _fit(triplets, vote, fold != left_out, each, num_images, dim, generator)
                losses[each][fold == left_out] = triplets.surprise(points, vote)[fold == left_out]
        best = min(losses.values(), key=lambda each: each.mean().item())
        enough = best.mean() + _standard_error(best, question, count)
        decay = max(each for each in DECAYS if losses[each].mean() <= enough)
        loss = losses[decay].mean().item()
    check_number("decay", decay)
    found = []
    for number in range(fits):
        if progress is not None:
            progress(f"embedding the votes, start {number + 1} of {fits}")
        found.append(_fit(triplets, vote, torch.ones_like(vote), decay, num_images, dim, generator))
    return OrdinalEmbedding(torch.stack(found), decay, loss)


def implied_votes(
    ids: Tensor, right_vote: Tensor, count: int, *, seed: int = 0, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Triplets of the images that votes are about, drawn at random, and the votes on them that these imply.

    References are those of the votes: where data are divided by reference, the others belong to another part.

    Args:
        ids: ``(N, 3)`` int64, the triplets with votes, as in :func:`embed_votes`.
        right_vote: ``(N,)``, their votes.
        count: how many to draw.
        seed: of the draw and of the embedding.
        progress: where to tell how far it is.

    Returns:
        ``ids``: ``(count, 3)`` int64, three different images each; ``right_vote``: ``(count,)`` float32.

    Raises:
        ValueError: as in :func:`embed_votes`; fewer than three images; or the votes say no more of each other than a
            coin would, as where each image is in one triplet.
    """
    check_count("count", count)
    images = torch.unique(ids)
    if len(images) < _IMAGES_OF_A_TRIPLET:
        raise LipsimError(f"expected votes on at least {_IMAGES_OF_A_TRIPLET} images, got {len(images)}")
    embedding = embed_votes(ids, right_vote, seed=seed, progress=progress)
    if embedding.held_out_loss > _NOTHING:
        raise LipsimError(
            f"the {len(ids)} votes on {len(images)} images imply none on other triplets (log-loss of votes left out: "
            f"{embedding.held_out_loss:.3f}, of a coin: {math.log(2):.3f}): images have to be judged in many triplets"
        )
    references = torch.searchsorted(images, torch.unique(ids[:, 0]))
    drawn = images[_distinct(references, len(images), count, torch.Generator().manual_seed(seed))]
    return drawn, embedding.right_share(drawn)


def _questions(ids: Tensor) -> tuple[Tensor, int]:
    """Which question each triplet ``(N, 3)`` asks, ``(N,)``, whichever side is left, and how many there are.

    Numbered as they first occur.
    """
    ordered = torch.cat([ids[:, :1], ids[:, 1:].sort(1).values], 1)
    distinct, number = torch.unique(ordered, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, number, torch.arange(len(ids)), "amin")
    return first.argsort().argsort()[number], len(distinct)


def _standard_error(losses: Tensor, question: Tensor, count: int) -> Tensor:
    """Of the mean of losses ``(N,)`` that are independent from question to question only."""
    sums = losses.new_zeros(count).index_add(0, question, losses - losses.mean())
    return sums.square().sum().mul(count / (count - 1)).sqrt() / len(losses)


@dataclass(frozen=True)
class _Triplets:
    """Triplets by their pairs, since the same few pairs occur in many.

    Attributes:
        pairs: ``(P, 2)``, different ones.
        place: ``(N, 2)``, where (reference, left) and (reference, right) are among them.
    """

    pairs: Tensor
    place: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> _Triplets:
        both = torch.stack([ids[:, [0, 1]], ids[:, [0, 2]]], 1).flatten(0, 1).sort(1).values
        pairs, place = torch.unique(both, dim=0, return_inverse=True)
        return cls(pairs, place.view(-1, 2))

    def log_odds(self, points: Tensor) -> Tensor:
        """Log-odds ``(N,)`` that right is chosen, of points ``(M, dim)``."""
        freedom = points.shape[1] - 1
        squared = (points[self.pairs[:, 0]] - points[self.pairs[:, 1]]).square().sum(1)
        log_kernel = -(freedom + 1) / 2 * torch.log1p(squared / freedom)
        return log_kernel[self.place[:, 1]] - log_kernel[self.place[:, 0]]

    def surprise(self, points: Tensor, right_vote: Tensor) -> Tensor:
        """Log-loss ``(N,)`` of votes."""
        return F.binary_cross_entropy_with_logits(self.log_odds(points), right_vote, reduction="none")


def _fit(
    triplets: _Triplets,
    right_vote: Tensor,
    weights: Tensor,
    decay: float,
    num_images: int,
    dim: int,
    generator: torch.Generator,
) -> Tensor:
    """Points ``(num_images, dim)`` under which votes of these weights ``(N,)`` are likeliest, from a random start."""
    from scipy import optimize  # seconds to import

    start = 0.1 * torch.randn(num_images, dim, generator=generator, dtype=torch.float64)

    def surprise(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        points = torch.from_numpy(flat).view(num_images, dim).requires_grad_()
        with torch.enable_grad():
            loss = (triplets.surprise(points, right_vote) * weights).sum() + decay / 2 * points.square().sum()
            (gradient,) = torch.autograd.grad(loss, points)
        return loss.item(), gradient.flatten().numpy()

    found = optimize.minimize(surprise, start.flatten().numpy(), jac=True, method="L-BFGS-B", options=_OPTIONS)
    return torch.from_numpy(found.x).view(num_images, dim)


def _check_votes(ids: Tensor, right_vote: Tensor, num_images: int | None) -> int:
    """How many images there are."""
    if ids.ndim != 2 or ids.shape[1] != _IMAGES_OF_A_TRIPLET or ids.dtype != torch.int64 or not len(ids):
        raise LipsimError(f"expected triplets (N, 3) of int64, N ≥ 1, got {tuple(ids.shape)} of {ids.dtype}")
    if right_vote.shape != ids.shape[:1]:
        raise LipsimError(f"expected a vote for each of {len(ids)} triplets, got {tuple(right_vote.shape)}")
    if not bool(((right_vote >= 0) & (right_vote <= 1)).all()):
        raise LipsimError("expected votes in [0, 1]")
    last = int(ids.max()) + 1
    num_images = last if num_images is None else check_count("num_images", num_images)
    if int(ids.min()) < 0 or last > num_images:
        raise LipsimError(f"expected positions of {num_images} images, got {int(ids.min())} to {last - 1}")
    return num_images


def _distinct(references: Tensor, num_images: int, count: int, generator: torch.Generator) -> Tensor:
    """Triplets ``(count, 3)`` of different positions, the first of ``references``, each as likely as any other."""
    reference = references[torch.randint(len(references), (count,), generator=generator)]
    left = torch.randint(num_images - 1, (count,), generator=generator)
    left += left >= reference
    right = torch.randint(num_images - 2, (count,), generator=generator)
    right += right >= torch.minimum(reference, left)
    right += right >= torch.maximum(reference, left)
    return torch.stack([reference, left, right], 1)
