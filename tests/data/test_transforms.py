"""Images of every mode become upright RGB in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lipsim.data.transforms import CentralCrop, Preprocess, read_image, to_tensor


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
    torch.testing.assert_close(Preprocess(19)(image), v2.Resize((19, 19), cubic)(x).clamp(0, 1), rtol=0, atol=0)
    published = v2.Compose([v2.Resize((19, 19), cubic), v2.PILToTensor()])(image) / 255
    torch.testing.assert_close(Preprocess(19, "pil")(image), published, rtol=0, atol=0)
    cropped = v2.functional.center_crop(v2.Resize(19, cubic)(x).clamp(0, 1), [17, 17])
    torch.testing.assert_close(CentralCrop(17, resize=19)(image), cropped, rtol=0, atol=0)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image file"):
        read_image(tmp_path / "missing.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for content in (data[: len(data) // 2], b"not an image"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the image"):
            read_image(tmp_path / "a.png")
