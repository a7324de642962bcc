"""Pictures of the triplets that a test certified best and worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim.attacks import TwoAFCObjective, pgd
from lipsim.callbacks.base import TripletCallback
from lipsim.certificates.numbers import check_count
from lipsim.data import Triplet
from lipsim.data.loading import read_batch
from lipsim.evaluation.batches import EvaluatedBatch, outside_inference_mode
from lipsim.evaluation.module import EvaluationModule, evaluation_loaders
from lipsim.metric import PerceptualMetric
from lipsim.results.plots import plot_gallery


class TripletGallery(TripletCallback):
    """Draws the triplets with the largest and with the smallest radii: ``plots/gallery.png``.

    Next to each reference stands what PGD with a budget of its certified radius makes of it, and the change that it
    found, amplified.

    Args:
        num_triplets: of each kind.
        directory: as in :class:`TripletCallback`.
        steps: of the attack; 0 draws none.
    """

    files = ("plots/gallery.png", "plots/gallery-*.png")

    def __init__(self, num_triplets: int = 4, directory: Path | None = None, steps: int = 40) -> None:
        super().__init__(directory, validate=False)
        self.num_triplets, self.steps = check_count("num_triplets", num_triplets), check_count("steps", steps, least=0)

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        radius = evaluated.radius("reference")
        return {"right_vote": batch.right_vote, "margin": evaluated.margin, "radius": radius}

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        found = self.gather(trainer, module)
        folder = self.output_directory(trainer) / "plots"
        paths = {name: folder / ("gallery.png" if len(found) == 1 else f"gallery-{name}.png") for name in found}
        loaders = dict(zip(module.set_names(), evaluation_loaders(trainer), strict=True))
        with outside_inference_mode():
            for name, rows in found.items() if self.writes(trainer) else ():
                self._draw(module, loaders[name], paths[name], _extremes(rows, self.num_triplets))
        self.remove_others(trainer, list(paths.values()))

    @rank_zero_only
    def _draw(self, module: EvaluationModule, loader: DataLoader[Any], path: Path, rows: dict[str, Tensor]) -> None:
        positions = rows.pop("position").tolist()
        batch = read_batch(loader, positions).to(module.device)
        # No gradients to the weights, as in AttackRobustness.
        metric = module.metric.frozen_copy()
        attacked = attack_at_radius(metric, batch, rows, self.steps) if self.steps else None
        images = torch.stack([batch.reference, batch.left, batch.right], dim=1)
        plot_gallery(path, images, attacked=attacked, **rows)


def attack_at_radius(
    metric: PerceptualMetric, batch: Triplet, rows: dict[str, Tensor], steps: int
) -> tuple[Tensor, list[bool]]:
    """PGD on each reference with its own certified radius as the budget.

    Args:
        metric: the metric, without gradients to its weights.
        batch: N triplets.
        rows: ``margin`` and ``radius`` of each.
        steps: of PGD.

    Returns:
        Attacked references ``(N, 3, H, W)``, and which answers flipped: none, if the certificates are right.
    """
    images, flipped = [], []
    chosen_left = (rows["margin"] > 0).to(batch.index.device)
    for i, radius in enumerate(rows["radius"].tolist()):
        row = torch.tensor([i], device=batch.index.device)
        part = batch.select(row)
        objective = TwoAFCObjective(metric, part.reference, part.left, part.right, chosen_left=chosen_left[row])
        images.append(pgd(objective, part.reference, norm=2, eps=radius, steps=steps, index=part.index))
        flipped.append(radius > 0 and bool(objective(images[-1]) > 0))
    return torch.cat(images), flipped


def _extremes(rows: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The ``count`` largest and the ``count`` smallest radii, the largest first."""
    order = torch.sort(rows["radius"], descending=True, stable=True).indices
    keep = order if len(order) <= 2 * count else torch.cat([order[:count], order[-count:]])
    return {key: column[keep] for key, column in rows.items()}
