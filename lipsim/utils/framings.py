"""How an image of any shape comes to a metric: the names, without torch, which `lipsim --help` does without."""

FRAMINGS = ("stretch", "center-crop", "pad", "tiles")
DEFAULT_GRID = 2  # tiles a side
