"""Embed a folder of images by a teacher once: ``cache_teacher.py --teacher FILE --images FOLDER --output CACHE``."""

from lipsim.cli.cache_teacher import main

if __name__ == "__main__":
    main()
