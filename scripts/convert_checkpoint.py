"""Convert a published LipSim checkpoint: ``convert_checkpoint.py PUBLISHED.pth OUTPUT.safetensors``."""

from lipsim.cli.convert import main

if __name__ == "__main__":
    main()
