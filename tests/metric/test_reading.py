"""Images of every kind that people hold them in come to a metric as the same pixels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.metric import reading
from lipsim.students import OrthogonalProjection
from lipsim.utils.progress import Progress


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 4), 16)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def moved(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "PIL": Image.fromarray,
    "array": lambda p: p,
    "array, channels first": lambda p: p.transpose(2, 0, 1),
    "array, mirrored twice": lambda p: p[:, ::-1].copy()[:, ::-1],
    "array of 16 bits": lambda p: p.astype(np.uint16) * 257,
    "array of floats": lambda p: p / np.float64(255),
    "array of floats, not to be written to": lambda p: np.broadcast_to(p / np.float64(255), (2, *p.shape))[0],
    "array of floats of the other byte order": lambda p: (p / 255).astype(">f8"),
    "tensor of bytes": torch.from_numpy,
    "tensor of bytes, channels first": moved,
    "tensor of 16 bits": lambda p: torch.from_numpy(p.astype(np.uint16) * 257),
    "tensor of floats": lambda p: moved(p) / 255,
    "tensor of floats, channels last": lambda p: torch.from_numpy(p) / 255,
    "opaque": lambda p: np.concatenate([p, np.full((20, 30, 1), 255, np.uint8)], 2),
    "opaque floats": lambda p: torch.cat([moved(p) / 255, torch.ones(1, 20, 30)]),
    "batch": lambda p: p[None],
    "batch of floats": lambda p: moved(p)[None] / 255,
    "list": lambda p: [p],
    "generator": lambda p: iter([Image.fromarray(p)]),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_gives_what_the_file_does(
    metric: PerceptualMetric, pixels: np.ndarray, kind: Callable[[np.ndarray], Any], tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = metric.read(tmp_path / "x.png")
    assert expected.shape == (1, 3, 16, 16) and torch.equal(expected, metric.read(str(tmp_path / "x.png")))
    torch.testing.assert_close(metric.read(kind(pixels)), expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gray_is_in_all_channels_and_transparency_over_white(metric: PerceptualMetric, dtype: Any) -> None:
    full = 1 if dtype is np.float32 else np.iinfo(dtype).max
    level = np.full((16, 16), 0.4 * full, dtype)
    for gray in (level, level[..., None], level[None], level[None, None], level[None, ..., None]):
        torch.testing.assert_close(metric.read(gray), torch.full((1, 3, 16, 16), 0.4), atol=2e-3, rtol=0)
    colour = np.stack([level, 0 * level, 0 * level, 0 * level + full // 2 if full > 1 else 0 * level + 0.5], axis=-1)
    seen = metric.read(colour.astype(dtype)).mean((0, 2, 3))
    torch.testing.assert_close(seen, torch.tensor([0.7, 0.5, 0.5]), atol=6e-3, rtol=0)


def test_a_list_of_all_kinds_is_one_batch(metric: PerceptualMetric, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.png")
    images = metric.double().read([tmp_path / "x.png", Image.fromarray(pixels), torch.rand(4, 3, 9, 9), pixels])
    assert images.shape == (7, 3, 16, 16) and images.dtype == torch.float64
    torch.testing.assert_close(images[[0, 1, 6]], images[:1].expand(3, -1, -1, -1))
    assert metric(images, images[:1]).shape == (7,)


def test_images_of_the_metrics_size_are_taken_as_they_are() -> None:
    metric = PerceptualMetric(OrthogonalProjection(4, 2), 4)
    x = torch.rand(2, 3, 4, 4)  # four channels, last? The size says that it is not so.
    assert torch.equal(metric.read(x), x)


def test_gradients_pass(metric: PerceptualMetric) -> None:
    x = torch.rand(2, 3, 20, 30, requires_grad=True)
    metric(metric.read(x), torch.rand(2, 3, 16, 16), reduction="sum").backward()
    assert x.grad is not None and (x.grad != 0).any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 40, 3), np.uint8), r"got shape \(3, 40, 3\), which may be either; metric\.preprocess"),
        (torch.rand(5, 40, 40), r"1, 3 or 4 channels, first or last, got shape \(5, 40, 40\).*x\[:, None\]"),
        (torch.rand(2, 5, 40, 40), r"got shape \(2, 5, 40, 40\)$"),
        (torch.rand(40), r"four dimensions, got shape \(40,\)"),
        (torch.rand(0, 3, 8, 8), "images with pixels"),
        (np.zeros((8, 8, 3), np.int64), "got int64; convert those of 0 to 255 to uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "got torch.int32; convert"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "got torch.complex64; convert"),
        (torch.full((3, 8, 8), 200.0), "divide 8-bit images by 255"),
        (torch.full((4, 8, 8), 200.0), "divide 8-bit images by 255"),
        (torch.full((3, 8, 8), torch.nan), "NaN"),
        ([], "empty list"),
        ({"x": 1}, "got dict"),
        (b"bytes", "got bytes"),
        (3, "a list of images: paths, PIL images, arrays or tensors; got int"),
        ([np.zeros((8, 8), np.uint8), [3]], r"images\[1\]: expected a path, .* got list"),
        ([np.zeros((8, 8), np.uint8), torch.rand(3, 8, 8) * 255], r"images\[1\]: .*divide 8-bit images by 255"),
        (os.sep, r"got the folder .*sorted\(Path\(folder\)\.glob"),
        ([Path(os.sep)], r"images\[0\]: .*got the folder"),
    ],
)
def test_what_cannot_be_read_is_named(metric: PerceptualMetric, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.read(images)


def test_missing_and_broken_files_are_named(metric: PerceptualMetric, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    good = np.zeros((8, 8), np.uint8)
    with pytest.raises(FileNotFoundError, match=rf"images\[1\]: no image file {re.escape(str(tmp_path))}.*absent"):
        metric.read([good, tmp_path / "absent.png"])
    with pytest.raises(ValueError, match=r"images\[2\]: cannot read the image .*broken\.png"):
        metric.read([good, good, tmp_path / "broken.png"])


def test_many_images_tell_how_far_they_are(
    metric: PerceptualMetric, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Progress, "__call__", lambda self, message: told.append(f"{self.enabled} {message}"))
    assert len(metric.read([pixels] * 20)) == 20
    assert len(told) == 20 and told[9].startswith("True 10 of 20 images, ")
    told.clear()
    metric.read([pixels] * (reading._MANY - 1))
    assert all(line.startswith("False") for line in told)  # of which nothing is shown
