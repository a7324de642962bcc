"""Many metrics under the same attacks on the same triplets, as LipSim's tables have it.

:func:`attack_tables` is the whole of it: triplets of a data set in, files and tables out. :func:`measure` takes
triplets that are there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim.attacks import DistanceObjective, TwoAFCObjective, apgd, auto
from lipsim.attacks.objectives import UnendingObjective
from lipsim.attacks.projections import Norm
from lipsim.attacks.registry import ATTACKS, attacks_in
from lipsim.certificates.numbers import check_count
from lipsim.data import Preprocess, Triplet, registry
from lipsim.evaluation.scores import agrees
from lipsim.metric import PerceptualMetric, load
from lipsim.metric.deep_distances import DISTS, LPIPS
from lipsim.metric.distance import Distance, has_features
from lipsim.metric.distances import BASELINES, check_names
from lipsim.results import eps_label, update_results
from lipsim.results.formats import latex_table, markdown_table
from lipsim.results.schema import ComparedMetric, Comparison, ReachedDistances, Scores
from lipsim.results.tables import NO_GRADIENT, Row, number, percent, triplet_counts
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_text
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision

_LPIPS, _DISTS = "LPIPS (AlexNet)", "DISTS"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Settings:
    """How the metrics are attacked.

    Attributes:
        eps: ℓ2 budgets of the scores under the suite.
        alone_eps: the ℓ2 budget of each attack alone, of distances and of transfer.
        linf: the ℓ∞ budget of the suite.
        steps: gradient steps of each attack with gradients.
        queries: forward passes of each attack without.
        batch_size: triplets attacked at a time.
        seed: of everything random.

    Raises:
        ValueError: no step, query or triplet at a time.
    """

    eps: tuple[float, ...] = (36 / 255, 72 / 255, 108 / 255, 1.0, 2.0, 3.0)
    alone_eps: float = 1.0
    linf: float = 4 / 255
    steps: int = 20
    queries: int = 50
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "queries", "batch_size"):
            check_count(name, getattr(self, name))


def load_metrics(
    files: Mapping[str, str | Path], *, lpips: str | Path | None = None, dists: str | Path | None = None
) -> dict[str, Distance]:
    """Exported metrics, and beside them the distances that tables compare with.

    Args:
        files: name → file of a metric, or the name of a bundled one.
        lpips: torchvision's AlexNet weights; adds LPIPS.
        dists: torchvision's VGG-16 weights; adds DISTS.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is no metric, or a name that of a distance beside it.
    """
    deep = [name for name, file in ((_LPIPS, lpips), (_DISTS, dists)) if file]
    check_names(list(files), [*BASELINES, *deep])
    metrics: dict[str, Distance] = {name: load(file) for name, file in files.items()}
    metrics |= BASELINES
    if lpips:
        metrics[_LPIPS] = LPIPS("alex", lpips)
    if dists:
        metrics[_DISTS] = DISTS(dists)
    return metrics


def common_images(metrics: Mapping[str, Distance], data: str) -> Preprocess:
    """How images are brought to the size that all metrics expect.

    Metrics that expect other images than each other are not compared: scores would be of other pixels, and a change
    that is found on the images of one says nothing on those of another.

    Args:
        metrics: name → metric; distances without an encoder take any images.
        data: name of the set; where nothing is resized (:data:`lipsim.data.registry.SOURCES`) its way does not matter.

    Raises:
        ValueError: no metric has an encoder, or they expect other sizes, or images resized in other ways.
    """
    expected = {name: m.preprocess for name, m in metrics.items() if isinstance(m, PerceptualMetric)}
    sizes = {preprocess.image_size for preprocess in expected.values()}
    if len(sizes) != 1:
        raise LipsimError(f"expected metrics of one image size, got {list(expected)} at {sorted(sizes)}")
    resizes = {name: preprocess.way for name, preprocess in expected.items()}
    if len(set(resizes.values())) > 1 and registry.SOURCES[data].on_disk:
        raise LipsimError(
            "expected metrics whose images are resized in one way, got "
            f"{', '.join(f'{name} for {resize!r}' for name, resize in resizes.items())}; make a table of each kind, or "
            "convert all with one --resize"
        )
    return next(iter(expected.values()))


def attack_tables(
    metrics: Mapping[str, Distance],
    output: str | Path,
    *,
    data: str = "builtin",
    root: str | Path | None = None,
    samples: int = 200,
    division: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Row]]:
    """Attack every metric on the same triplets of a data set, and write tables.md, tables.tex and results.json.

    Args:
        metrics: name → metric, or a callable that returns distances; at least one metric, whose images all see.
        output: folder to write.
        data: one of :data:`lipsim.data.registry.DATA`.
        root: folder of the data, built-in ones have none.
        samples: how many triplets.
        division: how a training has divided the data, as in :func:`lipsim.data.sample_triplets`.
        settings: budgets, steps and the seed, of the choice of triplets as well.
        progress: told what runs next.

    Returns:
        The tables: title → rows.

    Raises:
        FileNotFoundError: no data at ``root``.
        ValueError: metrics that see different images, an unknown data set, or no triplets.
    """
    settings, folder = settings or Settings(), user_path(output)
    images = common_images(metrics, data)
    place = None if root is None else user_path(root)
    triplets = registry.sample_triplets(
        data,
        samples,
        images.image_size,
        resize=images.resize,
        framing=images.framing,
        root=place,
        seed=settings.seed,
        division=division,
    )
    measured = measure(metrics, triplets, settings, progress)
    update_results(folder / "results.json", {"attack_tables": {"data": data, **measured}})
    shown = tables(measured, data)
    text = [part for title, rows in shown.items() for part in (f"{title}:", markdown_table(rows))]
    write_text(folder / "tables.md", "\n\n".join(text) + "\n")
    title, rows = next(iter(shown.items()))
    latex = latex_table(rows, title, list(rows[0])[2:], "Score under attack")
    write_text(folder / "tables.tex", f"% \\usepackage{{booktabs,multirow}}\n\n{latex}\n")
    return shown


def measure(
    metrics: Mapping[str, Distance],
    triplets: Triplet,
    settings: Settings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Attack every metric on the same triplets.

    Args:
        metrics: name → metric, or a callable that returns distances.
        triplets: N of them, on the device of the metrics.
        settings: budgets and steps.
        progress: told what runs next.

    Returns:
        The section "attack_tables" of results.json, but for the data; docs/results_json.md describes its fields.
    """
    settings = settings or Settings()
    if not len(triplets):
        raise LipsimError("expected at least one triplet, got none")
    say = progress or (lambda _: None)
    compared: dict[str, ComparedMetric] = {}
    with full_precision():
        correct = {name: _correct(metric, triplets, settings) for name, metric in metrics.items()}
        for name, metric in metrics.items():
            compared[name] = _compared(name, metric, triplets, correct[name], settings, say)
            say(f"{name}: transfer")
            attacked = _pushed(metric, triplets, settings)
            for other, target in metrics.items():
                turned = correct[other] & ~_correct(target, attacked, settings)
                share = float(turned.sum() / correct[other].sum().clamp(min=1))
                compared[name]["transfer"][other] = share
    return {
        "num_triplets": len(triplets),
        "num_tied_votes": int((triplets.right_vote == 0.5).sum()),
        "eps": list(settings.eps),
        "alone_eps": settings.alone_eps,
        "linf_eps": settings.linf,
        "steps": settings.steps,
        "queries": settings.queries,
        "seed": settings.seed,
        "metrics": compared,
    }


def _compared(
    name: str,
    metric: Distance,
    triplets: Triplet,
    correct: Tensor,
    settings: Settings,
    say: Callable[[str], None],
) -> ComparedMetric:
    """A metric under every attack; what carries over to others is found afterwards."""
    untied = (triplets.right_vote != 0.5).sum()
    attackable = correct.nonzero().flatten()

    def attack(norm: Norm, eps: Sequence[float], attacks: Sequence[str] | None) -> tuple[list[float], int]:
        """Scores that remain at each budget, and the number of triplets without a gradient."""
        broken_at, no_gradient = [], 0
        for rows in attackable.split(settings.batch_size) if len(attackable) else ():  # of none, one empty part
            part = triplets.select(rows)
            objective = TwoAFCObjective(metric, part.reference, part.left, part.right)
            result = auto(
                objective,
                part.reference,
                norm=norm,
                eps=eps,
                attacks=attacks,
                steps=settings.steps,
                queries=settings.queries,
                seed=settings.seed,
                index=part.index,
            )
            broken_at.append(result.broken_at)
            no_gradient += int(result.no_gradient.sum())
        broken = torch.cat(broken_at) if broken_at else torch.empty(0)
        return [float((broken > e).sum() / untied) for e in eps], no_gradient

    say(f"{name}: suite in ℓ2")
    suite, no_gradient = attack(2, settings.eps, None)
    say(f"{name}: suite in ℓ∞")
    linf = attack("inf", [settings.linf], None)[0][0]
    alone: Scores = {}
    for single in attacks_in(2):
        say(f"{name}: {single} alone")
        alone[single] = attack(2, [settings.alone_eps], [single])[0][0]
    say(f"{name}: one pixel")
    one_pixel = attack(0, [1], ["one_pixel"])[0][0]
    say(f"{name}: d(x, x + δ)")
    return {
        "natural": float(correct.sum() / untied),
        "no_gradient": no_gradient,
        "l2": dict(zip(map(eps_label, settings.eps), suite, strict=True)),
        "linf": linf,
        "alone": alone,
        "one_pixel": one_pixel,
        "distances": _distances(metric, triplets, settings),
        "transfer": {},
    }


def _distances(metric: Distance, triplets: Triplet, settings: Settings) -> ReachedDistances:
    """Quantiles of the largest ``d(x, x + δ)`` that APGD finds at ``alone_eps``."""
    reached, natural = [], []
    for part in _batches(triplets, settings.batch_size):
        objective = DistanceObjective(metric, part.reference)
        options: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed, "index": part.index}
        x_adv = apgd(objective, part.reference, eps=settings.alone_eps, **options)
        with torch.no_grad():
            reached.append(metric(part.reference, x_adv).double())
            natural += [metric(part.reference, images).double() for images in (part.left, part.right)]
    levels = torch.tensor(_QUANTILES, dtype=torch.float64)
    quantiles = torch.cat(reached).quantile(levels).tolist()
    scale = float(torch.cat(natural).quantile(0.5))
    labels = [f"{100 * q:g} %" for q in _QUANTILES]
    return {
        "reached": dict(zip(labels, quantiles, strict=True)),
        "natural_median": scale,
        "shares": {label: value / scale if scale else math.nan for label, value in zip(labels, quantiles, strict=True)},
    }


def _pushed(metric: Distance, triplets: Triplet, settings: Settings) -> Triplet:
    """The triplets with references that APGD moves as far over to the other candidate as the budget allows."""
    moved = []
    for part in _batches(triplets, settings.batch_size):
        objective = UnendingObjective(TwoAFCObjective(metric, part.reference, part.left, part.right))
        options: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed, "index": part.index}
        moved.append(apgd(objective, part.reference, eps=settings.alone_eps, **options))
    return Triplet(torch.cat(moved), triplets.left, triplets.right, triplets.right_vote, triplets.index)


@torch.no_grad()
def _correct(metric: Distance, triplets: Triplet, settings: Settings) -> Tensor:
    """``(N,)`` bool: the metric agrees with the majority of votes."""
    margins = []
    for part in _batches(triplets, settings.batch_size):
        if has_features(metric):
            margins.append(metric.margin(*part.embed(metric.embed)))
        else:
            margins.append(metric(part.reference, part.right) - metric(part.reference, part.left))
    return agrees(torch.cat(margins), triplets.right_vote)


def _batches(triplets: Triplet, size: int) -> list[Triplet]:
    return [triplets.select(rows) for rows in torch.arange(len(triplets)).split(size)]


def tables(measured: Comparison, data: str) -> dict[str, list[Row]]:
    """Title → rows, cells in %, from what :func:`measure` returns."""
    count = triplet_counts([(measured["num_triplets"], measured["num_tied_votes"])])
    eps = eps_label(measured["alone_eps"])
    suite: list[Row] = []
    alone: list[Row] = []
    distances: list[Row] = []
    transfer: list[Row] = []
    flat = any(scores["no_gradient"] for scores in measured["metrics"].values())
    for name, scores in measured["metrics"].items():
        at = {label: percent(score) for label, score in scores["l2"].items()}
        linf = {f"ℓ∞ {eps_label(measured['linf_eps'])}": percent(scores["linf"])}
        suite.append({"metric": name, "natural": percent(scores["natural"]), **at, **linf})
        cells = {ATTACKS[attack].title: percent(score) for attack, score in scores["alone"].items()}
        cells[ATTACKS["one_pixel"].title] = percent(scores["one_pixel"])
        # Beside what does without gradients, Square and one pixel.
        cells |= {"no gradient": str(scores["no_gradient"])} if flat else {}
        alone.append({"metric": name, "natural": percent(scores["natural"]), **cells})
        moved = scores["distances"]
        cells = {label: number(value) for label, value in moved["reached"].items()}
        share = percent(moved["shares"]["50 %"])
        distances.append({"metric": name, **cells, "of natural": f"{share} %" if share else ""})
        cells = {other: percent(turned) for other, turned in scores["transfer"].items()}
        transfer.append({"made on": name, **cells})
    note = f"; {NO_GRADIENT}" if flat else ""
    return {
        f"{data}: 2AFC score in %, natural and under the suite on the reference, {count}, ℓ2 budgets": suite,
        f"{data}: 2AFC score in % under each attack alone, ℓ2, ε = {eps}, and with one pixel of any colour"
        f"{note}": alone,
        f"{data}: d(x, x + δ) that APGD reaches in ℓ2, ε = {eps}: quantiles, and the median as a share of the median "
        "distance between reference and candidates": distances,
        f"{data}: transfer, share in % of right answers that turn around on references attacked in ℓ2, ε = {eps}, "
        "on another metric": transfer,
    }
