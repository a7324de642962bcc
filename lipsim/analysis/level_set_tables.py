"""Tables and pictures of level sets: networks side by side, and all pairs of a few images as a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim.analysis.level_sets import LevelSetProtocol, LevelSets, ObjectiveOf
from lipsim.attacks.level_set import level_set
from lipsim.results.formats import remove_table, write_table
from lipsim.results.tables import Row
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_text

_DISTANCES = {
    "start_rmse": "RMSE source",
    "rmse": "RMSE",
    "linf": "ℓ∞",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "loss": "loss",
    "path_loss": "loss on the way",
}


def mean_and_spreads(measured: Tensor) -> tuple[float, float, float]:
    """Mean, and standard deviations over draws and over samples, of values ``(S, K)`` of S samples and K draws.

    Over draws: of the K means over all samples, as another seed would give another mean. Over samples: of the S means,
    as the paper prints it. NaN where there is one alone.
    """
    return float(measured.mean()), _deviation(measured.mean(0)), _deviation(measured.mean(1))


def _deviation(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else math.nan


def distance_rows(found: Mapping[str, LevelSets]) -> list[Row]:
    """How near outcomes come to their targets (the paper's Table 1), and whether straight ways to them stay."""
    rows: list[dict[str, str]] = []
    for name, sets in found.items():
        row = {"model": name, "sources": str(len(sets.index))}
        for key, title in _DISTANCES.items():
            values = getattr(sets, key)
            if not values.isnan().all():
                row[title] = _cell(values)
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "") for column in columns} for row in rows]


def triangle_rows(found: Mapping[str, LevelSets], protocol: LevelSetProtocol) -> list[Row]:
    """Mean loss over triangles, and shares of their points by what they lose (the paper's Table 2)."""
    rows: list[Row] = []
    for name, sets in found.items():
        row = {"model": name, "mean loss": _cell(sets.triangle_loss)}
        for k, most in enumerate(protocol.losses):
            row[f"< {most:g}"] = _cell(sets.triangle_share[:, :, k])
        rows.append({**row, "in the level set": _cell(sets.triangle_accepted)})
    return rows


def width_rows(found: Mapping[str, LevelSets], protocol: LevelSetProtocol) -> list[Row]:
    """Share of random directions that stay in the level set, and what all but 5 % of them lose at most."""
    rows: list[Row] = []
    for name, sets in found.items():
        for k, step in enumerate(sorted(set(protocol.width_steps))):
            row = {"model": name, "after step": str(step)}
            for j, width in enumerate(protocol.widths):
                row[f"stay at {width:g}"] = _cell(sets.width_accepted[:, :, k, j])
            for j, width in enumerate(protocol.widths):
                row[f"lose at {width:g}"] = _cell(sets.width_high[:, :, k, j])
            rows.append(row)
    return rows


def summary(sets: LevelSets) -> dict[str, Any]:
    """Mean and spreads of everything that was measured, for JSON; NaN is None."""
    content: dict[str, Any] = {"sources": len(sets.index)}
    for name, tensor in sets.tensors.items():
        if name in ("index", "target", "outcomes") or not tensor.numel():
            continue
        columns = tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(2)
        values = [mean_and_spreads(columns[:, :, k]) for k in range(columns.shape[2])]
        parts = [
            [None if math.isnan(number) else number for number in numbers] for numbers in zip(*values, strict=True)
        ]
        keys = ("mean", "over draws", "over samples")
        content[name] = {key: part if tensor.ndim > 2 else part[0] for key, part in zip(keys, parts, strict=True)}
    return content


def write_tables(folder: Path, found: Mapping[str, LevelSets], protocol: LevelSetProtocol) -> None:
    """Write the tables of some models as Markdown, LaTeX and CSV, and everything as ``level_sets.json``."""
    import json

    file = folder / "level_sets.json"
    if file.is_file():  # an earlier measurement, which may have had more tables
        for name in ("triangles", "widths"):
            remove_table(folder, name)
    write_table(folder, "distances", "Distance of outcomes to their targets", distance_rows(found))
    if protocol.targets > 1:
        write_table(folder, "triangles", "Triangles of a source and two outcomes", triangle_rows(found, protocol))
    if protocol.width_steps:
        write_table(folder, "widths", "Widths across the walk", width_rows(found, protocol))
    content = [{"model": name, **summary(sets)} for name, sets in found.items()]
    write_text(file, json.dumps(content, indent=1) + "\n")


def all_pairs(
    objective_of: ObjectiveOf,
    images: Tensor,
    protocol: LevelSetProtocol | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Walk from each of a few images to each other.

    Args:
        objective_of: as in :func:`lipsim.analysis.level_sets.measure_level_sets`.
        images: ``(N, 3, H, W)``, five of them in the paper.
        protocol: how walks go.
        say: hears how far it is.

    Returns:
        Outcomes ``(N, N, 3, H, W)``, a row a target and a column a source, the images themselves on the diagonal; and
        what each has lost ``(N, N)``.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise LipsimError(f"expected at least two images, got {len(images)}")
    protocol = protocol or LevelSetProtocol()
    count = torch.arange(len(images))
    target, source = (part.flatten() for part in torch.meshgrid(count, count, indexing="ij"))
    outcomes = images[target].clone()
    move = (target != source).nonzero().flatten()
    outcomes[move] = level_set(
        objective_of(source[move]),
        images[source[move]],
        images[target[move]],
        steps=protocol.steps,
        step_size=protocol.step_size,
        correction=protocol.correction,
        newton=protocol.newton,
        noise=protocol.noise,
        seed=protocol.seed,
        index=source[move],
        say=say,
    )
    with torch.no_grad():
        objective = objective_of(source)
        loss = objective(outcomes) - objective(images[source])
    return outcomes.unflatten(0, (len(images), -1)), loss.view(len(images), -1)


def plot_all_pairs(path: Path, outcomes: Tensor, loss: Tensor, names: Sequence[str], title: str = "") -> None:
    """Draw what :func:`all_pairs` returns: a column a source, a row a target, the loss below each outcome."""
    from lipsim.results.plots import save  # matplotlib, seconds

    from matplotlib.figure import Figure  # isort: skip  after what chooses its backend

    count = len(outcomes)
    figure = Figure(figsize=(1.15 * count + 0.3, 1.3 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, count, squeeze=False)
    for i in range(count):
        for j in range(count):
            axis = axes[i][j]
            axis.imshow(outcomes[i, j].permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("image" if i == j else f"loss {float(loss[i, j]):.2f}", fontsize=7, labelpad=2)
        axes[0][i].set_title(f"from {names[i]}", fontsize=7)
        axes[i][0].set_ylabel(f"to {names[i]}", fontsize=7)
    figure.suptitle(title, fontsize=8)
    save(figure, path)


def _cell(values: Tensor) -> str:
    mean, draws, _ = mean_and_spreads(values)
    return f"{mean:.3f}" if math.isnan(draws) else f"{mean:.3f} ± {draws:.3f}"
