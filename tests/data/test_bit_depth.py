"""Files of more than eight bits a channel are read digit by digit, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import PIL
import pytest
import tifffile
import torch
from PIL import Image

from lipsim.data.bit_depth import DECODER_ERRORS, DeepImage, decode, orientation, upright
from lipsim.data.transforms import Preprocess, load_image, read_image, to_rgb, to_tensor

_RNG = np.random.default_rng(0)
RGB = _RNG.integers(0, 65536, (4, 5, 3), dtype=np.uint16)
ALPHA = _RNG.integers(0, 65536, (4, 5, 1), dtype=np.uint16)
GRAY = RGB[..., :1]


def png(pixels: np.ndarray, chunks: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG file of ``(H, W, C)`` 8 or 16-bit samples, unfiltered, by the letter of the specification."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def packed_tiff(pixels: np.ndarray) -> bytes:
    """Gray pixels of 12 bits, packed, which few writers can do."""
    rows = ["".join(f"{value:012b}" for value in row) for row in pixels]
    size = -(-len(rows[0]) // 8)
    strip = b"".join(int(row.ljust(8 * size, "0"), 2).to_bytes(size, "big") for row in rows)
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg2000(pixels: np.ndarray, bits: int = 16, codec: str = "jp2") -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat=codec, bitspersample=bits))


def avif(pixels: np.ndarray, bits: int) -> bytes:
    return bytes(imagecodecs.avif_encode(pixels, level=100, bitspersample=bits))


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return values * alpha + (1 - alpha)


FULL = {
    "png rgb": (png(RGB), RGB / 65535),
    "png gray": (png(GRAY), GRAY / 65535),
    "png rgba": (png(np.concatenate([RGB, ALPHA], 2)), over_white(RGB / 65535, ALPHA / 65535)),
    "png gray alpha": (png(np.concatenate([GRAY, ALPHA], 2)), over_white(GRAY / 65535, ALPHA / 65535)),
    "png rgb, one colour transparent": (
        png(RGB, [(b"tRNS", RGB[1, 2].astype(">u2").tobytes())]),
        np.where((RGB == RGB[1, 2]).all(2, keepdims=True), 1.0, RGB / 65535),
    ),
    "png gray, one level transparent": (
        png(GRAY, [(b"tRNS", GRAY[1, 2].astype(">u2").tobytes())]),
        np.where(GRAY[1, 2] == GRAY, 1.0, GRAY / 65535),
    ),
    "tiff rgb": (tiff(RGB, photometric="rgb"), RGB / 65535),
    "tiff big endian": (tiff(RGB, photometric="rgb", byteorder=">"), RGB / 65535),
    "tiff lzw": (tiff(RGB, photometric="rgb", compression="lzw", predictor=True), RGB / 65535),
    "tiff planes": (tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB / 65535),
    "tiff gray": (tiff(GRAY[..., 0], photometric="minisblack"), GRAY / 65535),
    "tiff white is zero": (tiff(GRAY[..., 0], photometric="miniswhite"), 1 - GRAY / 65535),
    "tiff white is zero, big endian": (tiff(GRAY[..., 0], photometric="miniswhite", byteorder=">"), 1 - GRAY / 65535),
    "tiff 32 bits": (tiff(GRAY[..., 0] * np.uint32(65537), photometric="minisblack"), GRAY / 65535),
    "tiff 12 bits": (packed_tiff(GRAY[..., 0] >> 4), (GRAY >> 4) / 4095),
    "tiff alpha": (
        tiff(np.concatenate([RGB, ALPHA], 2), photometric="rgb", extrasamples=["unassalpha"]),
        over_white(RGB / 65535, ALPHA / 65535),
    ),
    "tiff premultiplied": (
        tiff(np.concatenate([np.minimum(RGB, ALPHA), ALPHA], 2), photometric="rgb", extrasamples=["assocalpha"]),
        np.minimum(RGB, ALPHA) / 65535 + 1 - ALPHA / 65535,
    ),
    "tiff upside down": (tiff(RGB, photometric="rgb", extratags=[(274, 3, 1, 4, True)]), RGB[::-1] / 65535),
    "jpeg 2000 rgb": (jpeg2000(RGB), RGB / 65535),
    "jpeg 2000 rgb, codestream": (jpeg2000(RGB, codec="j2k"), RGB / 65535),
    "jpeg 2000 gray": (jpeg2000(GRAY[..., 0]), GRAY / 65535),
    "jpeg 2000 10 bits": (jpeg2000(RGB >> 6, 10), (RGB >> 6) / 1023),
    "avif 10 bits": (avif(RGB >> 6, 10), (RGB >> 6) / 1023),
    "avif 12 bits": (avif(RGB >> 4, 12), (RGB >> 4) / 4095),
    "avif gray": (avif(GRAY[..., 0] >> 6, 10), (GRAY >> 6) / 1023),
    "ppm": (b"P6 # a comment\n5 4\n65535\n" + RGB.astype(">u2").tobytes(), RGB / 65535),
    "ppm of 101 levels": (b"P6\n5 4 100\n" + (RGB % 101).astype(np.uint8).tobytes(), (RGB % 101) / 100),
    "pgm": (b"P5\n5 4\n1023\n" + (GRAY >> 6).astype(">u2").tobytes(), (GRAY >> 6) / 1023),
    "plain ppm": (b"P3\n5 4\n65535\n" + " ".join(map(str, RGB.flatten())).encode() + b" # end\n", RGB / 65535),
}


@pytest.mark.parametrize("name", FULL)
def test_every_digit_is_read(name: str) -> None:
    content, expected = FULL[name]
    picture = decode(content)
    assert isinstance(picture, DeepImage) and picture.size == (5, 4)
    np.testing.assert_allclose(picture.values(), expected, rtol=0, atol=1e-15)
    tensor = torch.from_numpy(np.broadcast_to(expected, (4, 5, 3)).copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(to_tensor(picture), tensor, rtol=0, atol=1e-7)
    assert picture.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[picture.pixels.shape[2]]
    torch.testing.assert_close(to_tensor(picture.to_pil()), tensor, rtol=0, atol=0.5001 / 255)


def bmp16(values: np.ndarray, masks: tuple[int, int, int]) -> bytes:
    """A BMP of 16 bits a pixel with the given bit fields, ``(H, W)`` samples of an even width."""
    data = values[::-1].astype("<u2").tobytes()
    header = struct.pack(
        "<IiiHHIIiiII3I", 40, values.shape[1], values.shape[0], 1, 16, 3, len(data), 0, 0, 0, 0, *masks
    )
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


@pytest.mark.parametrize(
    ("masks", "shifts", "maximum"),
    [
        ((0x7C00, 0x03E0, 0x1F), (10, 5, 0), (31, 31, 31)),
        ((0xF800, 0x07E0, 0x1F), (11, 5, 0), (31, 63, 31)),
    ],
)
def test_five_and_six_bits_are_not_bent(masks: tuple, shifts: tuple, maximum: tuple) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256) & sum(masks)
    picture = decode(bmp16(values, masks))
    expected = np.stack([(values >> shift) & top for shift, top in zip(shifts, maximum, strict=True)], axis=2)
    assert isinstance(picture, DeepImage) and picture.maximum == maximum
    np.testing.assert_array_equal(picture.pixels, expected)


EIGHT = (RGB >> 8).astype(np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        png(EIGHT),
        tiff(EIGHT, photometric="rgb"),
        jpeg2000(EIGHT, 8),
        avif(EIGHT, 8),
        b"P6 5 4 255\n" + EIGHT.tobytes(),
    ],
    ids=["png", "tiff", "jpeg 2000", "avif", "ppm"],
)
def test_eight_bits_stay_with_pillow(content: bytes) -> None:
    picture = decode(content)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), EIGHT)


def test_white_is_zero_in_eight_bits() -> None:
    picture = to_tensor(decode(tiff(EIGHT[..., 0], photometric="miniswhite")))
    np.testing.assert_allclose(picture[0].numpy(), 1 - EIGHT[..., 0] / 255, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tiff(GRAY[..., 0].view(np.int16), photometric="minisblack"),
            "TIFF of signed integers, whose",
        ),
        (tiff(GRAY[..., 0].astype(np.int32), photometric="minisblack"), "TIFF of signed integers"),
        (tiff(EIGHT[..., 0].view(np.int8), photometric="minisblack"), "TIFF of signed integers"),
        (tiff(RGB.astype(np.float32), photometric="rgb"), "TIFF of floating-point numbers"),
        (tiff(GRAY[..., 0].astype(np.uint64), photometric="minisblack"), r"TIFF of \[64\] bits"),
        (tiff(np.concatenate([RGB, ALPHA], 2), photometric="separated"), "photometric interpretation 5"),
        (jpeg2000(RGB.view(np.int16)), "JPEG 2000 file that is not of 8 bits"),
        (struct.pack(">HBBHHHH", 474, 0, 2, 3, 5, 4, 3).ljust(512, b"\0") + RGB.tobytes(), "SGI"),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.5, 7.0), "floating-point"),
    ],
    ids=["int16", "int32", "int8", "float", "uint64", "cmyk", "jpeg 2000 signed", "sgi", "pfm"],
)
def test_what_has_no_known_range_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "deep.bin"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot use the image .*deep\.bin: .*{message}"):
        load_image(file, to_tensor)


def test_a_format_of_unknown_depth_is_refused(tmp_path: Path) -> None:
    Image.fromarray(EIGHT).save(tmp_path / "a.ico", sizes=[(4, 4)])
    with pytest.raises(ValueError, match=r"a\.ico .*of none of the formats PNG, JPEG"):
        read_image(tmp_path / "a.ico")


def test_integers_in_memory_are_not_clipped() -> None:
    good = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert to_tensor(good)[0].tolist() == [[0.0, 1.0]]
    for values in ([[-1, 5]], [[0, 65536]]):
        with pytest.raises(ValueError, match="expected gray values of 16 bits"):
            to_tensor(Image.fromarray(np.array(values, dtype=np.int32)))


@pytest.mark.parametrize("name", ["png rgb", "tiff rgb", "avif 10 bits", "jpeg 2000 rgb", "ppm"])
def test_a_file_opened_by_pillow_is_read_in_full(name: str, tmp_path: Path) -> None:
    """``metric.preprocess(Image.open(file))`` is what everybody writes."""
    content, expected = FULL[name]
    (tmp_path / "image").write_bytes(content)
    with Image.open(tmp_path / "image") as image:
        again = Preprocess(4)(read_image(tmp_path / "image"))
        torch.testing.assert_close(Preprocess(4)(image), again, rtol=0, atol=0)
        np.testing.assert_allclose(to_tensor(image).permute(1, 2, 0).numpy(), expected, atol=1e-7)
        image.load()  # still possible, in eight bits
        assert image.size == (5, 4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientations_are_those_of_pillow(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    eight = Image.open(io.BytesIO(png(EIGHT, [(b"eXIf", exif.tobytes()[6:])])))
    expected = np.asarray(eight.transpose(_TRANSPOSE[turn]) if turn > 1 else eight)
    assert orientation(eight) == turn
    np.testing.assert_array_equal(np.asarray(upright(eight)), expected)
    assert orientation(upright(eight)) == 1
    deep = decode(png(EIGHT.astype(np.uint16) * 257, [(b"eXIf", exif.tobytes()[6:])]))
    assert isinstance(deep, DeepImage)
    np.testing.assert_array_equal(deep.pixels, expected.astype(np.uint16) * 257)
    for resize in ("float", "pil"):  # turned once, and not again after a conversion
        torch.testing.assert_close(
            Preprocess(20, resize)(eight), Preprocess(20, resize)(Image.fromarray(expected)), rtol=0, atol=0
        )


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_with(entries: Sequence[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """EXIF of one directory: tag, type, count, four bytes of value or offset, as they are given."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return (
        head + b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4) + bytes(64)
    )


ODD_EXIF = {
    "no EXIF": (b"this is not EXIF at all", 1),
    "empty": (b"", 1),
    "cut": (exif_with([(0x0112, 3, 1, b"\x06\0\0\0")])[:12], 1),
    "rational for text": (exif_with([(0x0112, 3, 1, b"\x06\0\0\0"), (0x0131, 5, 1, b"\x26\0\0\0")]), 6),
    "oversized": (
        exif_with([(0x010F, 2, 0x7FFFFFFF, b"\x26\0\0\0"), (0x0112, 3, 1, b"\x06\0\0\0")]),
        6 if int(PIL.__version__.split(".")[0]) >= 13 else 1,  # before, Pillow stopped reading there
    ),
    "text for a number": (exif_with([(0x0112, 2, 4, b"six\0")]), 1),
    "rational for a number": (exif_with([(0x0112, 5, 1, b"\x1a\0\0\0")]), 1),
    "out of range": (exif_with([(0x0112, 3, 1, b"\x63\0\0\0")]), 1),
    "unknown type": (exif_with([(0x0112, 99, 1, b"\x06\0\0\0")]), 1),
}


@pytest.mark.filterwarnings("ignore:.*(EXIF|Metadata Warning|Truncated File|Tag data larger)")
@pytest.mark.parametrize("name", ODD_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "deep"])
def test_odd_metadata_does_not_spoil_a_picture(name: str, kind: str, tmp_path: Path) -> None:
    exif, turn = ODD_EXIF[name]
    file = tmp_path / "odd.image"
    if kind == "deep":
        file.write_bytes(png(RGB, [(b"eXIf", exif)]))
    else:
        Image.fromarray(EIGHT).save(
            file, kind, exif=b"Exif\0\0" + exif, **({"lossless": True} if kind == "WEBP" else {})
        )
    found = load_image(file, to_tensor)
    assert found.shape == ((3, 5, 4) if turn == 6 else (3, 4, 5))
    if kind != "JPEG":
        pixels = RGB / 65535 if kind == "deep" else EIGHT / 255
        expected = np.rot90(pixels, -1) if turn == 6 else pixels
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_cut_files_are_refused(name: str) -> None:
    """A decoder that fills the rest with something says nothing about the image."""
    content, _ = FULL[name]
    for kept in (0.6, 0.8):
        with pytest.raises(ValueError, match="cut"):
            load_image("cut.image", to_tensor, content[: int(kept * len(content))])


def test_missing_strips_are_not_black() -> None:
    whole = tiff(RGB, photometric="rgb", rowsperstrip=1)
    assert isinstance(decode(whole), DeepImage)
    with pytest.raises(ValueError, match="strips or tiles are missing"):
        decode(whole[:-1])
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        tag = file.pages.first.tags["ImageLength"]
    taller = whole[: tag.valueoffset] + struct.pack("<I", 5) + whole[tag.valueoffset + 4 :]
    with pytest.raises(ValueError, match="strips or tiles are missing"):
        decode(taller)


@pytest.mark.parametrize(("bits", "level"), [(1, 1), (2, 1), (4, 3), (8, 85)])
def test_a_transparent_level_of_few_bits_is_that_of_the_file(bits: int, level: int, tmp_path: Path) -> None:
    """Of a gray PNG, tRNS names a sample as it is stored, not as it is spread over eight bits."""
    largest = 2**bits - 1
    levels = np.arange(4) * 85 if bits == 8 else np.arange(min(4, largest + 1))
    row = int("".join(f"{value:0{bits}b}" for value in levels).ljust(8, "0"), 2)
    data = bytes([0]) + row.to_bytes(max(1, len(levels) * bits // 8), "big")
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", len(levels), 1, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", struct.pack(">H", level)), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    for kind, body in parts:
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    found = load_image(tmp_path / "few.png", to_tensor, content)[0, 0]
    expected = torch.tensor([1.0 if value == level else value / largest for value in levels.tolist()])
    assert torch.allclose(found, expected)
    assert np.allclose(np.asarray(to_rgb(read_image(tmp_path / "few.png", content)))[0, :, 1] / 255, expected)


def test_files_of_a_few_bytes_are_of_no_format(tmp_path: Path) -> None:
    for length in range(1, 20):
        with pytest.raises(ValueError, match=r"cannot read the image .*x\.png \(of none of the formats"):
            read_image(tmp_path / "x.png", b"x" * length)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_fail_in_one_way(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed, a file is read or refused by name, never by another exception."""
    rng = np.random.default_rng(0)
    file = tmp_path / "damaged.image"
    refused = 0
    for content, _ in FULL.values():
        for _ in range(12):
            damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))] if rng.random() < 0.5 else content)
            damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
            try:
                load_image(file, to_tensor, bytes(damaged))
            except ValueError as error:
                assert "damaged.image" in str(error)
                refused += 1
    assert refused > 100 and issubclass(ValueError, DECODER_ERRORS)


def test_an_image_that_pillow_has_cut_is_refused(tmp_path: Path) -> None:
    """Once loaded, the digits are gone, or the values bent, and nothing about the image says so."""
    files = {"rgb.png": png(RGB), "white.tif": tiff(GRAY[..., 0], photometric="miniswhite"), "8.png": png(RGB >> 8)}
    (tmp_path / "8.png").write_bytes(png((RGB >> 8).astype(np.uint8)))
    for name in ("rgb.png", "white.tif"):
        (tmp_path / name).write_bytes(files[name])
        with Image.open(tmp_path / name) as image:
            image.load()
            with pytest.raises(ValueError, match=r"loaded by Pillow.*give the path, or image\.copy\(\)"):
                Preprocess(4)(image)
            assert Preprocess(4)(image.copy()).shape == (3, 4, 4)
    with Image.open(tmp_path / "8.png") as image:
        image.load()
        assert torch.equal(Preprocess(4)(image), Preprocess(4)(tmp_path / "8.png"))
