"""Decode image files without losing digits: what Pillow would cut down to eight bits a channel is read in full.

Pillow holds a colour image in eight bits a channel, whatever the file has, and says nothing. A radius "in the file's
own pixels" is then one of other pixels: a change of the digits that were dropped can turn an answer. So the header of
each file is asked for its depth; where Pillow would drop or bend values, libpng, OpenJPEG and libavif (by imagecodecs)
or tifffile read them, and what none of these can give in full is refused by name.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from lipsim.utils.errors import LipsimError

# Formats whose depth is known here from the header. Pillow opens others, some with more bits than it keeps.
FORMATS = (
    "PNG", "JPEG", "WEBP", "TIFF", "PPM", "BMP", "DIB", "GIF", "JPEG2000", "AVIF", "QOI", "TGA", "PCX", "SGI",
    "PSD",
)  # fmt: skip

# What decoders raise on bytes that are not what their headers say. Pillow's plugins unpack and index without checks;
# imagecodecs raises a RuntimeError of its own for each library.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ZeroDivisionError, RuntimeError, NotImplementedError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip

# What Pillow raises on metadata that is not EXIF, or is damaged.
_EXIF_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ZeroDivisionError, struct.error,
)  # fmt: skip

_EIGHT_BITS = ("JPEG", "MPO", "WEBP", "GIF", "QOI")  # formats that have no more; MPO is JPEG to Image.open
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: its start, and the segment with its size

_MOST_CHANNELS = 8  # of a TIFF: colours, alpha, and others that are left out

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# BMP of 16 bits a pixel; Pillow makes v·255 // (2ᵇ − 1) of each value, from which v can be told.
_FIVE_BITS = {"BGR;15": (31, 31, 31), "BGR;16": (31, 63, 31)}

# EXIF orientation → transposition of (H, W, C), flip of rows, flip of columns, in this order.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsupportedImageError(LipsimError):
    """An image whose values cannot be read in full, or have no known range."""


class ImageTooLargeError(LipsimError):
    """An image of so many pixels that decoding it would take the memory, which a small file can say it has."""


@dataclass(frozen=True, eq=False)
class DeepImage:
    """A decoded image, upright, whose channels are not of eight bits; stands where a PIL image would.

    Attributes:
        pixels: ``(H, W, C)`` unsigned integers as in the file: gray, gray and alpha, RGB, or RGB and alpha.
        maximum: full intensity of each channel, 2ᵇ − 1 for b bits.
        premultiplied: whether the colours are multiplied by alpha already.
    """

    pixels: np.ndarray
    maximum: tuple[int, ...]
    premultiplied: bool = False

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as of a PIL image."""
        return self.width, self.height

    @property
    def mode(self) -> str:
        """The channels by their name in Pillow: "L", "LA", "RGB" or "RGBA"."""
        return _MODES[self.pixels.shape[2]]

    @property
    def has_transparency_data(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    def values(self) -> np.ndarray:
        """Gray ``(H, W, 1)`` or RGB ``(H, W, 3)``, float64 in [0, 1], composited over white."""
        values: np.ndarray = self.pixels / np.array(self.maximum, dtype=np.float64)
        if not self.has_transparency_data:
            return values
        colours, alpha = values[..., :-1], values[..., -1:]
        composite: np.ndarray = np.clip((colours if self.premultiplied else alpha * colours) + (1 - alpha), 0, 1)
        return composite

    def to_pil(self) -> Image.Image:
        """RGB rounded to eight bits, for what works in eight bits."""
        rounded = np.rint(255 * self.values()).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rounded, (*rounded.shape[:2], 3))))

    def turn(self, orientation: int) -> DeepImage:
        """The image as its EXIF orientation wants it to be seen."""
        transpose, rows, columns = _TURNS.get(orientation, (False, False, False))
        pixels = self.pixels.swapaxes(0, 1) if transpose else self.pixels
        return replace(self, pixels=pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def decode(content: bytes) -> Image.Image | DeepImage:
    """Decode an image file, in full; the first image where there are several.

    Args:
        content: its bytes.

    Returns:
        A loaded PIL image where its eight bits, or fewer, are all that the file has; else the values themselves.

    Raises:
        UnsupportedImageError: they cannot be read in full, or their range is unknown.
        ImageTooLargeError: its header has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        Exception: one of :data:`DECODER_ERRORS`, where the file is damaged.
    """
    deep = _read_deep(content)
    if deep is not None:
        return deep
    with open_image(content) as image:
        image.load()
        return image


def open_image(content: bytes) -> ImageFile.ImageFile:
    """An image file whose header was read and nothing else: no pixel is decoded yet.

    As :func:`PIL.Image.open` for :data:`FORMATS`, but that one warns of what has more pixels than its limit, and
    refuses twice as many without saying how high and wide they are.

    Raises:
        ImageTooLargeError: it has more pixels than the limit.
        Exception: one of :data:`DECODER_ERRORS`, where it is damaged or of another format.
    """
    pixel_limit()  # Pillow's plugins compare with it, too
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN[name]
        try:
            accepted = accepts is None or accepts(content[:16])
            if not accepted or isinstance(accepted, str):  # a text says why a format is not supported
                continue
            image = factory(io.BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # of another format that begins alike, or damaged
        except Image.DecompressionBombError as error:  # of a frame that is larger than the header says
            raise ImageTooLargeError(f"{str(error).split(',')[0]}; {_RAISES_LIMIT}") from error
        check_pixels(image.width, image.height)
        return image
    raise UnidentifiedImageError("cannot identify image file")


def pixel_limit() -> int | None:
    """How many pixels an image may have: Pillow's own setting, which the environment variable LIPSIM_MAX_PIXELS sets.

    Raises:
        ValueError: the variable is no number.
    """
    given = os.environ.get("LIPSIM_MAX_PIXELS")
    if given:
        if not given.isdecimal() or not int(given):
            raise LipsimError(f"expected LIPSIM_MAX_PIXELS to be a number of pixels such as 200000000, got {given!r}")
        Image.MAX_IMAGE_PIXELS = int(given)
    return Image.MAX_IMAGE_PIXELS


def check_pixels(width: int, height: int, when: str = "") -> None:
    """Refuse an image before it is decoded, or resized.

    Args:
        width: in pixels.
        height: the same.
        when: it has them, for the message.

    Raises:
        ImageTooLargeError: it has more pixels than the limit.
    """
    limit = pixel_limit()
    if limit is not None and width * height > limit:
        raise ImageTooLargeError(
            f"{when}{width} × {height} = {width * height} pixels are more than the limit of {limit}; {_RAISES_LIMIT}"
        )


_RAISES_LIMIT = "LIPSIM_MAX_PIXELS=NUMBER in the environment, or PIL.Image.MAX_IMAGE_PIXELS in Python, raises it"


def read_in_full(image: Image.Image) -> Image.Image | DeepImage:
    """An image that was opened and not loaded yet, read in full; any other image as it is.

    Raises:
        UnsupportedImageError: Pillow would drop digits, and nothing else can read them, or has dropped them already.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format in _EIGHT_BITS or image.format not in FORMATS:
        return image
    if not image.tile or image.fp is None:
        if _was_cut(image):
            raise UnsupportedImageError(
                "this image was loaded by Pillow, which cuts its file down to 8 bits a channel or bends its values; "
                "give the path, or image.copy() to have it as it is"
            )
        return image
    place = image.fp.tell()
    image.fp.seek(0)
    deep = _read_deep(image.fp.read())
    image.fp.seek(place)
    if deep is None:
        return image
    if image.tell():
        raise UnsupportedImageError("expected the first image of a file of more than 8 bits a channel, got another")
    return deep


def _was_cut(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow has dropped or bent values of the file that a loaded image is from, as far as that is still there.

    The values themselves do not tell, and the file's cannot stand in for them: the image may have been changed.
    """
    try:
        return _read_deep(Path(os.fsdecode(image.filename)).read_bytes()) is not None if image.filename else False
    except UnsupportedImageError:
        return True
    except DECODER_ERRORS:
        return False  # the file has gone, or is another by now


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 where the metadata cannot be read: the picture can be good."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation wants it.

    Unlike :func:`PIL.ImageOps.exif_transpose` it writes no metadata, which fails where a tag does not fit its type: a
    turned image has none.
    """
    image.load()  # Pillow turns a TIFF itself, as it is decoded, and takes the tag off only then
    transposition = _TRANSPOSITIONS.get(orientation(image))
    if transposition is None:
        return image
    turned = image.transpose(transposition)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        turned.info.pop(key, None)
    return turned


def _read_deep(content: bytes) -> DeepImage | None:
    """The values of a file where Pillow would drop or bend some; None where it would not."""
    deep = _tiff(content) if content[:4] in _TIFF else None  # before Pillow, which does not open all of these
    if deep is not None:
        return deep
    with open_image(content) as image:
        rawmode = _rawmode(image)
        if image.format == "PNG" and content[24] == 16:
            deep = _png(content)
        elif image.format == "PNG" and content[25] == 0 and content[24] in (2, 4) and "transparency" in image.info:
            deep = _png_of_few_bits(content)
        elif image.format == "JPEG2000":
            deep = _jpeg2000(content)
        elif image.format == "AVIF":
            deep = _avif(content)
        elif image.format == "PPM":
            deep = _netpbm(content)
        elif rawmode in _FIVE_BITS:
            maximum = _FIVE_BITS[rawmode]
            deep = DeepImage(np.rint(np.asarray(image.convert("RGB")) / 255 * maximum).astype(np.uint8), maximum)
        if deep is not None:
            return deep.turn(orientation(image))
        if (image.format == "SGI" and content[3] != 1) or (image.mode != "F" and re.search(r";(12|15|16|32)", rawmode)):
            raise UnsupportedImageError(
                f"a file of the format {image.format} whose values cannot be read in full; save it as PNG"
            )
    return None


def _rawmode(image: Image.Image) -> str:
    """How the samples lie in the file, in Pillow's words."""
    for tile in getattr(image, "tile", ()):
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if args and isinstance(args[0], str):
            return args[0]
    return ""


def _png(content: bytes) -> DeepImage:
    """PNG of 16 bits a channel, the colour that a tRNS chunk declares transparent included."""
    import imagecodecs  # some shared libraries, which few files need

    pixels = _with_channels(imagecodecs.png_decode(content))
    place, transparent = 8, None
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind == b"tRNS":
            transparent = np.frombuffer(content[place + 8 : place + 8 + length], ">u2")
        elif kind == b"IDAT":
            break
        place += 12 + length
    if transparent is not None and len(transparent) == pixels.shape[2]:
        alpha = np.where((pixels == transparent).all(2, keepdims=True), 0, 65535).astype(np.uint16)
        pixels = np.concatenate([pixels, alpha], axis=2)
    return DeepImage(pixels, (65535,) * pixels.shape[2])


def _png_of_few_bits(content: bytes) -> DeepImage:
    """Gray PNG of 2 or 4 bits with a tRNS chunk, whose level Pillow looks for among those of 8 bits."""
    import imagecodecs

    pixels = _with_channels(imagecodecs.png_decode(content))
    return DeepImage(pixels, (255,) * pixels.shape[2])


def _tiff(content: bytes) -> DeepImage | None:
    """TIFF of unsigned integers of any depth up to 32, gray (either way round) or RGB; None: Pillow reads it."""
    import tifffile  # a large module, which few files need

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        check_pixels(page.imagewidth, page.imagelength)
        check_pixels(page.tilewidth, page.tilelength)  # which may be larger
        tags = {tag.code: tag.value for tag in page.tags}
        depths, kinds = set(_tuple(tags.get(258, 1))), set(_tuple(tags.get(339, 1)))
        photometric = int(tags.get(262, 0))
        if not kinds <= {1, 4}:  # 4: undefined, as good as unsigned
            kind = {2: "signed integers", 3: "floating-point numbers"}.get(
                max(kinds & {2, 3}, default=0), "other kinds"
            )
            raise UnsupportedImageError(f"a TIFF of {kind}, whose range is unknown; save it as unsigned integers")
        if depths <= {1, 2, 4, 8}:
            return None
        (bits, *others) = depths
        if others or bits > 32 or photometric not in (0, 1, 2):
            raise UnsupportedImageError(
                f"a TIFF of {sorted(depths)} bits and photometric interpretation {photometric}, expected one depth up "
                "to 32, gray or RGB; save it as PNG"
            )
        if page.imagedepth != 1 or page.samplesperpixel > _MOST_CHANNELS:
            raise UnsupportedImageError(
                f"a TIFF of {page.imagedepth} layers of {page.samplesperpixel} channels, expected one of at most "
                f"{_MOST_CHANNELS}; save it as PNG"
            )
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        inside = all(0 < start < start + count <= len(content) for start, count in parts)
        if not inside or len(parts) < math.prod(page.chunked):  # tifffile would fill what is missing with zeros
            raise LipsimError("it is truncated: strips or tiles are missing")
        pixels, axes = page.asarray(), page.axes
        if axes == "SYX":
            pixels, axes = np.moveaxis(pixels, 0, 2), "YXS"
        extra = _tuple(tags.get(338, ()))
        colours = 3 if photometric == 2 else 1
        if axes not in ("YX", "YXS") or pixels.dtype.kind != "u" or _with_channels(pixels).shape[2] < colours:
            raise UnsupportedImageError(f"a TIFF with the axes {page.axes}, expected gray or RGB; save it as PNG")
        pixels = _with_channels(pixels)
        maximum = 2**bits - 1
        alpha = next((i for i, kind in enumerate(extra) if kind in (1, 2) and colours + i < pixels.shape[2]), None)
        if photometric == 0:  # WhiteIsZero
            pixels = np.concatenate([maximum - pixels[..., :1], pixels[..., 1:]], axis=2)
        channels = [*range(colours), *([] if alpha is None else [colours + alpha])]
        deep = DeepImage(pixels[..., channels], (maximum,) * len(channels), alpha is not None and extra[alpha] == 1)
        turn = tags.get(274, 1)
        return deep.turn(int(turn) if isinstance(turn, int) else 1)


def _jpeg2000(content: bytes) -> DeepImage | None:
    """JPEG 2000 whose components are not all of eight bits; the depths are in the SIZ segment of the codestream."""
    start = content.find(_CODESTREAM)
    place = start
    while place >= 0:  # the box before it may tell another size than the codestream, and there may be several of these
        right, bottom, left, top = struct.unpack(">4I", content[place + 8 : place + 24])
        check_pixels(max(0, right - left), max(0, bottom - top))
        place = content.find(_CODESTREAM, place + 1)
    (components,) = struct.unpack(">H", content[start + 40 : start + 42])
    sizes = [tuple(content[start + 42 + 3 * i : start + 45 + 3 * i]) for i in range(components)]
    depths = {depth for depth, *_ in sizes}
    if depths == {7}:  # of bits, less one; the highest bit is set for signed ones
        return None
    boxes = content[:start]
    colour = boxes.find(b"colr")
    if colour >= 0 and boxes[colour + 4] == 1:
        (space,) = struct.unpack(">I", boxes[colour + 7 : colour + 11])
    else:
        space = 16  # a profile, or a bare codestream
    if len(depths) > 1 or max(depths) > 15 or not 1 <= components <= 4 or space not in (16, 17) or b"pclr" in boxes:
        raise UnsupportedImageError(
            "a JPEG 2000 file that is not of 8 bits, nor gray or RGB of one depth up to 16; save it as PNG"
        )
    if any(size[1:] != (1, 1) for size in sizes):
        raise UnsupportedImageError("a JPEG 2000 file of more than 8 bits with subsampled colours; save it as PNG")
    import imagecodecs

    pixels = _with_channels(imagecodecs.jpeg2k_decode(content))
    return DeepImage(pixels, (2 ** (max(depths) + 1) - 1,) * pixels.shape[2])


def _avif(content: bytes) -> DeepImage | None:
    """AVIF of 10 or 12 bits, by the flags of its codec configuration."""
    flags = [content[place.start() + 6] for place in re.finditer(rb"av1C", content)]
    if not any(flag & 0x40 for flag in flags):
        return None
    import imagecodecs

    pixels = _with_channels(imagecodecs.avif_decode(content))
    maximum = 4095 if any(flag & 0x20 for flag in flags) else 1023
    if pixels.dtype != np.uint16 or pixels.max(initial=0) > maximum:
        raise UnsupportedImageError("an AVIF file of more than 8 bits that could not be read in full; save it as PNG")
    return DeepImage(pixels, (maximum,) * pixels.shape[2])


def _netpbm(content: bytes) -> DeepImage | None:
    """PGM and PPM whose largest value is not 255, binary or plain."""
    space = rb"(?:\s|#[^\r\n]*[\r\n])+"
    header = re.match(rb"P([2356])" + space + rb"(\d+)" + space + rb"(\d+)" + space + rb"(\d+)\s", content)
    if header is None or int(header[4]) == 255:
        return None
    kind, width, height, maximum = (int(number) for number in header.groups())
    channels = 3 if kind in (3, 6) else 1
    count = height * width * channels
    if kind in (5, 6):
        pixels = np.frombuffer(content, np.uint8 if maximum < 256 else ">u2", count, header.end())
    else:
        numbers = re.sub(rb"#[^\r\n]*", b"", content[header.end() :]).split()[:count]
        pixels = np.array(numbers, dtype=np.int64)
    if len(pixels) < count or pixels.max(initial=0) > maximum or pixels.min(initial=0) < 0:
        raise LipsimError(f"expected {count} values up to {maximum}")
    return DeepImage(pixels.reshape(height, width, channels).astype(np.uint16), (maximum,) * channels)


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _tuple(value: object) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),)  # type: ignore[call-overload]
