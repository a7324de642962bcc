"""The quickstart: every stage in turn, from nothing to a certified metric and a report that shows it.

The stages are the same that ``python scripts/train.py --config configs/quickstart/….yaml`` runs one by one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from lipsim.attacks.objectives import Distance
from lipsim.cli.stage import StageCLI, train
from lipsim.evaluation.scores import TwoAFCScore
from lipsim.metric.distances import BASELINES
from lipsim.results import read_results, update_results
from lipsim.results.plots import plot_scores
from lipsim.results.tables import (
    NO_GRADIENT,
    Row,
    certified_curve,
    markdown_table,
    print_table,
    read_columns,
    score_rows,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
ROOT = Path("runs/quickstart")
STAGES = {
    "teacher": "tune a small ViT teacher on triplets",
    "linear": "train the linear baseline",
    "distill": "distil the teacher into a 1-Lipschitz student",
    "finetune": "fine-tune the student on its certified radius",
}


def quickstart(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Tune, distil, fine-tune, certify, attack and report, into ``runs/quickstart`` of the current folder.

    Args:
        overrides: command-line options for every stage, such as ``["--trainer.max_epochs", "1"]``.

    Returns:
        The contents of results.json.

    Raises:
        FileNotFoundError: the configs are not beside the package, which is not run from a clone.
    """
    if not CONFIGS.is_dir():
        raise FileNotFoundError(f"no configs at {CONFIGS}; run the quickstart from a clone of the repository")
    console = Console()
    seconds: dict[str, float] = {}
    cli: StageCLI | None = None
    for number, (stage, title) in enumerate(STAGES.items(), start=1):
        console.rule(f"[bold]{number}/{len(STAGES) + 1}  {title}")
        start = time.perf_counter()
        cli = train(["fit", "--config", str(CONFIGS / f"{stage}.yaml"), *overrides])
        if stage == "linear":
            cli.run_test()
        seconds[stage] = time.perf_counter() - start
    assert cli is not None
    console.rule(f"[bold]{len(STAGES) + 1}/{len(STAGES) + 1}  certify and attack every test triplet")
    start = time.perf_counter()
    cli.run_test()
    test_loader = cli.datamodule.test_dataloader()[0]
    (name,) = cli.datamodule.test_names
    scores = {title: score_of(distance, test_loader) for title, distance in BASELINES.items()}
    seconds["test"] = time.perf_counter() - start
    results = ROOT / "results.json"
    update_results(results, "baselines", {"sets": {name: scores}})
    update_results(results, "seconds", {stage: round(value, 1) for stage, value in seconds.items()})
    return report(ROOT, console)


def score_of(distance: Distance, loader: DataLoader[Any]) -> dict[str, float]:
    """Natural scores of a plain distance on a loader of triplets."""
    majority, vote = TwoAFCScore("majority", sync_on_compute=False), TwoAFCScore("vote", sync_on_compute=False)
    seen = 0
    for batch in loader:
        position = torch.arange(seen, seen + len(batch))
        seen += len(batch)
        with torch.no_grad():
            margin = distance(batch.reference, batch.right) - distance(batch.reference, batch.left)
        for score in (majority, vote):
            score.update(margin, batch.right_vote, position)
    return {"majority": float(majority.compute()), "vote": float(vote.compute())}


def report(root: Path, console: Console) -> dict[str, Any]:
    """Print the quickstart's tables, write ``report.md`` and the plots; returns the contents of results.json."""
    results = read_results(root / "results.json")
    linear = read_results(root / "linear" / "results.json")
    (name,) = results["certified"]["sets"]
    tables = quickstart_tables(results, linear, name)
    for title, rows in tables.items():
        print_table(console, rows, title)
    lines = [*null_space_lines(results, name), _violations(results, name)]
    for line in lines:
        console.print(line, highlight=False)
    _plot(root, results, name)
    text = [part for title, rows in tables.items() for part in (f"{title}:", markdown_table(rows))]
    (root / "report.md").write_text("\n\n".join(["# Quickstart", *text, *lines]) + "\n", encoding="utf-8")
    console.print(f"{sum(results['seconds'].values()) / 60:.1f} minutes. Report, plots and checkpoints are in {root}/;")
    console.print(f"lipsim.load('{root}/quickstart.safetensors') gives the metric.", highlight=False)
    return results


def quickstart_tables(results: Mapping[str, Any], linear: Mapping[str, Any], name: str) -> dict[str, list[Row]]:
    """Title → rows: what is certified, and what is left under attack, for every metric."""
    certified, attacked = results["certified"]["sets"][name], results["attacked"]["sets"][name]
    own_linear = linear["certified"]["sets"][name]
    rows = {
        "student, exact radius": (certified["majority"], certified["certified"]),
        "student, published radius": (certified["majority"], certified["published"]),
        "linear map, exact radius": (own_linear["majority"], own_linear["certified"]),
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher (ViT, no certificate)"}
    under_attack = {title: (attacked[key]["natural"], attacked[key]["attacked"]) for key, title in names.items()}
    plain: dict[str, tuple[float, dict[str, float]]] = {
        title: (scores["majority"], {}) for title, scores in results["baselines"]["sets"][name].items()
    }
    count = certified["num_triplets"]
    suite = f"2AFC score in % under attack (APGD, minimal norm, Square) on the reference, {count} test triplets"
    left = score_rows({**under_attack, **plain})
    flat = {title: attacked[key]["no_gradient"] for key, title in names.items()}
    if any(flat.values()):
        suite += f"; {NO_GRADIENT}"
        left = [{**row, "no gradient": str(flat.get(row["metric"], ""))} for row in left]
    return {
        f"Certified 2AFC score in % on {count} test triplets, at ℓ2 budgets ε": score_rows(rows),
        suite: left,
    }


def null_space_lines(results: Mapping[str, Any], name: str) -> list[str]:
    """What the null-space search found, one sentence a metric."""
    lines = []
    for metric, found in results["null_space"]["sets"][name].items():
        title = {"metric": "student", "linear": "linear map"}.get(metric, metric)
        if found["kernel"]:
            lines.append(
                f"Null space of the {title}'s first operator ({found['layer']}): references moved by "
                f"‖δ‖ = {found['mean_length']:.2f} on average change the embedding by {found['median_change']:.0e} of "
                f"its norm (median; at most {found['largest_change']:.0e}); "
                f"{100 * found['exact']:.0f} % are exact collisions."
            )
        else:
            lines.append(f"Null space of the {title}'s first operator: none, {found['reason']}.")
    return lines


def _plot(root: Path, results: Mapping[str, Any], name: str) -> None:
    attacked, budgets = results["attacked"]["sets"][name], [0.0, *results["attacked"]["eps"]]
    eps = np.linspace(0, 1.5 * budgets[-1], 200)
    student, linear = read_columns(root / "radii.csv"), read_columns(root / "linear" / "radii.csv")
    certified = {
        "student": {
            "exact radius": (eps, certified_curve(student, "radius", eps)),
            "published radius": (eps, certified_curve(student, "published_radius", eps)),
        },
        "linear map": {"exact radius": (eps, certified_curve(linear, "radius", eps))},
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher"}
    under_attack = {
        names[key]: (budgets, [attacked[key]["natural"], *attacked[key]["attacked"].values()]) for key in names
    }
    plot_scores(root / "plots" / "scores.png", certified, under_attack, "Certified score and score under attack")
    pair = {key: under_attack[key] for key in ("teacher", "student")}
    plot_scores(root / "plots" / "teacher-and-student.png", {}, pair, "Teacher and student under the same attacks")


def _violations(results: Mapping[str, Any], name: str) -> str:
    count = results["attacked"]["sets"][name]["violations"]
    return f"Answers flipped inside their certified radius: {count}."
