"""Images of every mode become upright RGB in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from lipsim.certificates import resize_norm
from lipsim.data.transforms import CentralCrop, Preprocess, read_image, to_tensor, upright_size


def test_modes() -> None:
    gray16 = Image.fromarray(np.array([[0, 65535], [32768, 1]], dtype=np.uint16))
    tensor = to_tensor(gray16)
    assert tensor.shape == (3, 2, 2)
    torch.testing.assert_close(tensor[0], torch.tensor([[0, 1], [32768 / 65535, 1 / 65535]]))
    half_red = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    torch.testing.assert_close(
        to_tensor(half_red).flatten(), torch.tensor([1, 127 / 255, 127 / 255]), atol=4e-3, rtol=0
    )
    for mode in ("L", "LA", "P", "1", "CMYK", "YCbCr"):
        assert to_tensor(Image.new(mode, (3, 2))).shape == (3, 2, 3)
    with pytest.raises(ValueError, match="floating-point"):
        to_tensor(Image.new("F", (2, 2)))


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert to_tensor(image).shape == (3, 3, 2)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["tiff", "png", "jpeg", "webp"])
def test_a_file_opened_by_pillow_is_turned_once(kind: str, turn: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as opened:
        expected = (20, 12) if turn >= 5 else (12, 20)
        assert upright_size(opened) == expected
    with Image.open(path) as opened:
        turned = to_tensor(opened)
    assert turned.shape[1:] == expected and torch.equal(turned, to_tensor(read_image(path)))
    if kind in ("tiff", "png"):  # which keep the values
        with Image.open(path) as opened:
            seen = ImageOps.exif_transpose(opened)
            assert torch.equal(turned, to_tensor(Image.fromarray(np.asarray(seen))))


@pytest.mark.parametrize("resize", ["float", "pil"])
def test_preprocess(resize: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    x = Preprocess(16, resize)(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(x, Preprocess(16, "pil")(image), atol=0.02, rtol=0)
    same = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    torch.testing.assert_close(Preprocess(16, resize)(same), to_tensor(same), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="float, pil"):
        Preprocess(16, "nearest")


@pytest.mark.parametrize("size", [(64, 43), (43, 64), (40, 30), (20, 33), (9, 10)])  # 64 × 43: 28.57 to 28, not 29
def test_resizes_are_those_of_torchvision(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    x, cubic = to_tensor(image), v2.InterpolationMode.BICUBIC
    torch.testing.assert_close(Preprocess(19)(image), v2.Resize((19, 19), cubic)(x).clamp(0, 1), rtol=0, atol=1e-6)
    published = v2.Compose([v2.Resize((19, 19), cubic), v2.PILToTensor()])(image) / 255
    torch.testing.assert_close(Preprocess(19, "pil")(image), published, rtol=0, atol=0)
    cropped = v2.functional.center_crop(v2.Resize(19, cubic)(x).clamp(0, 1), [17, 17])
    torch.testing.assert_close(CentralCrop(17, short_side=19)(image), cropped, rtol=0, atol=0)


def _worst(size: int, target: int) -> Tensor:
    """The direction that a resize of one axis stretches most, by an SVD."""
    basis = torch.eye(size, dtype=torch.float64)[:, None, None]
    matrix = F.interpolate(basis, size=(1, target), mode="bicubic", antialias=True).flatten(1).T
    return torch.linalg.svd(matrix).Vh[0]


@pytest.mark.parametrize("size", [(61, 47), (16, 40), (20, 20)])
def test_the_resize_is_the_exact_one_but_for_rounding(size: tuple[int, int]) -> None:
    """Its growth in the worst direction is at most its norm and the rounding, which of float32 it is not."""
    preprocess, target = Preprocess(16), 16
    x = 0.25 + 0.5 * torch.rand(3, *size)
    exact = F.interpolate(x.double()[None], size=(16, 16), mode="bicubic", antialias=True)[0]
    assert (preprocess(x).double() - exact).abs().max() <= 2**-25
    direction = _worst(size[0], target)[:, None] * _worst(size[1], target)
    delta = (0.2 * direction / direction.abs().max()).expand(3, -1, -1)
    moved = (x.double() + delta).float()
    moved_by = (moved.double() - x.double()).norm()
    grown = (preprocess(moved).double() - preprocess(x).double()).norm()
    norm = resize_norm(size, 16)
    assert norm * moved_by * (1 - 1e-6) <= grown <= norm * moved_by + 2 * 2**-25 * (3 * 16 * 16) ** 0.5


def test_preprocess_takes_paths_arrays_and_tensors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for resize in ("float", "pil"):
        preprocess = Preprocess(16, resize)
        expected = preprocess(Image.fromarray(pixels))
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), pixels):
            assert torch.equal(preprocess(image), expected)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(Preprocess(16)(tensor), Preprocess(16)(pixels))
    assert Preprocess(16)(pixels[:, :, 0]).shape == (3, 16, 16)
    for image, message in (
        (tensor * 255, "divide 8-bit images by 255"),
        (tensor * 2 - 1, r"\(x \+ 1\) / 2"),
        (torch.from_numpy(pixels).permute(2, 0, 1), "divide 8-bit images by 255"),
        (tensor.permute(1, 2, 0), "channels come first"),
        (tensor[None], "one image"),
        (pixels / 255.0, "expected a uint8 array"),
        (pixels[:, :, :2], "expected a uint8 array"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess(16)(image)
    with pytest.raises(ValueError, match="works in 8 bits"):
        Preprocess(16, "pil")(tensor)
    with pytest.raises(FileNotFoundError, match="no image file"):
        Preprocess(16)(tmp_path / "b.png")
    with pytest.raises(ValueError, match="image_size"):
        Preprocess(16.0)  # type: ignore[arg-type]


def test_what_is_no_image_is_told_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(16)
    for thing in (None, [], b"bytes", [tmp_path / "a.png"]):
        with pytest.raises(ValueError, match=rf"expected one image.*got {type(thing).__name__}"):
            preprocess(thing)
    with pytest.raises(ValueError, match="got the folder"):
        preprocess(tmp_path)
    with pytest.raises(ValueError, match="expected a uint8 array"):
        preprocess(np.zeros((0, 0, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="with pixels"):
        preprocess(torch.zeros(3, 0, 0))
    with pytest.raises(ValueError, match=r"images \[0\] of the batch have NaN"):
        preprocess(torch.full((3, 4, 4), torch.nan))
    Image.new("RGB", (5, 5), "red").save(tmp_path / "red.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(preprocess("~/red.png"), preprocess(tmp_path / "red.png"))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image file"):
        read_image(tmp_path / "missing.png")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"cannot read the image .*empty.jpg \(EOFError: the file is empty\); replace"):
        read_image(tmp_path / "empty.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for content in (data[: len(data) // 2], b"not an image"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the image"):
            read_image(tmp_path / "a.png")


def test_crops_of_one_frame_may_have_another_size() -> None:
    crop = CentralCrop(64, 64)
    assert crop.frames_as(CentralCrop(224, 224)) and CentralCrop(224, 256).frames_as(CentralCrop(56, 64))
    assert CentralCrop(64).frames_as(CentralCrop(64))
    for other in (CentralCrop(64), CentralCrop(64, 72), CentralCrop(224, 256)):
        assert not crop.frames_as(other) and not other.frames_as(crop)
    assert not CentralCrop(64).frames_as(CentralCrop(224))
