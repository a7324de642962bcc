"""What certifying costs beside the forward passes it needs: 10,000 triplets at 64 pixels.

    python benchmarks/certification.py [--threads 2] [--rounds 3] [--checkpoint quickstart]

The baseline is the forward pass of every distinct image, in full precision with folded weights. Each round runs all
parts in turn; times are medians of the rounds, as ratios to the baseline.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import lipsim
from lipsim import certificates
from lipsim.precision import full_precision


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
    metric = lipsim.load(options.checkpoint)
    size = metric.image_size
    images = torch.rand(options.batch, 3, size, size)
    batches = -(-options.triplets // options.batch)
    seconds: dict[str, list[float]] = {"forward passes": [], "all radii but the joint one": [], "joint radius": []}
    for _ in range(options.rounds):
        spent = dict.fromkeys(seconds, 0.0)
        for _ in range(batches):
            start = time.perf_counter()
            with torch.no_grad(), full_precision():
                z, z0, z1 = metric.embed(torch.cat([images.roll(shift, 0) for shift in range(3)])).chunk(3)
            forward = time.perf_counter()
            z, z0, z1 = z.double(), z0.double(), z1.double()
            certificates.joint_radius(z, z0, z1, **metric.certificate_options)
            joint = time.perf_counter()
            metric.certify_features(images, z, z0, z1)
            end = time.perf_counter()
            spent["forward passes"] += forward - start
            spent["joint radius"] += joint - forward
            spent["all radii but the joint one"] += (end - joint) - (joint - forward)
        for name, value in spent.items():
            seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("| part | seconds | share of the forward passes |\n| --- | ---: | ---: |")
    for name, value in median.items():
        print(f"| {name} | {value:.2f} | {value / median['forward passes']:.3f} |")


if __name__ == "__main__":
    main()
