"""`lipsim report`: the results of several runs side by side."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from lipsim.cli.parser import output_folder
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim report runs/quickstart",
    "lipsim report ours=runs/a ours=runs/b --seeds --output report",
    "lipsim report runs/a runs/b --radius certified joint",
    "lipsim report runs/nights",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim report` takes."""
    parser.description = (
        "Compare runs by their results.json: report.md, report.tex (booktabs), report.csv, curves as PDF "
        "and PNG, and report.html with the pictures of each run inside it. Takes seconds, most of them for drawing. "
        "Of a run that has trained, training-NAME.html as well, before there is a results.json, too: the page that is "
        "report.html in its folder while it runs, with its curves, scores and configuration."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="DIRECTORY or NAME=DIRECTORY of a run; * in it means all"
    )
    parser.add_argument("--output", type=output_folder, default="report", help="folder to write (%(default)s)")
    parser.add_argument(
        "--radius",
        nargs="+",
        default=["certified"],
        choices=("certified", "published", "joint"),
        help="rows of each run: the exact radius, LipSim's own, all three images moving (%(default)s)",
    )
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="runs of one NAME differ in their seed alone: one row, mean ± standard error",
    )
    parser.add_argument("--title", default="Report", help="heading of the Markdown (%(default)s)")
    parser.add_argument(
        "--markdown", type=user_path, metavar="FILE", help="where to write the Markdown (report.md in the folder)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from lipsim.results.run_page import write_training_pages

    with Progress("writing the report"):
        pages, runs_with_results = write_training_pages(options.runs, options.output)
    for page in pages:
        print(f"the page of a training is {page}")
    if pages and not runs_with_results:
        return 0
    from lipsim.results.benchmark import benchmark_warnings
    from lipsim.results.comparison import print_tables
    from lipsim.results.report import write_report  # matplotlib, which --help does without
    from lipsim.results.runs import load_runs, warnings

    unfinished = [run for run in runs_with_results if _is_empty(run)]
    if 0 < len(unfinished) < len(runs_with_results):  # such as rows of a benchmark that goes on
        print(f"left out, without a results.json so far: {', '.join(unfinished)}", file=sys.stderr)
        runs_with_results = [run for run in runs_with_results if run not in unfinished]
    with Progress("writing the report"):
        runs = load_runs(runs_with_results, seeds=options.seeds)
        tables = write_report(runs, options.output, options.radius, title=options.title, markdown=options.markdown)
    print_tables(tables, Console())
    for line in (*warnings(runs), *benchmark_warnings(runs)):
        print(f"warning: {line}", file=sys.stderr)
    print(f"report.html, .md, .tex, .csv and curves are in {options.output}/")
    return 0


def _is_empty(run: str) -> bool:
    """Whether a run is a folder in which there are no results yet."""
    from lipsim.results.runs import find_results

    return all(file.parent.is_dir() and not file.exists() for _, file in find_results(run))
