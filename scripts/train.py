"""Train: the quickstart without arguments, one stage with ``--config configs/….yaml``."""

from lipsim.cli.train import main

if __name__ == "__main__":
    main()
