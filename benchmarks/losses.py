"""Distillation losses compared: the same student, steps, images and fine-tuning, one loss a row.

    python scripts/train.py                     # writes the teacher, runs/quickstart/teacher/teacher.safetensors
    python benchmarks/losses.py --images ../shared/data/imagenet-sample [--losses RMSE Cosine] [--seeds 0 1]

The default student follows a teacher's embeddings, computed once, of photographs at 64 pixels (train/) and their flips,
through the stage ``Distillation``; then it learns triplets through ``FineTuning`` with a hinge on the exact radius.

- Held-out photographs (val/): mean cosine similarity of the embeddings, and the share of random triplets that student
  and teacher order alike.
- photographs: fine-tuned on random triplets of train/ that the teacher labels, scored on those triplets of val/.
- builtin: fine-tuned instead on the quickstart's triplets with their simulated votes, scored on test triplets.

Scores are in %, natural and certified at ℓ2 budgets; the median radius is that of all triplets. Each number is the mean
over the seeds of the student, the data and the order of batches.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, default_collate

sys.path.insert(0, str(Path(__file__).parent))
from tasks import embed, scores

from lipsim import certificates
from lipsim.data import BuiltinTriplets, SharedTriplet, Triplet, collate_triplets
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.embeddings.folder import EmbeddedFolder, EmbeddedImages
from lipsim.data.sets.folder import FolderImages
from lipsim.metric import save
from lipsim.students import OrthogonalShiftNetwork
from lipsim.training import RMSE, Cosine, Distillation, FineTuning, RadiusHinge, Relational, ScaleFree, WarmupCosine
from lipsim.training.base import Stage
from lipsim.training.losses import DistillationLoss
from lipsim.training.teacher_cache import cache_teacher

SIZE, FEATURES = 64, 128
LOSSES: dict[str, Callable[[], DistillationLoss] | None] = {
    "none": None,
    "RMSE": RMSE,
    "RMSE, scale 4": lambda: RMSE(4.0),
    "RMSE, scale 8": lambda: RMSE(8.0),
    "RMSE, scale 16": lambda: RMSE(16.0),
    "Cosine": Cosine,
    "Relational": Relational,
    "ScaleFree": ScaleFree,
}
SCORES = {"natural": 1, "36/255": 1, "72/255": 1, "108/255": 1, "1": 1, "median radius": 2}
TABLES = {  # column → decimals
    "held-out": {"cosine similarity": 3, "order in %": 1, "median norm": 2},
    "photographs": SCORES,
    "builtin": SCORES,
}
Rows = dict[str, list[float]]


class Batches(IterableDataset):
    """Batches that a function makes, without end."""

    def __init__(self, make: Callable[[], EmbeddedImages | Triplet]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[EmbeddedImages | Triplet]:
        while True:
            yield self.make()


class Photographs:
    """Both views of the photographs of train/ and the plain ones of val/, with the teacher's embeddings."""

    def __init__(self, root: Path, cache: EmbeddingCache) -> None:
        self.train = [self._read(root, "train", view, cache) for view in ("plain", "flip")]
        self.val = self._read(root, "val", "plain", cache)
        ids = torch.randint(len(self.val.images), (20000, 3), generator=torch.Generator().manual_seed(3))
        self.val_ids, self.val_vote = labelled(ids, self.val.embedding)

    @staticmethod
    def _read(root: Path, part: str, view: str, cache: EmbeddingCache) -> EmbeddedImages:
        images = FolderImages(root / part, SIZE, short_side=SIZE, views=(view,))
        embedded = EmbeddedFolder(images, cache, f"{part}/")
        found: EmbeddedImages = default_collate([embedded[i] for i in range(len(embedded))])
        return found

    def batch(self) -> EmbeddedImages:
        """64 photographs, each in one of its views, for distillation."""
        flipped, rows = torch.rand(64) < 0.5, torch.randint(len(self.train[0].images), (64,))
        plain, flip = ([part[rows] for part in view] for view in self.train)
        return EmbeddedImages(
            torch.where(flipped[:, None, None, None], flip[0], plain[0]),
            torch.where(flipped[:, None], flip[1], plain[1]),
        )

    def triplets(self) -> SharedTriplet:
        """256 triplets of 64 photographs in one view, labelled by the teacher."""
        view = self.train[int(torch.randint(2, ()))]
        rows = torch.randperm(len(view.images))[:64]
        ids, vote = labelled(torch.randint(64, (256, 3)), view.embedding[rows])
        return SharedTriplet(view.images[rows], ids, vote, torch.arange(len(ids)))


def labelled(ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Triplets of three distinct images out of ``(N, 3)``, and which candidate the teacher finds nearer, as a vote."""
    ids = ids[(ids[:, :1] != ids[:, 1:]).all(1) & (ids[:, 1] != ids[:, 2])]
    unit = F.normalize(target[ids].double(), dim=-1)
    return ids, ((unit[:, 0] * (unit[:, 1] - unit[:, 2])).sum(-1) < 0).float()


def train(module: Stage, make: Callable[[], EmbeddedImages | Triplet], steps: int) -> None:
    """Run a stage for some steps."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, **quiet)
    trainer.fit(module, train_dataloaders=DataLoader(Batches(make), batch_size=None), weights_only=True)


def row(features: Tensor, right_vote: Tensor) -> list[float]:
    """Scores of features ``(N, 3, D)`` and the median radius."""
    radius = certificates.reference_radius(*features.double().unbind(1))
    return [*scores(features, right_vote), float(radius.median())]


def compare(name: str, photographs: Photographs, builtin: list[Triplet], options: argparse.Namespace) -> Rows:
    """All numbers of one loss: distil, follow, fine-tune twice."""
    loss, (known, test) = LOSSES[name], builtin
    student = OrthogonalShiftNetwork(SIZE, FEATURES)
    distillation = Distillation(
        options.teacher,
        student,
        loss=loss() if loss else None,
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.9)),
        schedule=WarmupCosine(50),
    )
    if loss:
        train(distillation, photographs.batch, options.steps)
    z, target = embed(student, photographs.val.images), photographs.val.embedding
    similarity = float(F.cosine_similarity(z, target).mean())
    rows = {
        "held-out": [similarity, scores(z[photographs.val_ids], photographs.val_vote)[0], float(z.norm(dim=1).median())]
    }

    def some() -> Triplet:
        return known.select(torch.randint(len(known), (64,)))

    with tempfile.TemporaryDirectory() as folder:
        file = save(distillation.metric, Path(folder) / "distilled.safetensors")
        for kind, make in (("photographs", photographs.triplets), ("builtin", some)):
            tuning = FineTuning(init_from=file, loss=RadiusHinge(2.0), augment=kind == "builtin")
            train(tuning, make, options.steps // 2)
            encoder = tuning.metric.encoder
            if kind == "photographs":
                rows[kind] = row(embed(encoder, photographs.val.images)[photographs.val_ids], photographs.val_vote)
            else:
                features = embed(encoder, torch.cat(test.images())).unflatten(0, (3, -1)).transpose(0, 1)
                rows[kind] = row(features, test.right_vote)
    return rows


def main() -> None:
    """Print three tables in markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet-sample"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/teacher/teacher.safetensors"))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=600, help="of distillation; fine-tuning takes half of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as folder:
        where = options.teacher, options.images, folder
        cache_teacher(*where, short_side=SIZE, dtype="float32", num_workers=0, accelerator="cpu")
        photographs = Photographs(options.images, EmbeddingCache(folder))
    builtin = [collate_triplets(list(BuiltinTriplets(*part, seed=1))) for part in (("train", 6000), ("test", 1500))]
    found: dict[str, list[Rows]] = {name: [] for name in options.losses}
    for seed in options.seeds:
        for name in options.losses:
            L.seed_everything(seed, verbose=False)
            start = time.process_time()
            found[name].append(compare(name, photographs, builtin, options))
            print(
                f"{name}, seed {seed}, {time.process_time() - start:.0f} s: {found[name][-1]}",
                file=sys.stderr,
                flush=True,
            )
    for kind, columns in TABLES.items():
        print(f"\n| {kind} | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
        values = {name: torch.tensor([run[kind] for run in runs]) for name, runs in found.items()}
        spread = torch.stack([runs.amax(0) - runs.amin(0) for runs in values.values()]).amax(0)
        means = {name: runs.mean(0) for name, runs in values.items()}
        for name, numbers in {**means, "largest difference of two seeds": spread}.items():
            cells = [f"{number:.{digits}f}" for number, digits in zip(numbers.tolist(), columns.values(), strict=True)]
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
