"""What an attack on triplets costs, and what it reaches, against the published way.

    python benchmarks/attacks.py [--checkpoint quickstart] [--triplets 32] [--steps 100] [--rounds 3]

Cost: PGD in ℓ2 on the references, beside the same steps as they are published: reference, left and right are embedded
again at each step, with weights that are not folded, and `backward()` also fills the gradients of the weights. In
between stands the same loop on a frozen network without gradients of weights. "No stop": at a budget of 1/255, where
nothing breaks, so that nothing ends early; "stops": at a budget of 1, where broken samples leave the batch. Seconds of
processor time of one thread; each round runs all ways in turn, and ratios are medians of the rounds.

Reach: scores that PGD, APGD and MI-FGSM leave at equal steps, and the forward and backward passes that these took for
each attacked triplet, the mean over the budgets: fewer where samples break early.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lipsim
from lipsim.attacks import TwoAFCObjective, WatchedObjective, apgd, mi_fgsm, pgd
from lipsim.certificates.geometry import project
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.data.triplet import collate_triplets
from lipsim.layers import unfreeze
from lipsim.results import eps_label

EPS = (36 / 255, 72 / 255, 108 / 255, 1.0, 2.0)


def published_pgd(metric: lipsim.PerceptualMetric, batch: Triplet, eps: float, steps: int) -> Tensor:
    """PGD that embeds the three images at every step and takes `delta.grad` from `backward()`."""
    x = batch.reference
    with torch.no_grad():
        sign = torch.where(_margin(metric, x, batch) > 0, -1.0, 1.0)
    delta = torch.zeros_like(x, requires_grad=True)
    for _ in range(steps):
        (sign * _margin(metric, x + delta, batch)).sum().backward()
        assert delta.grad is not None
        gradient = delta.grad / delta.grad.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
        moved = delta.detach() + 2.5 * eps / steps * gradient
        moved = moved * (eps / moved.flatten(1).norm(dim=1).clamp(min=eps)).view(-1, 1, 1, 1)
        delta = ((x + moved).clamp(0, 1) - x).requires_grad_(True)
        metric.zero_grad(set_to_none=True)
    return x + delta.detach()


def _margin(metric: lipsim.PerceptualMetric, x: Tensor, batch: Triplet) -> Tensor:
    parts = [project(metric.embed(images), metric.anchor) for images in (x, batch.left, batch.right)]
    (p, s), (p0, s0), (p1, s1) = parts
    return (p * (p0 - p1)).sum(-1) + s * (s0 - s1)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=["quickstart"], help="metrics of 64 pixels")
    parser.add_argument("--triplets", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reach-triplets", type=int, default=200)
    parser.add_argument("--reach-steps", type=int, nargs="+", default=[10, 25])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = BuiltinTriplets("test", max(options.triplets, options.reach_triplets), seed=1)
    metrics = {name: lipsim.load(name) for name in options.checkpoint}
    print("| metric | PGD | seconds | times faster |\n| --- | --- | ---: | ---: |")
    for name, metric in metrics.items():
        batch = collate_triplets([data[i] for i in range(options.triplets)])
        _print_cost(name, metric, batch, options.steps, options.rounds)
    print(
        "\n| metric | steps | attack | natural | "
        + " | ".join(eps_label(e) if e < 1 else f"{e:g}" for e in EPS)
        + " | forward | backward |"
    )
    print("| --- | ---: | --- |" + " ---: |" * (3 + len(EPS)))
    for name, metric in metrics.items():
        batch = collate_triplets([data[i] for i in range(options.reach_triplets)])
        for steps in options.reach_steps:
            _print_reach(name, metric, batch, steps)


def _print_cost(name: str, metric: lipsim.PerceptualMetric, batch: Triplet, steps: int, rounds: int) -> None:
    trainable = copy.deepcopy(metric).requires_grad_(True)
    unfreeze(trainable)
    trainable.eval()
    ways: dict[str, Callable[[float], Tensor]] = {
        "published way": lambda eps: published_pgd(trainable, batch, eps, steps),
        "three embeddings a step, frozen": lambda eps: published_pgd(metric, batch, eps, steps),
        "lipsim.attacks.pgd": lambda eps: _ours(metric, batch, eps, steps),
    }
    for label, eps in (("no stop", 1 / 255), ("stops", 1.0)):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                start = time.process_time()
                run(eps)
                seconds[way].append(time.process_time() - start)
        first = seconds["published way"]
        for way, found in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
            print(f"| {name} | {way}, {label} | {statistics.median(found):.2f} | {ratio:.2f} |", flush=True)


def _ours(metric: nn.Module, batch: Triplet, eps: float, steps: int) -> Tensor:
    objective = TwoAFCObjective(metric, batch.reference, batch.left, batch.right)
    return pgd(objective, batch.reference, eps=eps, steps=steps)


def _print_reach(name: str, metric: lipsim.PerceptualMetric, batch: Triplet, steps: int) -> None:
    with torch.no_grad():
        agrees = (metric.margin(*batch.embed(metric.embed)) > 0) == (batch.right_vote < 0.5)
    batch_agreed = batch.select(agrees)
    images = (batch_agreed.reference, batch_agreed.left, batch_agreed.right)
    objective = TwoAFCObjective(metric, *images)
    for attack in (pgd, mi_fgsm, apgd):
        cells = [100 * float(agrees.double().mean())]
        watched = WatchedObjective(objective, images[0])
        for eps in EPS:
            x_adv = attack(watched, images[0], eps=eps, steps=steps)
            cells.append(100 * float((objective(x_adv) <= 0).sum()) / len(batch))
        passes = watched.passes
        cells += [float(count.double().mean()) / len(EPS) for count in (passes.forward, passes.backward)]
        print(f"| {name} | {steps} | {attack.__name__} | {' | '.join(f'{c:.1f}' for c in cells)} |", flush=True)


if __name__ == "__main__":
    main()
