"""How images of any shape come to a metric: the frames, their exact norms, and radii in a file's own pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim import PerceptualMetric
from lipsim.attacks import pgd
from lipsim.data.framing import FILL, frame_of
from lipsim.data.transforms import Preprocess, to_tensor, upright_size

SIDE = 8
FRAMINGS = ("stretch", "center-crop", "pad")
SHAPES = [(9, 14), (13, 6), (8, 8), (5, 7), (8, 11)]


def _image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resize", ["float", "pil"])
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_and_border_are_those_of_the_square(shape: tuple[int, int], resize: str) -> None:
    """What is seen is resized as it would be alone, and the rest is cut off or mid-gray."""
    image, (height, width) = _image(*shape), shape
    short = min(shape)
    top, left = (height - short) // 2, (width - short) // 2
    square = image.crop((left, top, left + short, top + short))
    cropped = Preprocess(SIDE, resize, "center-crop")(image)
    assert torch.equal(cropped, Preprocess(SIDE, resize)(square))
    padded, frame = Preprocess(SIDE, resize, "pad")(image), frame_of("pad", *shape, SIDE)
    rows, columns = frame.resized
    assert max(rows, columns) == SIDE and abs(rows * width - columns * height) <= max(shape) / 2
    before, after = frame.border[::2], frame.border[1::2]
    assert all(0 <= b - a <= 1 for a, b in zip(before, after, strict=True))
    assert (before[0] + columns + after[0], before[1] + rows + after[1]) == (SIDE, SIDE)
    inside = padded[:, before[1] : SIDE - after[1], before[0] : SIDE - after[0]]
    assert inside.shape[1:] == (rows, columns) and padded.shape == (3, SIDE, SIDE)
    assert float((padded.sum() - inside.sum()).abs()) == pytest.approx(3 * FILL * (SIDE**2 - rows * columns), abs=1e-4)
    if resize == "float":
        whole = torch.nn.functional.interpolate(
            to_tensor(image)[None].double(), size=(rows, columns), mode="bicubic", antialias=True
        )
        assert (inside - whole[0].clamp(0, 1)).abs().max() <= 2**-25


@pytest.mark.parametrize("resize", ["float", "pil"])
def test_square_images_have_one_frame(resize: str) -> None:
    stretched, *others = (Preprocess(SIDE, resize, framing)(_image(13, 13)) for framing in FRAMINGS)
    assert all(torch.equal(stretched, other) for other in others)
    tiles = Preprocess(SIDE, resize, "tiles", grid=2)
    assert torch.equal(tiles(_image(13, 5)), Preprocess(SIDE, resize)(_image(13, 5)))


def test_very_long_images_keep_a_row() -> None:
    assert frame_of("pad", 1, 1000, SIDE).resized == (1, SIDE)
    assert Preprocess(SIDE, framing="pad")(_image(1000, 1)).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize(("shape", "side"), [((17, 1), 5), ((23, 2), 9), ((1, 17), 5), ((6, 7), 1), ((4, 1), 1)])
def test_narrow_images_are_resized_axis_by_axis(shape: tuple[int, int], side: int) -> None:
    """The result is one pixel wide or high; each axis has the map that its norm was computed of."""
    for preprocess in (Preprocess(side, framing="pad"), Preprocess(side, framing="center-crop"), Preprocess(side)):
        frame = preprocess.frame(*shape)
        rows, columns = (
            torch.nn.functional.interpolate(
                torch.eye(seen, dtype=torch.float64)[:, None, None], size=(1, resized), mode="bicubic", antialias=True
            ).flatten(1)
            for seen, resized in zip(frame.seen, frame.resized, strict=True)
        )
        x = to_tensor(_image(*shape)).double()
        (top, left), (height, width) = (frame.top, frame.left), frame.seen
        expected = (rows.T @ x[:, top : top + height, left : left + width] @ columns).clamp(0, 1)
        padded = torch.nn.functional.pad(expected, frame.border, value=FILL)
        assert (preprocess(_image(*shape)) - padded).abs().max() <= 2**-24


def test_turned_images() -> None:
    image = _image(9, 14)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert upright_size(image) == tuple(to_tensor(image).shape[1:]) == (14, 9)


def _jacobian(preprocess: Preprocess, shape: tuple[int, int]) -> Tensor:
    """Of one channel, ``(S², H·W)``: the images are far from the clamp."""

    def channel(values: Tensor) -> Tensor:
        return preprocess(values.expand(3, -1, -1))[0].flatten().double()

    found = torch.autograd.functional.jacobian(channel, torch.full(shape, 0.5, dtype=torch.float64))
    assert isinstance(found, Tensor)
    return found.flatten(1)


@pytest.mark.parametrize("framing", [*FRAMINGS, "tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_that_of_the_jacobian(framing: str, shape: tuple[int, int]) -> None:
    preprocess = Preprocess(SIDE, framing=framing)
    exact = float(torch.linalg.matrix_norm(_jacobian(preprocess, shape), ord=2))
    assert preprocess.norm(*shape) == pytest.approx(exact, rel=1e-6)
    assert preprocess.norm(*shape) >= exact * (1 - 1e-6)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_radii_hold_in_the_pixels_of_a_file_and_are_reached(framing: str) -> None:
    """Two linear features, whose boundary is met first by the change of the file that the framing stretches most."""
    shape, distance = (13, 18), 0.3
    preprocess = Preprocess(SIDE, framing=framing)
    out, _, into = torch.linalg.svd(_jacobian(preprocess, shape), full_matrices=False)
    seen, worst = (
        v.view(1, *size).repeat(3, 1, 1) / 3**0.5 for v, size in ((out[:, 0], (SIDE, SIDE)), (into[0], shape))
    )
    across = torch.linalg.svd(seen.flatten()[None]).Vh[1]
    linear = nn.Linear(3 * SIDE**2, 2).double()
    with torch.no_grad():
        linear.weight.copy_(torch.stack([seen.flatten(), across]))
        gray = preprocess(torch.full((3, *shape), 0.5, dtype=torch.float64)).double()
        linear.bias.copy_(torch.tensor([0.0, 1.0]) - linear.weight @ gray.flatten())
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), linear), SIDE, anchor=0.0, framing=framing).eval()
    left, right = (gray[None] + sign * seen for sign in (1, -1))
    file = 0.5 + distance * worst
    certificate = metric.certify(preprocess(file)[None].double(), left, right)
    radius = metric.preprocess.original_radius(float(certificate.radius), *shape)
    assert bool(certificate.prefers_left) and distance * (1 - 2e-5) <= radius <= distance * (1 + 1e-6)

    class Flipped:
        def __call__(self, x: Tensor) -> Tensor:
            images = torch.stack([preprocess(image) for image in x]).double()
            return metric(images, left) - metric(images, right)

        def select(self, rows: Tensor) -> Flipped:
            return self

    assert Flipped()(pgd(Flipped(), file[None], eps=radius * (1 - 1e-6), steps=30, restarts=2)) <= 0
    assert Flipped()(file[None] - distance * (1 + 1e-5) * worst) > 0


def test_described_and_refused() -> None:
    assert Preprocess(8, "pil").describe() == {"framing": "stretch", "image_size": 8, "resize": "pil"}
    assert Preprocess(8, framing="pad").describe()["fill"] == 0.5
    assert Preprocess(8, framing="tiles", grid=2).describe()["grid"] == [2, 2]
    assert repr(Preprocess(8, framing="tiles", grid=2)).endswith("framing='tiles', grid=2)")
    for options, message in (
        ({"framing": "fit"}, "expected framing to be one of stretch, center-crop, pad, tiles, got 'fit'"),
        ({"framing": "tiles", "grid": 3}, "that divides the image_size 8"),
        ({"framing": "pad", "grid": 2}, "with the framing 'pad'"),
        ({"framing": "tiles", "grid": 0}, "grid ≥ 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess(8, **options)
    with pytest.raises(ValueError, match="in 8 bits rounds"):
        Preprocess(8, "pil").original_radius(1.0, 9, 9)
