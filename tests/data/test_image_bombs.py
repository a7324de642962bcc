"""Small files that say they have thousands of millions of pixels: refused by their header, and never decoded."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from lipsim.data.bit_depth import check_pixels, open_image
from lipsim.data.transforms import CentralCrop, load_image, read_image

SIDE = 60_000


def _saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (48, 40), "red")).save(file, kind, **options)
    return file.getvalue()


def _says(content: bytes, order: str, *, first: bool = False, less: int = 0) -> bytes:
    """A file of 48 × 40 pixels that says it has a side of :data:`SIDE`; ``order`` packs width and height."""
    numbers = (40, 48) if order.startswith("h") else (48, 40)
    own = struct.pack(order[1:], *(number - less for number in numbers))
    assert own in content
    return content.replace(own, struct.pack(order[1:], SIDE, SIDE), 1 if first else -1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _header(side: int, depth: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0))


def _png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, _chunk(b"IDAT", zlib.compress(bytes(99))), _chunk(b"IEND", b"")])


def _tiff(side: int, bits: int, *, tile: int = 0, channels: int = 1) -> bytes:
    tags = [(256, side), (257, side), (258, bits), (259, 1), (262, 1), (277, channels)]
    tags += [(322, tile), (323, tile), (324, 8), (325, 100)] if tile else [(273, 8), (278, side), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 208) + bytes(200) + struct.pack("<H", len(tags)) + entries + bytes(4)


def _webp() -> bytes:
    """Small frames on a large canvas; no other header of WebP has more than 16,383 pixels a side, either."""
    frames = _saved("WEBP", save_all=True, append_images=[Image.new("RGB", (48, 40), "blue")])
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in (48, 40))
    return frames.replace(canvas, 2 * (16_382).to_bytes(3, "little"), 1)


GRAY16 = Image.fromarray(np.full((40, 48), 3000, np.uint16))
GIF = _saved("GIF")
BOMBS = {
    "png": _png(_header(SIDE, 8)),
    "png, 16 bits": _png(_header(SIDE, 16)),
    "png, another header after": _png(_header(8, 16), _header(SIDE, 16)),
    "jpeg": _says(_saved("JPEG"), "h>HH"),
    "gif": _says(GIF, "w<HH", first=True),
    "gif, a frame": GIF[:10] + _says(GIF[10:], "w<HH"),
    "webp": _webp(),
    "bmp": _says(_saved("BMP"), "w<ii"),
    "dib": _says(_saved("DIB"), "w<ii"),
    "tga": _says(_saved("TGA"), "w<HH"),
    "pcx": _says(_saved("PCX"), "w<HH", less=1),
    "sgi": _says(_saved("SGI"), "w>HH"),
    "qoi": b"qoif" + struct.pack(">II", SIDE, SIDE) + b"\3\0" + bytes(20),
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 20_000, 20_000, 8, 3) + bytes(14),
    "ppm": b"P6 60000 60000 255\n",
    "pgm, 16 bits": b"P5 60000 60000 65535\n",
    "pgm, plain": b"P2 60000 60000 300\n1 2 3",
    "tiff": _tiff(SIDE, 8),
    "tiff, 16 bits": _tiff(SIDE, 16),
    "tiff, a tile": _tiff(16, 8, tile=SIDE),
    "tiff, a tile of 16 bits": _tiff(16, 16, tile=SIDE),
    "jpeg 2000": _says(_says(_saved("JPEG2000"), "h>II"), "w>II"),
    "jpeg 2000, another header": _says(_saved("JPEG2000"), "w>II"),
    "jpeg 2000, 16 bits": _says(_saved("JPEG2000", GRAY16), "w>II"),
}


def _decoded(*_: object, **__: object) -> None:
    pytest.fail("it was decoded")


@pytest.fixture
def _nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", _decoded)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", _decoded)
    for name in ("png_decode", "jpeg2k_decode", "avif_decode"):
        monkeypatch.setattr(imagecodecs, name, _decoded)


@pytest.mark.usefixtures("_nothing_is_decoded")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header(kind: str) -> None:
    assert len(BOMBS[kind]) < 10_000
    with pytest.raises(ValueError, match=r"cannot use the image a file: .* limit of \d+.*LIPSIM_MAX_PIXELS") as error:
        read_image("a file", BOMBS[kind])
    assert "\n" not in str(error.value)


def test_the_message_has_width_height_and_limit() -> None:
    wanted = r"60000 × 60000 = 3600000000 pixels are more than the limit of 89478485; LIPSIM_MAX_PIXELS=NUMBER"
    with pytest.raises(ValueError, match=wanted):
        read_image("a file", BOMBS["png"])


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
def test_a_line_of_pixels_is_not_enlarged(size: tuple[int, int]) -> None:
    """Its short side as long as others are, it would take 13 GB."""
    crop = CentralCrop(64, short_side=128)
    with pytest.raises(ValueError, match=r"cannot use the image a file: resized to .* 128, .* = 1064960000"):
        load_image("a file", crop, _saved("PNG", Image.new("L", size)))
    assert load_image("a file", crop, _saved("PNG", Image.new("L", (40, 30)))).shape == (3, 64, 64)


def test_channels_without_number() -> None:
    with pytest.raises(ValueError, match="a TIFF of 1 layers of 65535 channels"):
        read_image("a file", _tiff(3000, 16, channels=65_535))
    with pytest.raises(ValueError, match="cannot read the image"):  # Pillow's own limit
        read_image("a file", _tiff(3000, 8, channels=65_535))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_texts_are_not_unpacked(kind: bytes, depth: int) -> None:
    packed = zlib.compress(bytes(20_000_000))
    text = b"a\0\1\0\0\0" + packed if kind == b"iTXt" else b"a\0\0" + packed
    with pytest.raises(ValueError, match="Decompressed data too large"):
        read_image("a file", _png(_header(8, depth), _chunk(kind, text)))


def test_the_first_header_of_two_is_not_believed() -> None:
    with pytest.raises(ValueError, match="cannot read the image a file"):
        read_image("a file", _png(_header(SIDE, 16), _header(8, 16)))


def test_an_avif_that_says_it_is_small_is_read_so() -> None:
    content = _saved("AVIF", Image.new("RGB", (480, 400), "red"))
    assert read_image("a file", content.replace(struct.pack(">II", 480, 400), struct.pack(">II", 8, 8))).size == (8, 8)


def test_one_frame_of_many_is_read() -> None:
    frames = [Image.new("L", (8, 8), level) for level in range(200)]
    with open_image(_saved("GIF", frames[0], save_all=True, append_images=frames[1:])) as image:
        assert image.tell() == 0
    assert (
        np.asarray(read_image("a file", _saved("GIF", frames[0], save_all=True, append_images=frames[1:]))).max() == 0
    )


def test_the_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    image = _saved("PNG")
    assert read_image("a file", image).size == (48, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40)
    check_pixels(48, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 - 1)
    with pytest.raises(ValueError, match="48 × 40 = 1920 pixels are more than the limit of 1919"):
        read_image("a file", image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check_pixels(SIDE, SIDE)


def test_the_environment_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setenv("LIPSIM_MAX_PIXELS", "1920")
    assert read_image("a file", _saved("PNG")).size == (48, 40)
    monkeypatch.setenv("LIPSIM_MAX_PIXELS", "1919")
    with pytest.raises(ValueError, match="more than the limit of 1919"):
        read_image("a file", _saved("PNG"))
    monkeypatch.setenv("LIPSIM_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="expected LIPSIM_MAX_PIXELS to be a number of pixels"):
        read_image("a file", _saved("PNG"))
