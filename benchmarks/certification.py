"""What certifying costs beside the forward passes it needs: 10,000 triplets of distinct images at 64 pixels.

    python benchmarks/certification.py [--threads 2] [--rounds 3] [--triplets 10000] [--checkpoint quickstart]

The baseline, 1.00, is what has to be done anyway: every distinct image read from the same loader and embedded once, in
full precision with folded weights. Against it, in turns: a whole test by the trainer with CertifyRadii (data loading,
audit, every radius, pixels, tables, results.json and radii.csv) without the search for the float32 error; that search
alone, whose cost does not grow with the data; and the geometry alone, from features that are there. The last three
rows are what the radii of CertifyRadii and AttackRobustness cost together: where each callback certifies for itself and
each radius projects its own features, where one certificate of a batch is for both, and for AttackRobustness alone,
which needs one radius. Elapsed and processor time, as ratios to the baseline of the same round; medians of the rounds.
Elapsed time wants a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipsim import certificates
from lipsim.callbacks import CertifyRadii
from lipsim.callbacks.run_options import quiet_warnings
from lipsim.data import Triplet
from lipsim.datamodules.base import TripletData
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.exported import ExportedMetric
from lipsim.layers import freeze
from lipsim.metric import load
from lipsim.utils.precision import full_precision

ERROR_SAMPLE = 32


class Distinct(Dataset[Triplet]):
    """Triplets of random images, no image twice, as 8 bits in memory."""

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 3, size, size), dtype=torch.uint8, generator=generator)
        # Like images of a triplet: the candidates are near the reference.
        self.images[:, 1:] = (self.images[:, :1] // 2 + self.images[:, 1:] // 2).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Triplet:
        """A batch."""
        rows = torch.tensor(indices)
        reference, left, right = (self.images[rows].float() / 255).unbind(1)
        return Triplet(reference, left, right, (rows % 2).float(), rows)


class DistinctData(TripletData):
    """These triplets as a test set."""

    def __init__(self, count: int, size: int, batch_size: int) -> None:
        super().__init__(batch_size)
        self.test_sets = {"distinct": Distinct(count, size)}
        self.collate = _as_it_is


def _as_it_is(batch: Triplet) -> Triplet:
    return batch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="quickstart")
    parser.add_argument("--triplets", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = ExportedMetric(options.checkpoint)
    metric = module.metric
    data = DistinctData(options.triplets, metric.image_size, options.batch)
    features: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward() -> None:
        features.clear()
        freeze(metric)  # a test has unfolded its weights
        with torch.no_grad(), full_precision():
            features.extend(batch.embed(metric.embed) for batch in data.test_dataloader()[0])

    def test() -> None:
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            certify = CertifyRadii(error_sample=0, directory=Path(folder))
            trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[certify], default_root_dir=folder, **quiet)
            with quiet_warnings():
                trainer.test(module, datamodule=data, verbose=False)

    def sample() -> None:
        images = data.test_sets["distinct"].images[:11].flatten(0, 1) / 255
        load(options.checkpoint).measure_feature_error(images)

    def joint() -> None:
        for z, z0, z1 in features:
            certificates.joint_radius(z, z0, z1, **metric.certificate_options)

    images = data.test_sets["distinct"].images[:, 0].float() / 255
    references = images.split(options.batch)

    def geometry() -> None:
        for reference, (z, z0, z1) in zip(references, features, strict=True):
            metric.certify_features(reference, z, z0, z1)

    def apart() -> None:
        for reference, triplet in zip(references, features, strict=True):
            z, z0, z1 = (t.double() for t in triplet)
            for _ in ("CertifyRadii", "AttackRobustness"):
                constants = metric.certificate_options
                certificates.margin(z, z0, z1, anchor=metric.anchor)
                radius = certificates.reference_radius(z, z0, z1, **constants)
                certificates.candidate_radii(z, z0, z1, **constants)
                certificates.joint_radius(z, z0, z1, **constants)
                certificates.certified_pixels(reference, radius)
            certificates.published_radius(z, z0, z1, anchor=metric.anchor, lipschitz=metric.lipschitz)

    def evaluated() -> Iterator[EvaluatedBatch]:
        for reference, triplet in zip(references, features, strict=True):
            nothing = torch.zeros(len(reference))
            yield EvaluatedBatch.of(metric, Triplet(reference, reference, reference, nothing, nothing.long()), triplet)

    def shared() -> None:
        for batch in evaluated():
            batch.certificate, batch.published_radius, batch.radius("reference")  # computed when read

    def one_radius() -> None:
        for batch in evaluated():
            batch.radius("reference")

    parts: dict[str, Callable[[], None]] = {
        "forward passes (baseline)": forward,
        "test with CertifyRadii, forward passes included": test,
        f"search for the float32 error, {ERROR_SAMPLE} images of the data among others": sample,
        "every radius and pixels from features": geometry,
        "joint radius from features": joint,
        "two callbacks, each certifying for itself": apart,
        "two callbacks, one certificate": shared,
        "the one radius of AttackRobustness": one_radius,
    }
    forward()  # warm
    clocks = {"elapsed": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in parts}
    for _ in range(options.rounds):
        for name, part in parts.items():
            start = {clock: now() for clock, now in clocks.items()}
            part()
            for clock, now in clocks.items():
                seconds[name][clock].append(now() - start[clock])
    print("| part | seconds | of the forward passes | CPU seconds | of the forward passes |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, times in seconds.items():
        cells = []
        for clock, values in times.items():
            base = seconds["forward passes (baseline)"][clock]
            ratio = statistics.median(value / own for value, own in zip(values, base, strict=True))
            cells += [f"{statistics.median(values):.2f}", f"{ratio:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
