"""The tables of the quickstart as means of several seeds, with standard errors.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--output runs/quickstart-seeds]

Runs ``python scripts/train.py`` once for each seed in a folder of its own, 2.5 minutes on two quiet cores each; what
has finished there is not run again. The seed draws weights, batches and augmentation; data and attacks stay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.cli.quickstart import ROOT
from lipsim.results import read_results
from lipsim.results.formats import markdown_table
from lipsim.results.quickstart import seeds_tables

_RUN = "import sys; from lipsim.cli.quickstart import quickstart; quickstart(sys.argv[1:])"


def finished(root: Path) -> bool:
    """Whether a quickstart has come to its end there: durations are the last that it writes."""
    file = root / "results.json"
    return file.is_file() and "durations" in read_results(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the tables in Markdown."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-seeds"))
    with one_line_errors():
        options = parser.parse_args(arguments)
        roots = []
        for seed in options.seeds:
            folder = options.output / f"seed-{seed}"
            roots.append(folder / ROOT)
            if not finished(folder / ROOT):
                print(f"seed {seed}, into {folder / ROOT}", file=sys.stderr, flush=True)
                folder.mkdir(parents=True, exist_ok=True)
                # A process of its own, as a user has it: no image is rendered already.
                subprocess.run([sys.executable, "-c", _RUN, "--seed_everything", str(seed)], cwd=folder, check=True)
        for title, rows in seeds_tables(roots).items():
            print(f"{title}:\n\n{markdown_table(rows)}\n")
        seconds = [sum(read_results(root / "results.json")["durations"]["seconds"].values()) for root in roots]
        print("Minutes of each seed: " + ", ".join(f"{value / 60:.1f}" for value in seconds))


if __name__ == "__main__":
    main()
