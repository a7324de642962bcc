"""Attack one pair or triplet of images, and keep the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lipsim.attacks import DistanceObjective, TwoAFCObjective, apgd, auto
from lipsim.attacks.objectives import IMAGES, Target
from lipsim.attacks.projections import Norm, check_norm, sample_norm
from lipsim.attacks.watch import WatchedObjective
from lipsim.metric import Distance
from lipsim.results import eps_label
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_files, write_file, write_safetensors
from lipsim.utils.precision import full_precision
from lipsim.utils.terminal import text_table

Goal = Literal["different", "alike"]
GOALS: tuple[Goal, ...] = ("different", "alike")
_PICTURES = [f"{name}{end}.png" for name in (*IMAGES, "image", "other") for end in ("", "-attacked")]
# Budgets where none is given: for a triplet the smallest that suffices counts, a pair takes the one in the middle.
_EPS: dict[Norm, tuple[float, ...]] = {
    2: (36 / 255, 108 / 255, 1.0, 2.0, 4.0),
    "inf": (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255),
    0: (1.0, 4.0, 16.0, 64.0, 256.0),
}


@dataclass(frozen=True)
class AttackedImages:
    """Images before and after an attack.

    Attributes:
        clean: name → ``(3, H, W)``.
        attacked: the same names; images that did not move are equal to the clean ones.
        before: pair of names, as in "reference, left" → distance.
        after: the same after the attack.
        rounded: the same after the attack, with images rounded to 8 bits as PNG files hold them.
        eps: budget within which the attack succeeded; ∞ where it did not. Of a pair, the budget.
        norm: of the budget.
        length: ``ℓ2`` norm of the change, the largest of the images that moved.
        tie: both candidates are at one distance, so that there is no answer, and nothing was attacked.
        no_gradient: attacks with gradients had none to go by; what they did not find says nothing.
        passes: ``"forward"`` and ``"backward"`` → how often the attacks computed and differentiated the objective.
    """

    clean: dict[str, Tensor]
    attacked: dict[str, Tensor]
    before: dict[str, float]
    after: dict[str, float]
    rounded: dict[str, float]
    eps: float
    norm: Norm
    length: float
    tie: bool
    no_gradient: bool
    passes: dict[str, int]

    def save(self, folder: Path) -> None:
        """Write each image (``NAME.png``, and ``NAME-attacked.png`` where it moved), the exact tensors and a picture.

        The tensors are in ``images.safetensors``; ``picture.png`` shows each image clean, perturbed, and the change
        amplified around gray, under the distances before and after.
        """
        from torchvision.utils import save_image  # seconds to import

        from lipsim.results.plots import plot_grid  # matplotlib, which the command line loads only where it draws

        # Of an earlier attack of other images. What its file of tensors calls them is not asked: that may be anybody's.
        if (folder / "images.safetensors").is_file():
            remove_files(folder, _PICTURES)
        tensors = {**self.clean, **{f"{name}-attacked": self.attacked[name] for name in self._moved}}
        for name, image in tensors.items():
            write_file(folder / f"{name}.png", partial(save_image, image))
        write_safetensors(folder / "images.safetensors", tensors)
        clean = torch.stack(list(self.clean.values()))
        attacked = torch.stack([self.attacked[name] for name in self.clean])
        change = attacked - clean
        gain = 0.5 / change.flatten(1).abs().amax(1).clamp(min=1e-6)
        moved = [name in self._moved for name in self.clean]
        labels = [
            list(self.clean),
            [f"‖δ‖₂ = {float(d.norm()):.3g}" if m else "stays" for d, m in zip(change, moved, strict=True)],
            [f"change × {float(g):.3g}" if m else "" for g, m in zip(gain, moved, strict=True)],
        ]
        columns = [clean, attacked, 0.5 + change * gain.view(-1, 1, 1, 1)]
        lines = [f"d({pair}): {self.before[pair]:.4g} → {self.after[pair]:.4g}" for pair in self.before]
        plot_grid(folder / "picture.png", columns, labels, title="\n".join(lines))

    @property
    def _moved(self) -> list[str]:
        return [name for name in self.clean if not torch.equal(self.clean[name], self.attacked[name])]

    def facts(self) -> dict[str, Any]:
        """What JSON output holds."""
        return {
            "eps": self.eps if math.isfinite(self.eps) else None,
            "norm": self.norm,
            "length": self.length,
            "before": self.before,
            "after": self.after,
            "rounded": self.rounded,
            "tie": self.tie,
            "no_gradient": self.no_gradient,
            "passes": self.passes,
        }

    @property
    def outcome(self) -> str:
        """What came of the attack, in one sentence."""
        is_triplet = len(self.before) == 2
        if self.tie:
            return (
                "a tie: both candidates are at one distance, there is no answer to turn around, and nothing was "
                "attacked"
            )
        if math.isinf(self.eps):
            if self.no_gradient:
                return "no gradient to attack with: only the attacks without gradients have tried, and found nothing"
            return "the answer holds within every budget that was tried"
        if not is_triplet and self.no_gradient:
            return "no gradient to attack with: the distance after the attack says nothing about what one can reach"
        within = f"within ε = {eps_label(self.eps)} in ℓ{'∞' if self.norm == 'inf' else self.norm}"
        if self.length == 0:
            return f"nothing better than the images as they are was found {within}"
        sentence = f"{'turned around' if is_triplet else 'changed'} {within}; ‖δ‖₂ = {self.length:.5g}"
        if is_triplet and _nearer(self.rounded) != -_nearer(self.before):
            sentence += "; rounding to 8 bits undoes it, as images.safetensors does not"
        return sentence

    def __str__(self) -> str:
        rows = [
            (f"d({pair})", *(f"{distances[pair]:.5g}" for distances in (self.before, self.after, self.rounded)))
            for pair in self.before
        ]
        return text_table(("distance", "before", "after", "in 8 bits"), rows) + f"\n{self.outcome}"


def attack_triplet(
    metric: Distance,
    reference: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    target: Target = "reference",
    norm: Norm = 2,
    eps: float | Iterable[float] | None = None,
    attacks: Sequence[str] | None = None,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> AttackedImages:
    """Turn a metric's answer to one triplet around with the suite :func:`lipsim.attacks.auto`.

    Args:
        metric: a metric, frozen for speed, or a callable that returns distances.
        reference: ``(3, H, W)`` in [0, 1].
        left: the same.
        right: the same.
        target: which image moves; "all": the three, each within the budget.
        norm: 2, "inf" or 0.
        eps: budgets; the smallest that suffices is taken. None: five from what nobody sees to what everybody does.
        attacks: by name; None: the suite of the norm.
        steps: gradient steps of each run; attacks without gradients get five times as many queries.
        restarts: runs of each attack.
        seed: of everything random.
        progress: told what runs next.

    Raises:
        ValueError: a bad target, norm, budget or attack, or images outside [0, 1].
    """
    clean: dict[str, Tensor] = {"reference": reference, "left": left, "right": right}
    pairs = [("reference", "left"), ("reference", "right")]
    check_norm(norm)
    with full_precision():
        objective = TwoAFCObjective(metric, reference[None], left[None], right[None], target)
        watched = WatchedObjective(objective, objective.images)
        with torch.no_grad():
            margin = float(watched(objective.images))
        if math.isnan(margin):
            raise LipsimError("the metric gives these images distances that are not numbers (NaN); nothing to attack")
        if margin == 0:
            return _outcome(metric, clean, clean, pairs, math.inf, norm, watched, tie=True)
        attack = auto(
            watched,
            objective.images,
            norm=norm,
            eps=_EPS[norm] if eps is None else eps,
            attacks=attacks,
            steps=steps,
            restarts=restarts,
            parts=objective.parts,
            seed=seed,
            progress=progress,
        )
    moving = IMAGES if target == "all" else (target,)
    moved: dict[str, Tensor] = dict(zip(moving, attack.x_adv[0].chunk(objective.parts), strict=True))
    return _outcome(metric, clean, {**clean, **moved}, pairs, float(attack.broken_at), norm, watched)


def attack_pair(
    metric: Distance,
    image: Tensor,
    other: Tensor,
    *,
    goal: Goal = "different",
    norm: Norm = 2,
    eps: float | None = None,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> AttackedImages:
    """Change one image so that a metric finds it as different from, or as like another as it can get, with APGD.

    Args:
        metric: a metric, frozen for speed, or a callable that returns distances.
        image: ``(3, H, W)`` in [0, 1], the one that moves.
        other: the same; equal to ``image`` for ``d(x, x + δ)``.
        goal: "different" or "alike".
        norm: 2, "inf" or 0.
        eps: the budget.
        steps: gradient steps of each run.
        restarts: runs.
        seed: of everything random.

    Raises:
        ValueError: a bad goal, norm or budget, or images outside [0, 1].
    """
    if goal not in GOALS:
        raise LipsimError(f"expected goal 'different' or 'alike', got {goal!r}")
    check_norm(norm)
    largest = _EPS[norm][2] if eps is None else eps
    with full_precision():
        objective = DistanceObjective(metric, other[None], increase=goal == "different")
        watched = WatchedObjective(objective, image[None])
        x_adv = apgd(watched, image[None], norm=norm, eps=largest, steps=steps, restarts=restarts, seed=seed)
    clean = {"image": image, "other": other}
    moved = {"image": x_adv[0], "other": other}
    return _outcome(metric, clean, moved, [("image", "other")], largest, norm, watched)


def _nearer(distances: dict[str, float]) -> int:
    """1 for left, −1 for right, 0 for a tie."""
    left, right = distances["reference, left"], distances["reference, right"]
    return (left < right) - (left > right)


@torch.no_grad()
def _outcome(
    metric: Distance,
    clean: dict[str, Tensor],
    attacked: dict[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    eps: float,
    norm: Norm,
    watched: WatchedObjective,
    *,
    tie: bool = False,
) -> AttackedImages:
    def distances(images: dict[str, Tensor]) -> dict[str, float]:
        with full_precision():
            return {f"{a}, {b}": float(metric(images[a][None], images[b][None])) for a, b in pairs}

    rounded = {name: (image * 255).round() / 255 for name, image in attacked.items()}
    length = max(float(sample_norm(attacked[name][None] - clean[name][None])) for name in clean)
    before, after, in_8_bits = distances(clean), distances(attacked), distances(rounded)
    passes = {"forward": int(watched.passes.forward), "backward": int(watched.passes.backward)}
    flat = bool(watched.no_gradient)
    return AttackedImages(clean, attacked, before, after, in_8_bits, eps, norm, length, tie, flat, passes)
