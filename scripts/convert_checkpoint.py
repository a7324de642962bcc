"""Convert a published LipSim checkpoint: ``convert_checkpoint.py PUBLISHED.pth OUTPUT.safetensors``."""

import sys

from lipsim.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
