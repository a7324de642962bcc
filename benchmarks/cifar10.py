"""Certified accuracy on CIFAR-10: the default student with a linear head, an outside check of the layers.

    python benchmarks/cifar10.py --images ../shared/data/cifar10-train.tar.gz [--minutes 2] [--device cuda --batch 1024]

5,000 of the 50,000 training images are held out and scored: accuracy, accuracy certified at ℓ2 budgets from the logits
(``lipsim.certificates.class_radius``), and what APGD on the logit margin leaves of 500 of them, which must never be
less. The loss is a smooth hinge on the radius towards each other class; images are shifted and flipped. All images stay
in the memory of the device. Writes a table, the weights and what they were made with into ``--output``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from tasks import read_cifar

from lipsim import audit, certificates
from lipsim.attacks import apgd
from lipsim.attacks.objectives import ClassificationObjective
from lipsim.audit.arithmetic import ERROR_FACTOR, largest_feature_error
from lipsim.cli.parser import OneLineParser, one_line_errors, positive_int
from lipsim.cli.parser import device as device_option
from lipsim.layers import freeze, unfreeze
from lipsim.results import eps_label
from lipsim.results.formats import markdown_table, write_table
from lipsim.results.tables import Row, percent
from lipsim.students import OrthogonalShiftNetwork
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_safetensors
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

EPS = (36 / 255, 72 / 255, 108 / 255)
# Test images, with what they took; ours are held-out training images, for which the difference is small.
PUBLISHED: dict[str, tuple[str, float, tuple[float, float, float]]] = {
    "BRONet-L + LA, published": ("hundreds of epochs on GPUs", 0.816, (0.706, 0.572, 0.425)),
    "LipNeXt-256M, published": ("hundreds of epochs on GPUs", 0.850, (0.732, 0.588, 0.433)),
    "LipNeXt, generated data, published": ("hundreds of epochs on GPUs", 0.874, (0.784, 0.668, 0.534)),
}


class Classifier(nn.Module):
    """A 1-Lipschitz encoder and one direction of unit length for each class.

    Args:
        encoder: images to features ``(N, D)``.
        features: ``D``.
        classes: number of them.
    """

    def __init__(self, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.rows = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, features)))
        self.bias = nn.Parameter(torch.zeros(classes))

    @property
    def weight(self) -> Tensor:
        """Rows of the head, ``(C, D)``."""
        return F.normalize(self.rows, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` in [0, 1] to logits ``(N, C)``."""
        return F.linear(self.encoder(x), self.weight, self.bias)


@dataclass(frozen=True)
class Scores:
    """What a classifier reaches on held-out images.

    Attributes:
        accuracy: natural.
        certified: at each ε.
        attacked: what the attack left at each ε, on the first images.
        certified_there: certified on the same images.
        violations: answers that the attack changed inside their radius.
    """

    accuracy: float
    certified: list[float]
    attacked: list[float]
    certified_there: list[float]
    violations: int


def radius_loss(logits: Tensor, labels: Tensor, weight: Tensor, target: float, temperature: float) -> Tensor:
    """``T·log(1 + Σ_k exp((t − r_k)/T))``, mean over images, of the signed radii ``r_k`` towards the other classes.

    A smooth maximum of the hinges ``t − r_k``, and 0: cross-entropy with an offset, in units of the certified radius.
    """
    apart = torch.cdist(weight, weight)[labels]
    own = torch.zeros_like(logits).scatter(1, labels.unsqueeze(1), 1.0).bool()
    radii = (logits.gather(1, labels.unsqueeze(1)) - logits) / apart.masked_fill(own, 1.0)
    terms = ((target - radii) / temperature).masked_fill(own, 0.0)  # the 1 of the logarithm
    return temperature * torch.logsumexp(terms, 1).mean()


def moved(x: Tensor, shift: int = 4) -> Tensor:
    """Each image ``(N, 3, S, S)`` flipped or not, and shifted by up to ``shift`` pixels with its border repeated."""
    count, size = len(x), x.shape[-1]
    flip = torch.rand(count, 1, device=x.device) < 0.5
    places = torch.arange(size, device=x.device)
    columns = torch.where(flip, size - 1 - places, places)
    down, right = torch.randint(-shift, shift + 1, (2, count, 1), device=x.device)
    rows, columns = (places + down).clamp(0, size - 1), (columns + right).clamp(0, size - 1)
    x = x.gather(2, rows.view(count, 1, size, 1).expand(-1, x.shape[1], -1, size))
    return x.gather(3, columns.view(count, 1, 1, size).expand(-1, x.shape[1], size, -1))


def train(network: Classifier, images: Tensor, labels: Tensor, options: argparse.Namespace) -> int:
    """Train until the time is over, on images and labels that are on the device; returns the number of steps."""
    optimizer = torch.optim.NAdam(network.parameters(), lr=options.lr, betas=(0.9, 0.99))
    unfreeze(network.train())
    device, steps, start = images.device, 0, time.perf_counter()
    with Progress("training") as say:
        order = torch.randperm(len(images), device=device)
        place = 0
        while (done := (time.perf_counter() - start) / (60 * options.minutes)) < 1:
            if place + options.batch > len(order):
                order, place = torch.randperm(len(images), device=device), 0
            rows = order[place : place + options.batch]
            place += options.batch
            optimizer.param_groups[0]["lr"] = options.lr * min(1.0, done / 0.1) * (1 - done)
            x, y = moved(images[rows].float() / 255), labels[rows]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
                features = network.encoder(x)
            logits = F.linear(features.float(), network.weight, network.bias)
            loss = radius_loss(logits, y, network.weight, options.target, options.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            steps += 1
            if steps % 20 == 0:
                value = float(loss.detach())  # waits for the device, so that the clock sees the work
                if not math.isfinite(value):
                    raise LipsimError(f"the loss is {value} after {steps} steps; take a lower --lr")
                epoch = steps * options.batch / len(images)
                say(f"{100 * done:.0f} %, epoch {epoch:.1f}, loss {value:.3f}")
    freeze(network)
    network.requires_grad_(False)
    return steps


@torch.no_grad()
def score(network: Classifier, images: Tensor, labels: Tensor, options: argparse.Namespace) -> tuple[Scores, float]:
    """Scores on held-out images, and the bound of the encoder."""
    report = audit.lipschitz_bound(network.encoder, images.shape[-1])
    first = images[:64].float() / 255
    error = ERROR_FACTOR * largest_feature_error(network.encoder, images.shape[-1], first, thorough=False)
    with full_precision():
        z = torch.cat([network.encoder(part.float() / 255) for part in images.split(500)])
        answer, radius = certificates.class_radius(
            z, network.weight, network.bias, lipschitz=report.total, feature_error=2 * error
        )
        right = answer == labels
        few, violations, attacked = images[: options.attacked].float() / 255, 0, []
        standing = right[: options.attacked].clone()
        for eps in EPS:
            rows = standing.nonzero().flatten()
            for part in rows.split(250):
                x = few[part]
                objective = ClassificationObjective(network, labels[part])
                x_adv = apgd(objective, x, eps=eps, steps=options.steps, seed=0, index=part.cpu())
                broken = objective(x_adv) > 0
                length = (x_adv - x).flatten(1).double().norm(dim=1)
                violations += int((broken & (length < radius[part])).sum())
                standing[part] &= ~broken
            attacked.append(float(standing.double().mean()))
    held = [right & (radius > eps) for eps in EPS]
    there = [float(rows[: options.attacked].double().mean()) for rows in held]
    certified = [float(rows.double().mean()) for rows in held]
    return Scores(float(right.double().mean()), certified, attacked, there, violations), report.total


def table(scores: Scores, budget: str, options: argparse.Namespace) -> list[Row]:
    """Rows in %: ours, on all held-out images, on those that were attacked, and published ones."""

    def row(name: str, took: str, natural: float | None, values: Sequence[float]) -> Row:
        cells = {eps_label(eps): percent(value) for eps, value in zip(EPS, values, strict=True)}
        return {"classifier": name, "budget": took, "natural": percent(natural), **cells}

    return [
        row("ours, certified", budget, scores.accuracy, scores.certified),
        row(f"ours, certified, {options.attacked} images", "", None, scores.certified_there),
        row(f"ours, under APGD, {options.attacked} images", "", None, scores.attacked),
        *(row(name, *published) for name, published in PUBLISHED.items()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, certify, attack, and print the table."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/cifar10-train.tar.gz"), help="archive")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--minutes", type=float, default=2.0, help="of training (%(default)s)")
    parser.add_argument("--device", type=device_option, help="cuda where there is one")
    parser.add_argument("--batch", type=positive_int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--target", type=float, default=1.0, help="radius that the loss pushes to (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.25, help="of the loss, in radii (%(default)s)")
    parser.add_argument("--features", type=positive_int, default=256)
    parser.add_argument("--grid", type=positive_int, default=8)
    parser.add_argument("--widths", nargs="+", type=positive_int, default=[96, 192])
    parser.add_argument("--depths", nargs="+", type=positive_int, default=[2, 2])
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--held-out", type=positive_int, default=5000)
    parser.add_argument("--attacked", type=positive_int, default=500)
    parser.add_argument("--steps", type=positive_int, default=50, help="of the attack")
    parser.add_argument("--seed", type=int, default=0)
    with one_line_errors():
        options = parser.parse_args(arguments)
        device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with Progress("reading the images"):
            images, labels = read_cifar(options.images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        held_out, known = order[: options.held_out], order[options.held_out :]
        if not len(known):
            raise LipsimError(f"{options.held_out} images are held out of {len(images)}; leave some to train on")
        torch.manual_seed(options.seed)
        encoder = OrthogonalShiftNetwork(
            images.shape[-1], options.features, grid=options.grid, widths=options.widths, depths=options.depths
        )
        network = Classifier(encoder, options.features, int(labels.max()) + 1).to(device)
        steps = train(network, images[known].to(device), labels[known].to(device), options)
        with Progress("certifying and attacking"):
            scores, bound = score(network, images[held_out].to(device), labels[held_out].to(device), options)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        parameters = sum(p.numel() for p in network.parameters())
        epochs = steps * options.batch / len(known)
        budget = f"{options.minutes:g} min, {name}, {epochs:.1f} epochs, {parameters / 1e6:.1f} M parameters"
        rows = table(scores, budget, options)
        title = f"CIFAR-10, {len(held_out)} held-out images, accuracy in %, natural and certified at ℓ2 budgets ε"
        write_table(options.output, "cifar10", title, rows)
        tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        write_safetensors(options.output / "classifier.safetensors", tensors, {"options": str(vars(options))})
        print(f"{title}:\n\n{markdown_table(rows)}\n\nEncoder bound {bound:.8g}; answers flipped inside their")
        print(f"certified radius: {scores.violations}. Table and weights are in {options.output}/")
    return 1 if scores.violations else 0


if __name__ == "__main__":
    sys.exit(main())
