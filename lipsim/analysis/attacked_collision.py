"""A collision within what an attack leaves of its budget (Ozbulak et al., Eq. 7): the flipped answer survives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipsim.analysis.collision_files import top_classes
from lipsim.analysis.collisions import Collision
from lipsim.analysis.models import Model
from lipsim.attacks import ClassificationObjective, null_space_after, pgd, require_operator
from lipsim.attacks.objectives import logits_of
from lipsim.attacks.projections import Norm, sample_norm
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


def attacked_collision(
    model: Model, x: Tensor, direction: Tensor, *, eps: float, norm: Norm = 2, steps: int = 100, seed: int = 0
) -> tuple[Collision, dict[str, Any]]:
    """Turn a classifier's answer around by PGD, and add what its first linear operator cannot see.

    Args:
        model: a classifier, of the dtype of the images.
        x: images ``(N, 3, S, S)`` in [0, 1].
        direction: like ``x``, of the move: ``target − x``, or noise.
        eps: budget of attack and move together.
        norm: 2 or "inf".
        steps: of PGD.
        seed: of PGD.

    Returns:
        The attacked images and those that collide with them, and what JSON output holds of the first.

    Raises:
        ValueError: no classifier, no linear operator, or a trivial kernel.
    """
    with full_precision():
        with torch.no_grad():
            labels = logits_of(model.module, x).argmax(1)
        operator = require_operator(model.module, model.image_size)
        objective = ClassificationObjective(model.module, labels)
        attacked = pgd(objective, x, norm=norm, eps=eps, steps=steps, seed=seed)
        with torch.no_grad():
            move = null_space_after(operator, objective, x, attacked, direction, eps=eps, norm=norm)
            if bool(move.trivial.all()):
                raise LipsimError(f"{operator} of {model.name} has a trivial kernel: nothing can be added to an attack")
            before, after = operator(attacked.to(x)), operator(move.x_adv)
    assert move.before is not None and move.after is not None
    residual = sample_norm(after - before) / sample_norm(before).clamp(min=1e-38)
    name = operator.name.removeprefix("network.")
    images = {"clean": x, "attacked": attacked, "with the collision": move.x_adv}
    facts = {
        "eps": eps,
        "norm": norm,
        "answers": {when: top_classes(model.module, image[:1]) for when, image in images.items()},
        "flipped": bool(move.before[0] > 0),
        "stays_flipped": bool(move.before[0] > 0) and bool(move.after[0] > 0),
        "length_of_attack": float(sample_norm(attacked - x)[0]),
        "length_of_collision": float(move.length[0]),
        "length": float(sample_norm(move.x_adv - x)[0]),
        "largest_change": float(sample_norm(move.x_adv - x, "inf")[0]),
        "seen": float(move.residual[0]),
        "relative": float(move.relative[0]),
    }
    return Collision(attacked, move.x_adv, x + direction, name, True, residual), facts


def describe_attack(facts: dict[str, Any]) -> str:
    """The same in a few lines."""
    lines = [
        f"answer {when}: " + ", ".join(f"{label} ({value:.2%})" for label, value in classes)
        for when, classes in facts["answers"].items()
    ]
    kept = "stays flipped" if facts["stays_flipped"] else "was undone by rounding"
    fate = f"the answer is flipped by the attack and {kept}" if facts["flipped"] else "the attack flips no answer"
    return "\n".join(
        [
            *lines,
            f"{fate}; budget {facts['eps']:g} in norm {facts['norm']}",
            f"ℓ2 lengths: attack {facts['length_of_attack']:.4g}, collision {facts['length_of_collision']:.4g}, both "
            f"{facts['length']:.4g}; the first operator sees at most {facts['seen']:.1e} of the collision "
            f"({facts['relative']:.1e} of what it would see of such a change elsewhere)",
        ]
    )
