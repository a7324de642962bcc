"""Attack every triplet of an evaluation set, with the module's metric and with others for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torchvision.utils import save_image

from lipsim.attacks import Passes, SuiteResult, TwoAFCObjective, auto
from lipsim.attacks.auto import check_effort
from lipsim.attacks.objectives import IMAGES, TARGETS, Target
from lipsim.attacks.projections import Ball, Norm, sample_norm
from lipsim.attacks.registry import check_attacks, suite
from lipsim.callbacks.base import DRAWN, TripletCallback, check_budgets, cover_feature_error, load_others, log_score
from lipsim.callbacks.certify_radii import EPS, ERROR_SAMPLE, CertifyRadii
from lipsim.callbacks.progress_lines import ProgressLines
from lipsim.certificates.numbers import check_count
from lipsim.data import Triplet
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule
from lipsim.evaluation.scores import agrees
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric
from lipsim.results import eps_label
from lipsim.results.plots import plot_grid
from lipsim.results.schema import AttackedMetric, AttackedSection, AttackedSet, Scores, Source
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_files, write_file, write_safetensors

_IMAGES = "adversarial/*/[0-9]*-*.png"


class AttackRobustness(TripletCallback):
    """The suite :func:`lipsim.attacks.auto` on each triplet at growing budgets; logs the score that is left.

    A sample is attacked while the metric agrees with its votes; once any attack has broken it, it counts as broken at
    every larger budget and is not attacked again. Where every gradient was zero or not finite, the triplet is counted
    under ``no_gradient``: the attacks without gradients alone have tried it. An answer that flips inside its certified
    radius is counted as a violation, which must never happen. (A test without
    :class:`lipsim.callbacks.CertifyRadii` searches for the rounding of features first, as that does: radii have to
    cover it.)

    A test run writes results.json, attacks.csv, and for the first triplets of each set the attacked images: exact ones
    in ``adversarial/SET.safetensors``, 8-bit ones beside it, and a picture in ``plots/attacked-SET.png``.

    Args:
        eps: budgets, in input pixels in [0, 1] (in ℓ0 numbers of pixels), ascending.
        norm: 2, "inf" or 0.
        attacks: by name, in the order in which they run; None: the suite of the norm.
        steps: gradient steps of each run of attacks with gradients, at each budget.
        restarts: runs of each attack at each budget.
        queries: forward passes of each run of attacks without gradients, at each budget; None: five times ``steps``.
        target: which image moves; "all": the three together, each within the budget.
        seed: of everything random, which depends on the sample's index and not on batches or processes.
        others: name → exported metric, attacked in the same way on the same triplets.
        num_examples: triplets of the first batch of each set, at most, whose images a test saves and draws.
        directory: as in :class:`TripletCallback`.
        validate: as in :class:`TripletCallback`; off by default, attacks cost hundreds of forward passes.

    Raises:
        ValueError: a bad budget, norm or target, no step, run or query, or an attack that is unknown or does not work
            in this norm.
    """

    files = ("attacks.csv", "attacks-*.csv", "plots/attacked-*.png", "adversarial/*.safetensors", _IMAGES)
    differentiates = True

    def __init__(
        self,
        eps: list[float] = list(EPS),  # noqa: B006  (copied below)
        norm: Norm = 2,
        attacks: list[str] | None = None,
        steps: int = 50,
        restarts: int = 1,
        queries: int | None = None,
        target: Target = "reference",
        seed: int = 0,
        others: dict[str, Path] | None = None,
        num_examples: int = 3,
        directory: Path | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(directory, validate)
        self.eps = check_budgets(eps)
        for budget in eps:
            Ball(norm, budget)  # refuses bad ones now
        if target not in TARGETS:
            raise LipsimError(f"expected target to be one of {', '.join(TARGETS)}, got {target!r}")
        self.attacks = check_attacks(attacks, norm)
        self.norm, self.target, self.seed = norm, target, seed
        check_effort(steps, restarts, queries)
        self.steps, self.restarts, self.queries = steps, restarts, 5 * steps if queries is None else queries
        self.others = load_others(others)
        self.attacked: dict[str, PerceptualMetric] = {}
        self.num_examples = check_count("num_examples", num_examples, least=0)
        self.pictured: set[str] = set()  # sets whose examples are saved

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        for metric in self.others.values():
            freeze(metric.to(module.device))
        self.pictured = set()
        # Radii that nobody has made smaller by the rounding of features are not to be called broken by it.
        others = trainer.callbacks  # type: ignore[attr-defined]
        if self.writes(trainer) and not any(isinstance(callback, CertifyRadii) for callback in others):
            cover_feature_error(trainer, module, ERROR_SAMPLE)
        # A copy without gradients to the weights: attacks differentiate through hundreds of forward passes.
        self.attacked = {"metric": module.metric.frozen_copy(), **self.others}

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        # The radius is 0 where the metric has no bound.
        columns: dict[str, Tensor] = {"right_vote": batch.right_vote, "radius": evaluated.radius(self.target)}
        found: dict[str, SuiteResult] = {}
        for key, metric in self.attacked.items():
            margin = evaluated.margin if key == "metric" else metric.margin(*batch.embed(metric.embed))
            found[key] = self.attack(metric, batch, margin, _progress(trainer, key))
            columns |= {f"{key}/{column}": values for column, values in self._columns(found[key], batch).items()}
            columns[f"{key}/margin"] = margin
        draws = self.writes(trainer) and trainer.is_global_zero and name not in self.pictured and self.num_examples > 0
        if draws:
            self.pictured.add(name)
            self._save_examples(trainer, batch, found, name)
        columns[DRAWN] = torch.full_like(batch.index, int(draws))
        return columns

    def restore(self, name: str, index: Tensor, position: Tensor, columns: dict[str, Tensor]) -> None:
        super().restore(name, index, position, columns)
        if bool(columns[DRAWN].any()):  # the run that was cut short has saved them, but not for rows of other processes
            self.pictured.add(name)

    def attack(
        self,
        metric: PerceptualMetric,
        batch: Triplet,
        margin: Tensor,
        progress: Callable[[str], None] | None = None,
    ) -> SuiteResult:
        """Attack a batch; where the metric does not agree with the votes to begin with, it counts as broken at 0."""
        images = (batch.reference, batch.left, batch.right)
        whole = TwoAFCObjective(metric, *images, target=self.target, chosen_left=margin > 0)
        broken_at = torch.zeros_like(margin)
        by = {name: broken_at.clone() for name in self.attacks}
        no_gradient = torch.zeros_like(margin, dtype=torch.bool)
        passes = Passes.none(len(margin), margin.device)
        passes_by = dict.fromkeys(self.attacks, passes)
        x_adv = whole.images.clone()
        rows = agrees(margin, batch.right_vote).nonzero().flatten()
        if len(rows):
            result = auto(
                whole.select(rows),
                whole.images[rows],
                norm=self.norm,
                eps=self.eps,
                attacks=self.attacks,
                steps=self.steps,
                restarts=self.restarts,
                queries=self.queries,
                parts=whole.parts,
                seed=self.seed,
                index=batch.index[rows],
                progress=progress,
            )
            broken_at[rows], x_adv[rows] = result.broken_at, result.x_adv
            no_gradient[rows] = result.no_gradient
            for name, values in result.by.items():
                by[name][rows] = values
            passes = passes.put(rows, result.passes)
            passes_by = {name: none.put(rows, result.passes_by[name]) for name, none in passes_by.items()}
        return SuiteResult(broken_at, by, x_adv, no_gradient, passes, passes_by)

    def _columns(self, found: SuiteResult, batch: Triplet) -> dict[str, Tensor]:
        """What is known of each triplet.

        ``broken_at``, ``length`` (ℓ2 norm of the change that broke it, ∞ where none did), ``no_gradient`` (attacks with
        gradients had none to go by), and ``broken_at`` by each attack.
        """
        clean = torch.cat([getattr(batch, name) for name in self._moving], 1)
        length = sample_norm(found.x_adv - clean, 2, len(self._moving)).double()
        length = torch.where(torch.isinf(found.broken_at), math.inf, length)
        return {"broken_at": found.broken_at, "length": length, "no_gradient": found.no_gradient, **found.by}

    @property
    def _moving(self) -> list[str]:
        return list(IMAGES) if self.target == "all" else [self.target]

    def _save_examples(self, trainer: L.Trainer, batch: Triplet, found: dict[str, SuiteResult], name: str) -> None:
        count = min(self.num_examples, len(batch))
        index = batch.index[:count].tolist()
        columns: dict[str, Tensor] = {image: getattr(batch, image)[:count] for image in IMAGES}
        labels = [[f"#{i}: {image}" for i in index] if image == "reference" else [image] * count for image in columns]
        for key, result in found.items():
            title = "this metric" if key == "metric" else key
            for image, x_adv in zip(self._moving, result.x_adv[:count].chunk(len(self._moving), 1), strict=True):
                columns[f"{key}/{image}"] = x_adv
                labels.append([f"{title}: {verdict}" for verdict in verdicts(result)[:count]])
        picture, tensors, folder = self._examples(trainer, name)
        norm = "∞" if self.norm == "inf" else self.norm
        title = f"ℓ{norm} attacks up to ε = {eps_label(self.eps[-1])} on {self.target}"
        plot_grid(picture, list(columns.values()), labels, title=title)
        remove_files(folder, [Path(_IMAGES).name])  # of an earlier test
        write_safetensors(tensors, {"index": batch.index[:count], **columns})
        # Triplets of concatenated sets may have one index.
        stems = [f"{i:06d}" if index.count(i) == 1 else f"{i:06d}-{k}" for k, i in enumerate(index)]
        for column, images in columns.items():
            for stem, image in zip(stems, images.detach().cpu(), strict=True):
                write_file(folder / f"{stem}-{column.replace('/', '-')}.png", partial(save_image, image))

    def _examples(self, trainer: L.Trainer, name: str) -> list[Path]:
        """Where the attacked images of a set go, if any: a picture, exact ones, a folder of 8-bit ones."""
        if not self.num_examples:
            return []
        directory = self.output_directory(trainer)
        folder = directory / "adversarial"
        return [directory / "plots" / f"attacked-{name}.png", folder / f"{name}.safetensors", folder / name]

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        gathered = self.gather(trainer, module)
        drawn = [name for name, rows in gathered.items() if bool(rows.pop(DRAWN).any())]
        sets = {name: self._summarise(rows) for name, rows in self.with_parts(module, gathered).items()}
        stage = "test" if trainer.testing else "val"
        for name, summary in sets.items():
            for label, score in summary["metrics"]["metric"]["attacked"].items():
                log_score(module, f"{stage}/{name}/attacked_{label}", score)
        written = self.write_rows(trainer, "attacks", gathered)
        self.remove_others(trainer, [*written, *(path for name in drawn for path in self._examples(trainer, name))])
        self.write_section(trainer, lambda source: {"attacked": self._section(source, sets)})

    def _section(self, source: Source, sets: dict[str, AttackedSet]) -> AttackedSection:
        return {
            **source,
            "suite": self.attacks == suite(self.norm),
            "attacks": list(self.attacks),
            "norm": self.norm,
            "target": self.target,
            "steps": self.steps,
            "restarts": self.restarts,
            "queries": self.queries,
            "seed": self.seed,
            "eps": self.eps,
            "sets": sets,
        }

    def _summarise(self, rows: dict[str, Tensor]) -> AttackedSet:
        untied = rows["right_vote"] != 0.5
        metrics: dict[str, AttackedMetric] = {}
        for name in self.attacked:
            broken_at = rows[f"{name}/broken_at"][untied]
            # What the attacks up to this one, in their order, have left.
            by = torch.stack([rows[f"{name}/{attack}"][untied] for attack in self.attacks]).cummin(0).values
            metrics[name] = {
                "natural": float((broken_at > 0).double().mean()),
                "no_gradient": int(rows[f"{name}/no_gradient"][untied].sum()),
                "attacked": self._scores(broken_at),
                "after": {attack: self._scores(left) for attack, left in zip(self.attacks, by, strict=True)},
            }
        # A certificate R promises the answer for every ‖δ‖₂ < R.
        violated = (rows["metric/broken_at"] > 0) & (rows["metric/length"] < rows["radius"])
        return {
            "num_triplets": len(untied),
            "num_tied_votes": int((~untied).sum()),
            "violations": int(violated.sum()),
            "metrics": metrics,
        }

    def _scores(self, broken_at: Tensor) -> Scores:
        return {eps_label(eps): float((broken_at > eps).double().mean()) for eps in self.eps}


def verdicts(result: SuiteResult) -> list[str]:
    """What a picture says of each sample."""
    return [
        "wrong, or a tie, as it is"
        if broken_at == 0
        else f"flipped at {eps_label(broken_at)}"
        if math.isfinite(broken_at)
        else "no gradient to attack with"
        if no_gradient
        else "holds"
        for broken_at, no_gradient in zip(result.broken_at.tolist(), result.no_gradient.tolist(), strict=True)
    ]


def _progress(trainer: L.Trainer, key: str) -> Callable[[str], None] | None:
    """Shows in the progress bar, or in a line of the log, which attack runs; None where there is neither."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressLines):
        return lambda text: bar.say(f"{key}: {text}")
    if not isinstance(bar, RichProgressBar) or not bar.is_enabled:
        return None
    task = bar.test_progress_bar_id if trainer.testing else bar.val_progress_bar_id
    stage = bar.test_description if trainer.testing else bar.validation_description

    def show(text: str) -> None:
        if bar.progress is not None and task is not None:
            bar.progress.update(task, description=f"{stage} {key}: {text}")
            bar.refresh()

    return show
