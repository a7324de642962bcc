"""Pictures of the triplets that a test certified best and worst."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lipsim.callbacks.base import TripletCallback
from lipsim.data import Triplet
from lipsim.plots import plot_gallery
from lipsim.training.base import Features, MetricModule


class TripletGallery(TripletCallback):
    """Keeps the triplets with the largest and with the smallest radii and draws them: ``plots/gallery.png``.

    Args:
        num_triplets: of each kind.
        directory: as in :class:`TripletCallback`.
    """

    def __init__(self, num_triplets: int = 4, directory: Path | None = None) -> None:
        super().__init__(directory, validate=False)
        if num_triplets < 1:
            raise ValueError(f"expected num_triplets of at least 1, got {num_triplets}")
        self.num_triplets = num_triplets
        self.kept: dict[str, dict[str, Tensor]] = {}

    def begin(self, trainer: L.Trainer, module: MetricModule) -> None:
        self.kept = {}

    def see(self, trainer: L.Trainer, module: MetricModule, features: Features, batch: Triplet, name: str) -> None:
        certificate = module.metric.certify_features(batch.reference, *features)
        rows = {
            "images": torch.stack([batch.reference, batch.left, batch.right], dim=1).cpu(),
            "radius": certificate.radius.cpu(),
            "margin": certificate.margin.cpu(),
            "right_vote": batch.right_vote.cpu(),
            "index": batch.index.cpu(),
        }
        if name in self.kept:
            rows = {key: torch.cat([self.kept[name][key], column]) for key, column in rows.items()}
        self.kept[name] = _extremes(rows, self.num_triplets)

    def finish(self, trainer: L.Trainer, module: MetricModule) -> None:
        for name, rows in self.kept.items():
            if trainer.world_size > 1:
                parts: list[dict[str, Tensor]] = [{} for _ in range(trainer.world_size)]
                torch.distributed.all_gather_object(parts, rows)
                rows = {key: torch.cat([part[key] for part in parts]) for key in rows}
            self._draw(trainer, name, _extremes(rows, self.num_triplets))

    @rank_zero_only
    def _draw(self, trainer: L.Trainer, name: str, rows: dict[str, Tensor]) -> None:
        file = "gallery.png" if len(self.kept) == 1 else f"gallery-{name}.png"
        plot_gallery(self.output_directory(trainer) / "plots" / file, **rows)


def _extremes(rows: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The ``count`` largest and the ``count`` smallest radii, each triplet once, the largest first."""
    order = torch.sort(rows["radius"], descending=True, stable=True).indices
    seen: dict[int, int] = {int(rows["index"][i]): int(i) for i in order.flip(0)}
    order = torch.tensor([int(i) for i in order if seen[int(rows["index"][i])] == int(i)])
    chosen = torch.unique(torch.cat([order[:count], order[-count:]]))
    keep = order[torch.isin(order, chosen)]
    return {key: column[keep] for key, column in rows.items()}
