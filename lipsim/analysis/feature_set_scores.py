"""What classifiers learn from feature sets, and how that goes with the transfer of attacks (Ilyas et al. 2019)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lipsim.analysis.classifiers import Recipe, accuracy, robust_accuracy, train_classifier
from lipsim.attacks.objectives import ClassificationObjective, UnendingObjective, logits_of
from lipsim.attacks.pgd import pgd
from lipsim.results.tables import Row
from lipsim.utils.errors import LipsimError

LabelledImages = tuple[Tensor, Tensor]  # (N, 3, S, S) uint8, (N,) int64
Build = Callable[[int], nn.Module]  # a seed to a classifier with random weights


@dataclass(frozen=True)
class SetScore:
    """How classifiers that were trained on one set do on images that are held out, one entry a seed.

    Attributes:
        name: of the set.
        images: how many it has.
        clean: share of the held-out images that are named right.
        robust: the same under attack.
    """

    name: str
    images: int
    clean: tuple[float, ...]
    robust: tuple[float, ...]


def score_sets(
    sets: Mapping[str, LabelledImages],
    held_out: LabelledImages,
    build: Build,
    recipe: Recipe | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    eps: float = 0.25,
    steps: int = 50,
    say: Callable[[str], None] = lambda _: None,
) -> list[SetScore]:
    """Train a classifier on each set with each seed, and score it on the same held-out images, clean and under APGD.

    Args:
        sets: training images by the name of their set.
        held_out: original images, none of which any set was made from.
        build: a seed to a classifier.
        recipe: of the training, default :class:`Recipe`.
        seeds: of weights and training, at least one.
        eps: ℓ2 budget of the attack.
        steps: of it.
        say: hears how far it is.
    """
    if not seeds:
        raise LipsimError("expected at least one seed")
    scores = []
    for name, (images, labels) in sets.items():
        clean, robust = [], []
        for seed in seeds:

            def tell(message: str, name: str = name, seed: int = seed) -> None:
                say(f"{name}, seed {seed}: {message}")

            network = train_classifier(build(seed), images, labels, recipe, seed=seed, say=tell)
            clean.append(accuracy(network, *held_out))
            robust.append(robust_accuracy(network, *held_out, eps=eps, steps=steps, seed=seed, say=tell))
        scores.append(SetScore(name, len(images), tuple(clean), tuple(robust)))
    return scores


def score_rows(scores: Sequence[SetScore], eps: float) -> list[Row]:
    """A row a set: accuracies in %, mean ± standard deviation over the seeds."""
    return [
        {
            "trained on": score.name,
            "images": f"{score.images:,}",
            "clean": mean_and_spread(score.clean),
            f"robust, ℓ2 {eps:g}": mean_and_spread(score.robust),
        }
        for score in scores
    ]


def mean_and_spread(shares: Sequence[float]) -> str:
    """Shares in %, such as ``63.1 ± 0.8``: mean and standard deviation (of a sample); one alone has no spread."""
    percent = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}"


@dataclass(frozen=True)
class Susceptibility:
    """An architecture beside the source of attacks and of feature sets (a point of the paper's Figure 3).

    Attributes:
        name: of the architecture.
        clean: accuracy of one trained on original images.
        transfer: share of the images which it and the source name right, and on which the attack on the source
            succeeds, that it names wrong after that attack.
        learned: name of a feature set → accuracy on original images of one trained on that set.
    """

    name: str
    clean: float
    transfer: float
    learned: dict[str, float]


def attack_source(
    source: nn.Module, images: Tensor, labels: Tensor, *, eps: float = 0.5, steps: int = 50, batch_size: int = 256
) -> Tensor:
    """Adversarial examples ``(N, 3, S, S)`` float32 that go as deep into other classes as an ℓ2 budget allows.

    Args:
        source: classifier.
        images: ``(N, 3, S, S)`` uint8.
        labels: ``(N,)``.
        eps: ℓ2 budget.
        steps: of PGD.
        batch_size: images at once.
    """
    device = next(source.parameters()).device
    parts = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        x = (images[rows].float() / 255).to(device)
        objective = UnendingObjective(ClassificationObjective(source, labels[rows].to(device)))
        parts.append(pgd(objective, x, eps=eps, steps=steps, index=torch.arange(start, start + len(x))).cpu())
    return torch.cat(parts)


def transfer_rate(source: nn.Module, other: nn.Module, images: Tensor, labels: Tensor, attacked: Tensor) -> float:
    """Share of the images that fool ``other`` after an attack on ``source``, among those that tell something.

    Those are the images which both name right and on which the attack on the source succeeds; NaN where there is none.

    Args:
        source: the classifier that was attacked.
        other: another one.
        images: ``(N, 3, S, S)`` uint8.
        labels: ``(N,)``.
        attacked: ``(N, 3, S, S)`` float32, of :func:`attack_source`.
    """
    clean = images.float() / 255
    telling = _right(source, clean, labels) & _right(other, clean, labels) & ~_right(source, attacked, labels)
    fooled = telling & ~_right(other, attacked, labels)
    return int(fooled.sum()) / int(telling.sum()) if telling.any() else math.nan


def _right(network: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    device = next(network.parameters()).device
    with torch.no_grad():
        answers = [logits_of(network, part.to(device)).argmax(1).cpu() for part in x.split(batch_size)]
    return torch.cat(answers).eq(labels)


def susceptibility(
    source: nn.Module,
    architectures: Mapping[str, Build],
    originals: LabelledImages,
    sets: Mapping[str, LabelledImages],
    held_out: LabelledImages,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    eps: float = 0.5,
    steps: int = 50,
    say: Callable[[str], None] = lambda _: None,
) -> list[Susceptibility]:
    """Figure 3: what each architecture learns from feature sets of the source, beside what attacks on it do to it.

    Trains ``(1 + sets) · architectures`` classifiers.

    Args:
        source: classifier that the sets were made with, and that is attacked.
        architectures: name → a seed to a classifier.
        originals: original training images.
        sets: feature sets of the source, by name.
        held_out: original images that nothing was trained on or made from.
        recipe: of the training, default :class:`Recipe`.
        seed: of weights and training.
        eps: ℓ2 budget of the attacks on the source.
        steps: of them.
        say: hears how far it is.
    """
    say("attacking the source")
    attacked = attack_source(source, *held_out, eps=eps, steps=steps)
    found = []
    for name, build in architectures.items():

        def train(images: Tensor, labels: Tensor, title: str, name: str = name, build: Build = build) -> nn.Module:
            return train_classifier(
                build(seed), images, labels, recipe, seed=seed, say=lambda text: say(f"{name} on {title}: {text}")
            )

        plain = train(*originals, "original images")
        learned = {key: accuracy(train(*part, key), *held_out) for key, part in sets.items()}
        transfer = transfer_rate(source, plain, *held_out, attacked)
        found.append(Susceptibility(name, accuracy(plain, *held_out), transfer, learned))
    return found


def susceptibility_rows(found: Sequence[Susceptibility]) -> list[Row]:
    """A row an architecture, in %."""
    return [
        {
            "architecture": point.name,
            "clean": f"{100 * point.clean:.1f}",
            "transfer": f"{100 * point.transfer:.1f}",
            **{f"on {name}": f"{100 * value:.1f}" for name, value in point.learned.items()},
        }
        for point in found
    ]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of the transfer rate with the accuracy that a feature set gives.

    Attributes:
        name: of the set.
        networks: how many.
        rho: the correlation; NaN where one side is constant.
        p: of a two-sided permutation test, exact for up to seven networks.
    """

    name: str
    networks: int
    rho: float
    p: float


def transfer_correlation(found: Sequence[Susceptibility]) -> list[RankCorrelation]:
    """Whether architectures to which attacks transfer learn more from the feature sets.

    Raises:
        ValueError: fewer than four architectures, whose order tells nothing.
    """
    from scipy import stats  # seconds to import

    if len(found) < 4:
        raise LipsimError(f"expected at least 4 architectures to rank, got {len(found)}")
    transfer = [point.transfer for point in found]
    correlations = []
    for name in found[0].learned:
        learned = [point.learned[name] for point in found]
        if len(set(transfer)) == 1 or len(set(learned)) == 1 or any(map(math.isnan, transfer + learned)):
            correlations.append(RankCorrelation(name, len(found), math.nan, math.nan))
            continue
        test = stats.permutation_test(
            (transfer,),
            lambda order, learned=learned: float(stats.spearmanr(order, learned).statistic),
            permutation_type="pairings",
            n_resamples=9999,
            rng=0,
            vectorized=False,
        )
        correlations.append(RankCorrelation(name, len(found), float(test.statistic), float(test.pvalue)))
    return correlations


def plot_susceptibility(path: Path, found: Sequence[Susceptibility]) -> None:
    """Accuracy that each feature set gives over the transfer rate, a point an architecture, a colour a set."""
    from lipsim.results.plots import save  # seconds to import; before matplotlib, whose backend it chooses

    from matplotlib.figure import Figure  # isort: skip

    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for name in found[0].learned:
        axes.plot(
            [100 * point.transfer for point in found],
            [100 * point.learned[name] for point in found],
            "o",
            ms=4,
            label=name,
        )
    first = next(iter(found[0].learned))
    for point in found:
        place = (100 * point.transfer, 100 * point.learned[first])
        axes.annotate(point.name, place, fontsize=7, ha="center", xytext=(0, 5), textcoords="offset points")
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("attacks on the source that transfer (%)", fontsize=8)
    axes.set_ylabel("accuracy after training on the set (%)", fontsize=8)
    axes.tick_params(labelsize=8)
    figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    save(figure, path, dpi=200)
