"""The quickstart: every stage in turn, from nothing to a certified metric and a report that shows it.

The stages are the same that ``python scripts/train.py --config configs/quickstart/….yaml`` runs one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lipsim.cli.stage import StageCLI, train
from lipsim.evaluation.scores import score_distance
from lipsim.metric.distances import BASELINES
from lipsim.results import read_results, update_results
from lipsim.results.quickstart import write_report
from lipsim.results.schema import BaselinesSection, Results
from lipsim.results.tables import print_table

ROOT = Path("runs/quickstart")
STAGES = {
    "teacher": "tune a small ViT teacher on triplets",
    "linear": "train the linear baseline",
    "distill": "distil the teacher into a 1-Lipschitz student",
    "finetune": "fine-tune the student on its certified radius",
}


def quickstart(overrides: Sequence[str] = ()) -> Results:
    """Tune, distil, fine-tune, certify, attack and report, into ``runs/quickstart`` of the current folder.

    Two and a half to five minutes on two cores; says what it is doing.

    Args:
        overrides: command-line options for every stage, such as ``["--trainer.max_epochs", "1"]``.

    Returns:
        The contents of results.json.
    """
    console = Console()
    seconds: dict[str, float] = {}
    cli: StageCLI | None = None
    for count, (stage, title) in enumerate(STAGES.items(), start=1):
        console.rule(f"[bold]{count}/{len(STAGES) + 1}  {title}")
        start = time.perf_counter()
        cli = train(["fit", "--config", f"quickstart/{stage}", *overrides])
        if stage == "linear":
            cli.run_test()
        seconds[stage] = time.perf_counter() - start
    assert cli is not None
    console.rule(f"[bold]{len(STAGES) + 1}/{len(STAGES) + 1}  certify and attack every test triplet")
    start = time.perf_counter()
    cli.run_test()
    test_loader = cli.datamodule.test_dataloader()[0]
    (name,) = cli.datamodule.test_names
    scores = {title: score_distance(distance, test_loader) for title, distance in BASELINES.items()}
    seconds["test"] = time.perf_counter() - start
    results = ROOT / "results.json"
    source = read_results(results)["certified"]["data_sha256"]
    durations = {stage: round(value, 1) for stage, value in seconds.items()}
    baselines: BaselinesSection = {"data_sha256": source, "sets": {name: {"metrics": scores}}}
    update_results(results, {"baselines": baselines, "durations": {"seconds": durations}})
    tables, lines = write_report(ROOT)
    for title, rows in tables.items():
        print_table(console, rows, title)
    for line in lines:
        console.print(line, highlight=False)
    console.print(f"{sum(seconds.values()) / 60:.1f} minutes. Report, plots and checkpoints are in {ROOT}/;")
    console.print(f"lipsim.load('{ROOT}/quickstart.safetensors') gives the metric.", highlight=False)
    return read_results(results)
