"""The metric as one of torchmetrics: accumulated over batches and processes, logged by Lightning, plotted."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lipsim.certificates.numbers import check_number
from lipsim.certificates.rounding import round_down, round_up
from lipsim.metric.files import DEFAULT, load
from lipsim.metric.modules import to_input
from lipsim.metric.perceptual_metric import PerceptualMetric, Reduction
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import unique_first


class LipSimilarity(Metric):
    """Mean distance between pairs of images, as torchmetrics' ``LearnedPerceptualImagePatchSimilarity`` has LPIPS.

    Images are ``(N, 3, H, W)`` of any size in [0, 1], brought to the metric's own size differentiably. They are
    compared in full precision, with autocast and TF32 off, so that the score does not depend on how a model is trained.
    Sums are kept in float64, and summed over processes; what a distributed sampler repeats counts once where
    ``per_sample`` is set and updates say which samples they hold.

    The network is neither in ``state_dict()`` nor among ``parameters()``: checkpoints of a LightningModule that has
    this stay small. It moves to the device with everything else, and stays in evaluation mode.

    Args:
        metric: a metric, of which this keeps a frozen copy, or the file or name of one (see :func:`lipsim.load`).
        reduction: "mean" or "sum" over all pairs, or "none" (or None): the distance of each, without gradients.
        normalize: images are in [-1, 1]. (torchmetrics' LPIPS takes that range unless ``normalize=True`` says [0, 1].)
        eps: where given, the result is a dictionary: "distance", and "lower" and "upper", between which the distance
            provably stays while ``img1`` changes by at most this ℓ2 distance, at the metric's size.
        per_sample: keep the distance of each pair, for :attr:`scores`.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: an unknown reduction, or a negative ``eps``.

    Example:
        >>> similarity = LipSimilarity("quickstart")
        >>> similarity.update(torch.zeros(4, 3, 90, 90), torch.ones(4, 3, 90, 90))
        >>> similarity.update(torch.zeros(4, 3, 90, 90), torch.zeros(4, 3, 90, 90))
        >>> bool(0 < similarity.compute() < 1)
        True
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor
    rows: list[Tensor]
    index: list[Tensor]

    def __init__(
        self,
        metric: PerceptualMetric | str | Path = DEFAULT,
        reduction: Reduction | None = "mean",
        normalize: bool = False,
        *,
        eps: float | None = None,
        per_sample: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if reduction not in (None, "none", "mean", "sum"):
            raise LipsimError(f"expected reduction 'none', 'mean' or 'sum', got {reduction!r}")
        # In a tuple: as a submodule its weights would be in every checkpoint.
        self._metric = (load(metric) if isinstance(metric, str | Path) else metric.frozen_copy(),)
        self.reduction: Reduction = reduction or "none"
        self.normalize = normalize
        self.eps = None if eps is None else check_number("eps", eps)
        self.per_sample = per_sample or self.reduction == "none"
        if self.per_sample:
            self.add_state("rows", default=[], dist_reduce_fx="cat")
            self.add_state("index", default=[], dist_reduce_fx="cat")
        else:
            columns = torch.zeros(1 if eps is None else 3, dtype=torch.float64)
            self.add_state("total", default=columns, dist_reduce_fx="sum")
            self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def metric(self) -> PerceptualMetric:
        """What compares the images."""
        return self._metric[0]

    @property
    def scores(self) -> Tensor:
        """Distance of each pair that this process has seen, in their order, ``(N,)`` float64.

        Raises:
            ValueError: they were not kept.
        """
        if not self.per_sample:
            raise LipsimError("the distance of each pair is kept with per_sample=True")
        return dim_zero_cat(self.rows)[:, 0] if len(self.rows) else torch.zeros(0, dtype=torch.float64)

    def update(self, img1: Tensor, img2: Tensor, index: Tensor | Sequence[int] | None = None) -> None:
        """Compare ``img1[i]`` with ``img2[i]``.

        Args:
            img1: ``(N, 3, H, W)`` in [0, 1].
            img2: the same.
            index: position of each pair in the data set, with ``per_sample``, in every update or in none: pairs that
                are seen again, as a distributed sampler fills up with, count once.

        Raises:
            ValueError: other images, different numbers of them, or an index that is not kept.
        """
        if len(img1) != len(img2):
            raise LipsimError(f"expected as many images on both sides, got {len(img1)} and {len(img2)}")
        if index is not None and not (self.per_sample and len(index) == len(img1)):
            raise LipsimError(
                f"expected an index with per_sample=True alone, one for each of {len(img1)} pairs, got {len(index)} "
                f"with per_sample={self.per_sample}"
            )
        with full_precision():
            x, y = (to_input(self.metric, images, self.normalize) for images in (img1, img2))
            columns = [self.metric(x, y).double()]
            if self.eps is not None:
                columns += self.metric.distance_bounds(x.detach(), y.detach(), self.eps)
        rows = torch.stack(columns, dim=1)
        if not self.per_sample:
            self.total = self.total + rows.sum(0)
            self.count = self.count + len(rows)
            return
        self.rows.append(rows.detach())  # with their graphs they would keep all images
        if index is not None:
            self.index.append(torch.as_tensor(index, dtype=torch.int64, device=rows.device))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Mean, sum or each of the distances over all processes; with ``eps``, and their bounds.

        Raises:
            ValueError: no pair was seen, or some updates had an index and others had none.
        """
        rows = self._rows() if self.per_sample else self.total
        count = len(rows) if self.per_sample else int(self.count)
        if not count:
            raise LipsimError("no pair of images was seen; update before compute")
        if self.reduction != "none":
            rows = rows.sum(0) if self.per_sample else rows
            rows = rows / count if self.reduction == "mean" else rows
        dtype = self.metric.dtype
        distance, *ends = rows.unbind(-1)
        if self.eps is None:
            return distance.to(dtype)
        lower, upper = ends
        return {"distance": distance.to(dtype), "lower": round_down(lower, dtype), "upper": round_up(upper, dtype)}

    def _rows(self) -> Tensor:
        """``(N, columns)``, each pair once; in the order of the index where there is one."""
        rows: Tensor = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, 1)
        index = dim_zero_cat(self.index) if len(self.index) else torch.zeros(0)
        if not len(index):
            return rows
        if len(index) != len(rows):
            raise LipsimError(f"expected an index in every update or in none, got {len(index)} for {len(rows)} pairs")
        return rows[unique_first(index)[1]]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather what all processes have seen; one that has seen nothing sends none in the shape and dtype of others.

        What torchmetrics would send for it has another number of dimensions, at which gloo aborts.
        """
        if self.per_sample:
            if not self.rows:
                columns = 1 if self.eps is None else 3
                self.rows.append(torch.zeros(0, columns, dtype=torch.float64, device=self.device))
            if not self.index:
                self.index.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of ``compute`` or ``forward``, a list of them (over steps), or what compute gives now.

        Args:
            val: results; None computes.
            ax: axes to draw into.

        Returns:
            Figure and axes of matplotlib.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        # Devices alone: a model in half precision must not round the sums, nor the network.
        device = fn(torch.zeros(1, device=self.device)).device
        super()._apply(lambda tensor: tensor.to(device), exclude_state)
        self.metric.to(device)
        return self
