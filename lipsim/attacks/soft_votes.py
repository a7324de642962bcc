"""Attacks on answers under randomized smoothing: the votes of noisy copies, made soft, so that they have a gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import IMAGES, Objective, Target, TwoAFCObjective
from lipsim.certificates.numbers import check_count, check_number
from lipsim.metric.distance import Distance
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_normal


class SmoothedObjective:
    """How far most noisy copies of a sample are broken: what attacks an answer under randomized smoothing.

    The mean over draws of ``sigmoid(h/s)``, less ½, of an objective ``h``: votes that are soft, so that attacks have a
    gradient (after SmoothAdv, Salman et al. 2019), with ``s`` the mean of ``|h|`` over the draws at the clean
    sample. The draws stay, in pairs of noise and its opposite: where ``h`` is linear it changes its sign where this
    does. What it breaks is broken for these few draws; ask :class:`lipsim.metric.SmoothedMetric` for the answer there.

    Args:
        objective: of N samples, :class:`TwoAFCObjective` say, whose ``chosen_left`` should be the smoothed answer.
        x: the clean samples ``(N, …)``, as attacks get them.
        sigma: standard deviation of the noise, above 0.
        draws: of each sample, an even number; each pass takes as many of the objective, all at once.
        seed: of the noise, which a smoothed metric of the same seed does not use.
        index: ``(N,)`` sample indices that noise depends on; None counts from 0.

    Attributes:
        images: ``(N, …)``, the clean samples: where attacks start.
        parts: what attacks take as ``parts``: of the objective, 1 where it has none.

    Raises:
        ValueError: a number of draws that is odd or none, or sigma out of range.
    """

    def __init__(
        self,
        objective: Objective,
        x: Tensor,
        sigma: float,
        draws: int = 16,
        *,
        seed: int = 0,
        index: Tensor | Sequence[int] | None = None,
    ) -> None:
        noise = _pairs_of_noise(x, sigma, draws, seed, index)
        self._set(objective.select(_each(len(x), draws, x.device)), x, noise)

    @classmethod
    def of_triplets(
        cls,
        metric: Distance,
        reference: Tensor,
        left: Tensor,
        right: Tensor,
        sigma: float,
        draws: int = 16,
        *,
        target: Target = "reference",
        chosen_left: Tensor | None = None,
        seed: int = 0,
        index: Tensor | Sequence[int] | None = None,
        check_range: bool = True,
    ) -> SmoothedObjective:
        """The votes of triplets whose three images all have noise (``moving="all"`` of a smoothed metric).

        Noisy copies of what does not move are embedded once, here, ``2·draws`` images of each triplet.

        Args:
            metric: as in :class:`TwoAFCObjective`.
            reference: ``(N, 3, H, W)``.
            left: ``(N, 3, H, W)``.
            right: ``(N, 3, H, W)``.
            sigma: as for the class.
            draws: as for the class.
            target: which image the attack moves; "all" moves the three together.
            chosen_left: ``(N,)`` bool, the smoothed answer. None: the metric's own answer without noise.
            seed: as for the class.
            index: as for the class.
            check_range: as in :class:`TwoAFCObjective`.

        Raises:
            ValueError: as the class, and as :class:`TwoAFCObjective`.
        """
        clean = TwoAFCObjective(metric, reference, left, right, target, chosen_left, check_range)
        if target == "all":
            return cls(clean, clean.images, sigma, draws, seed=seed, index=index)
        triplets = torch.stack([reference, left, right], 1)
        noise = dict(zip(IMAGES, _pairs_of_noise(triplets, sigma, draws, seed, index).unbind(2), strict=True))
        each = _each(len(reference), draws, reference.device)
        moved = noise.pop(target)  # which comes with every step
        images = dict(zip(IMAGES, (x[each] for x in triplets.unbind(1)), strict=True))
        for name, of_image in noise.items():
            images[name] = images[name] + of_image.flatten(0, 1)
        votes = cls.__new__(cls)
        # Its sign, ±1, of the answer that is to be broken.
        answers = clean.sign[each] < 0
        noisy = TwoAFCObjective(metric, **images, target=target, chosen_left=answers, check_range=False)
        votes._set(noisy, clean.images, moved)
        return votes

    def _set(self, objective: Objective, x: Tensor, noise: Tensor) -> None:
        """Take an objective of every noisy copy, the clean samples and their noise ``(N, draws, …)``."""
        self.objective, self.images, self.noise = objective, x, noise
        self.parts = int(getattr(objective, "parts", 1))
        with torch.no_grad():
            self.scale = self._values(x).abs().mean(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self._values(x) / self.scale).mean(1) - 0.5

    def select(self, rows: Tensor) -> SmoothedObjective:
        """The objective of some of the samples, with their noise."""
        part, draws = copy.copy(self), self.noise.shape[1]
        part.images, part.noise, part.scale = self.images[rows], self.noise[rows], self.scale[rows]
        places = rows.unsqueeze(1) * draws + torch.arange(draws, device=rows.device)
        part.objective = self.objective.select(places.flatten())
        return part

    def _values(self, x: Tensor) -> Tensor:
        """The objective of every noisy copy, ``(N, draws)``."""
        values = self.objective((x.unsqueeze(1) + self.noise).flatten(0, 1))
        return values.view(self.noise.shape[:2])


def _pairs_of_noise(x: Tensor, sigma: float, draws: int, seed: int, index: Tensor | Sequence[int] | None) -> Tensor:
    """Noise ``(N, draws, …)`` of samples ``(N, …)``, its second half the opposite of the first."""
    if check_count("draws", draws) % 2:
        raise LipsimError(f"expected an even number of draws, got {draws}")
    half = x.unsqueeze(1).expand(-1, draws // 2, *x.shape[1:])
    noise = check_number("sigma", sigma, above=True) * sample_normal(half, seed=seed, index=index)
    return torch.cat([noise, -noise], 1)


def _each(count: int, times: int, device: torch.device) -> Tensor:
    """Rows 0 to ``count − 1``, each so many times."""
    return torch.arange(count, device=device).repeat_interleave(times)
