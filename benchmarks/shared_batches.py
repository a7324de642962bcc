"""A training step on photographs: its loss by triplets or by all pairs of images, its sorting, optimizer and precision.

    python benchmarks/shared_batches.py [--rounds 11] [--device cuda]

The default student at 64 pixels, 512 random images a batch, 16,384 random triplets of these, `CertifiedShare`: what
configs/photos/finetune.yaml trains with. The first variant has the loss from the features of each triplet, and leaves
the backward pass of its sorted pairs to autograd. All take turns in one process; seconds of processor time of a step
(wall time of a GPU), medians, and ratios to the first variant within a round. A minute on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from students import seconds

from lipsim.layers import MaxMin
from lipsim.students import OrthogonalShiftNetwork
from lipsim.training import CertifiedShare, MuonWithAuxAdam
from lipsim.training.losses import PAIRS_PER_TRIPLET


class PlainMaxMin(nn.Module):
    """Sorted pairs as their formula reads."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, …)`` to the same shape."""
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


@dataclass(frozen=True)
class Variant:
    """What a step does."""

    pairs: bool = True
    plain_sorting: bool = False
    muon: bool = False
    bf16: bool = False


VARIANTS = {
    "triplets, plain sorting, Adam": Variant(pairs=False, plain_sorting=True),
    "pairs, plain sorting, Adam": Variant(plain_sorting=True),
    "pairs, Adam": Variant(),
    "pairs, Muon": Variant(muon=True),
    "pairs, Muon, bf16": Variant(muon=True, bf16=True),
}


def make_student(variant: Variant, options: argparse.Namespace) -> nn.Module:
    """The default student; its weights are the same in all variants."""
    torch.manual_seed(0)
    student: nn.Module = OrthogonalShiftNetwork(options.image_size, options.features)
    if variant.plain_sorting:
        student = nn.Sequential(*(PlainMaxMin() if isinstance(layer, MaxMin) else layer for layer in student))
    return student.to(options.device).train()


def training_step(variant: Variant, options: argparse.Namespace) -> Callable[[], None]:
    """A step of its own student; all variants get the same images and triplets."""
    device, student = torch.device(options.device), make_student(variant, options)
    images = torch.rand(options.images, 3, options.image_size, options.image_size, device=device)
    ids = torch.randint(options.images, (options.triplets, 3), device=device)
    votes = torch.randint(2, (options.triplets,), device=device).float()
    loss, parameters = CertifiedShare(), list(student.parameters())
    optimizer = (
        MuonWithAuxAdam(parameters) if variant.muon else torch.optim.Adam(parameters, lr=0.002, betas=(0.9, 0.99))
    )

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=variant.bf16):
            features = student(images)
        features = features.float()
        if variant.pairs:
            value = loss.of_shared(features, ids, votes, 1.0)
        else:
            z, z0, z1 = features[ids].unbind(1)
            value = loss(z, z0, z1, votes, 1.0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="steps of each variant that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--triplets", type=int, default=16384)
    options = parser.parse_args(arguments)
    if options.images**2 > PAIRS_PER_TRIPLET * options.triplets:
        parser.error(f"with more than {PAIRS_PER_TRIPLET} pairs of images a triplet the loss does without the pairs")
    torch.set_num_threads(options.threads)
    steps = {name: training_step(variant, options) for name, variant in VARIANTS.items()}
    for step in steps.values():  # a warm-up
        step()
    device = torch.device(options.device)
    rounds = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(options.rounds)]
    first = next(iter(VARIANTS))
    print("| variant | s a step | of the first |\n| --- | ---: | ---: |")
    for name in VARIANTS:
        ratios = sorted(found[name] / found[first] for found in rounds)
        spread = "1" if name == first else f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {median(found[name] for found in rounds):.3f} | {spread} |")


if __name__ == "__main__":
    main()
