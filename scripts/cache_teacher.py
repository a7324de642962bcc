"""Embed a folder of images by a teacher once: ``cache_teacher.py --teacher FILE --images FOLDER --output CACHE``."""

import sys

from lipsim.cli.main import main

if __name__ == "__main__":
    main(["cache-teacher", *sys.argv[1:]])
