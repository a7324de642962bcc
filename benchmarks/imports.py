"""What importing this package costs above ``import torch``: ``python benchmarks/imports.py``, minutes at most.

Each row is a fresh Python; the rows take turns, and the median of each is compared with that of ``import torch`` in the
same run. The limits are 0.3 s for the import and 0.5 s for ``lipsim --help``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HELP = "from lipsim.cli.main import main\ntry: main({})\nexcept SystemExit: pass"
BASELINE = "import torch"
ROWS = {
    BASELINE: "import torch",
    "import lipsim": "import torch, lipsim",
    "lipsim.PerceptualMetric, lipsim.attacks": "import torch, lipsim; lipsim.PerceptualMetric, lipsim.attacks.pgd",
    'lipsim.load("quickstart")': "import torch, lipsim; lipsim.load('quickstart')",
    "lipsim --help": HELP.format(["--help"]),
    "lipsim certify --help": HELP.format(["certify", "--help"]),
    "lipsim audit --help": HELP.format(["audit", "--help"]),
    "lipsim verify --help": HELP.format(["verify", "--help"]),
    "import lipsim.training": "import torch, lipsim.training",
}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is started (%(default)s)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for number in range(-1, rounds):  # the first reads files from disk and is not counted
        for name, code in ROWS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    baseline = statistics.median(seconds[BASELINE])
    print("| fresh Python | seconds | above import torch |\n| --- | ---: | ---: |")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {median - baseline:+.2f} |")


if __name__ == "__main__":
    main()
