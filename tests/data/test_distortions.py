"""Distortions: in their units, graded, and a function of the image, the strength, the seed and the index alone."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from lipsim.data import distortions
from lipsim.data.builtin.photographs import load_photograph
from lipsim.data.distortions import DISTORTIONS, distort


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """A part of a photograph of skimage, ``(3, 32, 32)``."""
    pixels = np.asarray(load_photograph("astronaut"), dtype=np.float32)[:192:6, 120:312:6]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).clamp(0, 1).contiguous()


def _at(name: str, image: Tensor, strengths: list[float], index: int = 3, seed: int = 0) -> Tensor:
    images = image.expand(len(strengths), -1, -1, -1).clone()
    return DISTORTIONS[name](images, torch.tensor(strengths), seed=seed, index=[index] * len(strengths))


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_stronger_is_further_and_nothing_else_counts(name: str, photograph: Tensor) -> None:
    before = photograph.clone()
    for index in range(6):
        graded = _at(name, photograph, [1e-3, 0.2, 0.5, 1.0], index)
        assert graded.shape == (4, 3, 32, 32) and graded.dtype == torch.float32
        assert float(graded.min()) >= 0 and float(graded.max()) <= 1
        distance = (graded - photograph).flatten(1).norm(dim=1)
        # The weakest is next to nothing, but for the best JPEG and the one pixel that is covered.
        assert distance[0] < 0.6 * distance[1] or name in ("jpeg", "occlusion")
        assert distance[1] < distance[2] < distance[3]
    assert torch.equal(photograph, before)
    images = torch.stack([photograph, photograph.flip(1), photograph.flip(2)])
    strength, index = torch.tensor([0.9, 0.3, 0.6]), torch.tensor([7, 8, 2**40])
    family = torch.full((3,), list(DISTORTIONS).index(name))
    whole = distort(images, family, strength, seed=5, index=index)
    for i in range(3):  # bit for bit, in whatever batch
        alone = distort(images[i : i + 1], family[:1], strength[i : i + 1], seed=5, index=index[i : i + 1])
        assert torch.equal(whole[i], alone[0])
    again = distort(images, family, strength, seed=6, index=index)
    assert torch.equal(again, whole) == (name in ("blur", "jpeg"))


def test_each_image_has_its_own_family(photograph: Tensor) -> None:
    count = len(DISTORTIONS)
    images, strength, index = photograph.expand(count, -1, -1, -1), torch.full((count,), 0.5), torch.arange(count)
    family = torch.arange(count).flip(0)
    found = distort(images, family, strength, seed=0, index=index)
    for row, number in enumerate(family.tolist()):
        function = list(DISTORTIONS.values())[number]
        assert torch.equal(found[row], function(images[:1], strength[:1], seed=0, index=[row])[0])


def test_blur_is_that_of_scipy(photograph: Tensor) -> None:
    found = _at("blur", photograph, [0.8])[0].numpy()
    sigma = 0.8 * distortions.MAX_BLUR * 32
    expected = gaussian_filter(photograph.double().numpy(), (0, sigma, sigma), mode="mirror", truncate=3)
    assert np.abs(found - expected).max() < 5e-3  # the kernels end at other pixels


def test_jpeg_has_its_quality(photograph: Tensor) -> None:
    for strength, quality in ((0.0, 90), (1.0, 4)):
        found = _at("jpeg", photograph, [strength])[0]
        buffer = io.BytesIO()
        Image.fromarray((photograph * 255).round().byte().permute(1, 2, 0).numpy()).save(
            buffer, "JPEG", quality=quality
        )
        assert torch.equal(found, torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255)


def test_noise_and_occlusion_have_their_size() -> None:
    grey = torch.full((3, 100, 100), 0.5)
    assert float(_at("noise", grey, [0.4]).std()) == pytest.approx(0.4 * distortions.MAX_NOISE, rel=0.02)
    for index in range(5):
        covered = (_at("occlusion", grey, [0.4, 0.8], index) != 0.5).any(1)
        for mask, side in zip(covered, (20, 40), strict=True):
            assert abs(int(mask.sum()) - side * side) <= 2 * side + 1  # a row and a column more or less
        assert bool((covered[1] | ~covered[0]).all())


def test_warps_move_a_spot_as_far_as_they_say() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spot = torch.exp(-((rows - 31.5) ** 2 + (columns - 43.5) ** 2) / 18).expand(3, -1, -1)  # 12 right of the centre

    def centre(image: Tensor) -> tuple[float, float]:
        weight = image[0] / image[0].sum()
        return float((weight * columns).sum()) - 31.5, float((weight * rows).sum()) - 31.5

    for index in range(4):
        x, y = centre(_at("shift", spot, [0.4], index)[0])
        assert math.hypot(x - 12, y) == pytest.approx(0.4 * distortions.MAX_SHIFT * 64, abs=0.1)
        x, y = centre(_at("rotation", spot, [0.5], index)[0])
        assert abs(math.degrees(math.atan2(y, x))) == pytest.approx(15, abs=0.1)
        assert math.hypot(x, y) == pytest.approx(12, abs=0.05)
        x, y = centre(_at("zoom", spot, [0.5], index)[0])
        assert abs(math.log(x / 12)) == pytest.approx(0.5 * math.log(distortions.MAX_ZOOM), abs=0.01)
        assert abs(y) < 0.05


def test_a_picture_without_colour_has_its_brightness_changed(photograph: Tensor) -> None:
    grey = photograph.mean(0, keepdim=True).expand(3, -1, -1)
    for index in range(12):
        changed = _at("colour", grey, [0.5], index)[0]
        ratio = float(changed.mean() / grey.mean())
        assert abs(ratio - 1) > 0.1 or float((changed - grey).abs().mean()) > 0.03  # contrast keeps the mean
        assert torch.allclose(changed[0], changed[2], atol=1e-6)
