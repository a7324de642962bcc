"""Certify and attack a metric: ``evaluate.py --config configs/evaluate/builtin.yaml --checkpoint FILE``."""

from lipsim.cli.evaluate import main

if __name__ == "__main__":
    main()
