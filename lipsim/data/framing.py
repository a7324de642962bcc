"""What of an image of any shape a metric sees: stretched, its centred square, padded, or in tiles."""

from __future__ import annotations

from dataclasses import dataclass

from lipsim.utils.errors import LipsimError
from lipsim.utils.framings import FRAMINGS

FILL = 0.5  # mid-gray: the darkest and the brightest border are the same distance from it


@dataclass(frozen=True)
class Frame:
    """How an image of one height and width becomes a square: a part of it, resized, with a border around it.

    Attributes:
        top: first row of the part that is seen.
        left: its first column.
        seen: height and width of this part.
        resized: height and width that it is resized to.
        border: left, right, top and bottom, pixels of :data:`FILL` around it.
    """

    top: int
    left: int
    seen: tuple[int, int]
    resized: tuple[int, int]
    border: tuple[int, int, int, int] = (0, 0, 0, 0)


def frame_of(framing: str, height: int, width: int, image_size: int) -> Frame:
    """The frame of an image of ``height`` × ``width``.

    - "stretch" and "tiles": all of it, resized to the square; the aspect ratio is not kept.
    - "center-crop": the centred square as large as the short side, resized. Where the long side has an odd number of
      pixels too many, one more is cut at the bottom or at the right.
    - "pad": all of it, the long side resized to the square and the short side to the nearest whole number of pixels
      (half a pixel up), at least 1; the rest is mid-gray, in an odd number of rows or columns one more at the end.

    Raises:
        ValueError: an unknown framing.

    Example:
        >>> frame_of("pad", 100, 200, 64).resized, frame_of("pad", 100, 200, 64).border
        ((32, 64), (0, 0, 16, 16))
        >>> frame_of("center-crop", 100, 201, 64).left
        50
    """
    square = (image_size, image_size)
    if framing in ("stretch", "tiles"):
        return Frame(0, 0, (height, width), square)
    if framing == "center-crop":
        side = min(height, width)
        return Frame((height - side) // 2, (width - side) // 2, (side, side), square)
    if framing == "pad":
        long = max(height, width)
        rows, columns = (max(1, (2 * side * image_size + long) // (2 * long)) for side in (height, width))
        top, left = (image_size - rows) // 2, (image_size - columns) // 2
        border = (left, image_size - columns - left, top, image_size - rows - top)
        return Frame(0, 0, (height, width), (rows, columns), border)
    raise LipsimError(f"expected framing to be one of {', '.join(FRAMINGS)}, got {framing!r}")
