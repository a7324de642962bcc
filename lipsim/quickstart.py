"""The quickstart: every stage in turn, from nothing to a certified metric and a report that shows it.

The stages are the same that ``python scripts/train.py --config configs/quickstart/….yaml`` runs one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from lipsim import report
from lipsim.attacks.objectives import Distance
from lipsim.baselines import BASELINES
from lipsim.metrics import TwoAFCScore
from lipsim.results import update_results
from lipsim.train import StageCLI, train

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
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
    return report.quickstart(ROOT, console)


def score_of(distance: Distance, loader: DataLoader[Any]) -> dict[str, float]:
    """Natural scores of a plain distance on a loader of triplets."""
    majority, vote = TwoAFCScore("majority", sync_on_compute=False), TwoAFCScore("vote", sync_on_compute=False)
    for batch in loader:
        with torch.no_grad():
            margin = distance(batch.reference, batch.right) - distance(batch.reference, batch.left)
        for score in (majority, vote):
            score.update(margin, batch.right_vote, batch.index)
    return {"majority": float(majority.compute()), "vote": float(vote.compute())}
