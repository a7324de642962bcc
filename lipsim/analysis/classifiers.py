"""Classifiers of small images, trained plainly or adversarially: what the analyses compare networks by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.attacks.adversary import Adversary, as_attacked
from lipsim.attacks.apgd import apgd
from lipsim.attacks.objectives import ClassificationObjective, logits_of
from lipsim.attacks.projections import Norm
from lipsim.layers.base import evaluation_mode
from lipsim.utils.errors import LipsimError


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: SGD with momentum, a rate that rises and falls linearly, flips and shifts.

    Args:
        epochs: over the images.
        batch_size: images a step.
        lr: the highest rate.
        momentum: of SGD.
        weight_decay: of SGD.
        shift: pixels that an image is moved by at most, with zeros from outside; 0 also switches flips off.
        adversary: moves the images before each step; None trains plainly.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2
    adversary: Adversary | None = None


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Train a network in place; it is returned frozen and in evaluation mode.

    Args:
        network: images ``(N, 3, H, W)`` in [0, 1] to logits ``(N, C)``; its normalisation is part of it.
        images: ``(N, 3, H, W)`` uint8, all in memory.
        labels: ``(N,)`` int64.
        recipe: default :class:`Recipe`.
        seed: of the order of the images and how they are moved.
        say: hears how far it is.

    Raises:
        ValueError: no images, labels that are no classes of the network, or a loss that is not finite.
    """
    recipe = recipe or Recipe()
    if images.dtype != torch.uint8 or len(images) != len(labels) or not len(images):
        raise LipsimError(f"expected uint8 images with a label each, got {len(images)} {images.dtype}, {len(labels)}")
    device = next(network.parameters()).device
    network.requires_grad_(True).train()
    weights = [parameter for parameter in network.parameters()]
    optimizer = torch.optim.SGD(
        weights, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    _check_labels(network, images, labels)
    sizes = [recipe.batch_size] * (len(images) // recipe.batch_size)
    if rest := len(images) % recipe.batch_size:
        if rest == 1 and sizes:  # of which batch norm makes nothing
            sizes[-1] += rest
        else:
            sizes.append(rest)
    steps = recipe.epochs * len(sizes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _triangle(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for number, rows in enumerate(order.split(sizes)):
            x = _moved(images[rows].float() / 255, recipe.shift, generator).to(device)
            y = labels[rows].to(device)
            if recipe.adversary is not None:
                with as_attacked(network):
                    x = recipe.adversary(ClassificationObjective(network, y), x, seed=seed + schedule.last_epoch)
            loss = F.cross_entropy(logits_of(network, x), y)
            if not torch.isfinite(loss):
                raise LipsimError(f"the loss is {float(loss.detach())} in epoch {epoch + 1}; take a lower rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            say(
                f"epoch {epoch + 1} of {recipe.epochs}, image {number * recipe.batch_size} of {len(images)}, "
                f"loss {float(loss.detach()):.2f}"
            )
    return network.requires_grad_(False).eval()


def _check_labels(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Refuse labels that are no classes of a network.

    Raises:
        ValueError: one is negative, or not below the number of its logits.
    """
    with torch.no_grad(), evaluation_mode(network):
        classes = logits_of(network, (images[:1].float() / 255).to(next(network.parameters()).device)).shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LipsimError(f"expected labels from 0 to {classes - 1}, the classes of the network, got {low} to {high}")


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of images ``(N, 3, H, W)`` uint8 that a classifier names right."""
    return float(_answers(network, images, batch_size).eq(labels).double().mean())


def robust_accuracy(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm = 2,
    eps: float,
    steps: int = 50,
    batch_size: int = 256,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> float:
    """Share of images that a classifier names right also after APGD (Croce & Hein 2020) on its logit margin.

    Args:
        network: classifier.
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)``.
        norm: 2 or "inf".
        eps: budget.
        steps: of the attack.
        batch_size: images at once.
        seed: of what is random in the attack.
        say: hears how far it is.
    """
    standing = 0
    device = next(network.parameters()).device
    for start in range(0, len(images), batch_size):
        say(f"attacking image {start} of {len(images)}")
        x = (images[start : start + batch_size].float() / 255).to(device)
        named = labels[start : start + batch_size].to(device)
        objective = ClassificationObjective(network, named)
        index = torch.arange(start, start + len(x))
        x_adv = apgd(objective, x, norm=norm, eps=eps, steps=steps, seed=seed, index=index)
        with torch.no_grad():
            # A tie breaks nothing by its margin; it is right where `accuracy` has it right.
            right = (logits_of(network, x).argmax(1) == named) & (logits_of(network, x_adv).argmax(1) == named)
            standing += int((right & (objective(x_adv) <= 0)).sum())
    return standing / len(images)


def _answers(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    device = next(network.parameters()).device
    with torch.no_grad():
        parts = [logits_of(network, (part.float() / 255).to(device)).argmax(1) for part in images.split(batch_size)]
    return torch.cat(parts).cpu()


def _triangle(step: int, steps: int) -> float:
    """Up over a fifth of the steps, then down to zero."""
    rise = max(1, steps // 5)
    return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))


def _moved(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image flipped or not, and shifted by up to ``shift`` pixels."""
    if not shift:
        return x
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    padded = F.pad(x, [shift] * 4)
    down, right = torch.randint(0, 2 * shift + 1, (2, len(x)), generator=generator)
    height, width = x.shape[-2:]
    rows = (down.unsqueeze(1) + torch.arange(height)).view(-1, 1, height, 1)
    cols = (right.unsqueeze(1) + torch.arange(width)).view(-1, 1, 1, width)
    batch = torch.arange(len(x)).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1]).view(1, -1, 1, 1)
    return padded[batch, channel, rows, cols]
