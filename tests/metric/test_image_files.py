"""Certificates of image files, in Python: the pixels of each file, and what has none."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lipsim import PerceptualMetric, certificates
from lipsim.data.transforms import read_image
from lipsim.metric import certify_files, original_radii
from lipsim.students import OrthogonalProjection

SIZES = {"reference": (40, 30), "left": (16, 16), "right": (21, 33)}  # width and height


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 8), 16).eval().requires_grad_(False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in SIZES}
    for name, (width, height) in SIZES.items():
        pixels = (torch.rand(height, width, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(paths[name])
    return paths


def test_certified_as_tensors_are(metric: PerceptualMetric, files: dict[str, Path]) -> None:
    found = certify_files(metric, **files)
    expected = metric.certify(*(metric.preprocess(read_image(file))[None] for file in files.values()))
    assert found.answer == ("left" if expected.prefers_left else "right") and found.margin == float(expected.margin)
    radii = (expected.radius, expected.left_radius, expected.right_radius, expected.joint_radius)
    assert list(found.radius.values()) == [float(radius) for radius in radii] and found.pixels == int(expected.pixels)
    assert found.linf_radius == float(certificates.linf_radius(expected.radius, 3 * 16 * 16))
    assert found.original_radius is not None
    for name, (width, height) in SIZES.items():
        own = certificates.original_radius(found.radius[name], (height, width), 16)
        assert found.original_radius[name] == pytest.approx(own, rel=1e-9) and found.original_radius[name] <= own
    assert json.loads(json.dumps(found.facts()))["radius"] == found.radius
    assert max(map(len, str(found).splitlines())) <= 80


def test_swapped_candidates_swap_the_answer(metric: PerceptualMetric, files: dict[str, Path]) -> None:
    reference, left, right = files.values()
    one, other = certify_files(metric, reference, left, right), certify_files(metric, str(reference), right, left)
    assert {one.answer, other.answer} == {"left", "right"} and one.margin == pytest.approx(-other.margin, rel=1e-5)
    assert one.radius["left"] == pytest.approx(other.radius["right"], rel=1e-5)


def test_pixels_of_files(metric: PerceptualMetric, files: dict[str, Path]) -> None:
    """Gray divides by √3; the smallest counts where all change; palettes and 8-bit resizing have none."""
    pictures = {name: read_image(file) for name, file in files.items()}
    radii = {"left": 0.5, "all": 0.5}
    plain = original_radii(metric, pictures, radii)
    assert plain is not None
    own = {name: certificates.original_radius(0.5, (h, w), 16) for name, (w, h) in SIZES.items()}
    assert plain["left"] == pytest.approx(own["left"], rel=1e-9)
    assert plain["all"] == pytest.approx(min(own.values()), rel=1e-9)
    assert isinstance(pictures["left"], Image.Image)
    gray = original_radii(metric, {**pictures, "left": pictures["left"].convert("L")}, radii)
    assert gray is not None and gray["left"] == pytest.approx(own["left"] / math.sqrt(3), rel=1e-9)
    assert original_radii(metric, {**pictures, "left": pictures["left"].convert("P")}, radii) is None
    rounded = PerceptualMetric(metric.encoder, 16, lipschitz=1.0, resize="pil")
    assert original_radii(rounded, pictures, radii) is None
    certificate = certify_files(rounded, **files)
    assert certificate.original_radius is None and "none in the file's own pixels" in str(certificate)


def test_a_pipe_is_read_once(metric: PerceptualMetric, files: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(files["reference"].read_bytes()))
    writer.start()
    found = certify_files(metric, tmp_path / "pipe", files["left"], files["right"])
    writer.join()
    assert found == certify_files(metric, **files)


def test_refusals(metric: PerceptualMetric, files: dict[str, Path], tmp_path: Path) -> None:
    unbounded = PerceptualMetric(metric.encoder, 16, lipschitz=math.inf)
    with pytest.raises(ValueError, match="has no Lipschitz bound"):
        certify_files(unbounded, **files)
    with pytest.raises(FileNotFoundError, match=r"no image file .*nowhere\.png"):
        certify_files(metric, tmp_path / "nowhere.png", files["left"], files["right"])
    with pytest.raises(ValueError, match="got the folder"):
        certify_files(metric, tmp_path, files["left"], files["right"])


def test_a_reference_without_a_direction_is_a_tie(tmp_path: Path) -> None:
    """A black image through a map without bias and anchor: it is at distance 1 from both candidates."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    metric, files = PerceptualMetric(encoder, 8, anchor=0.0).eval(), []
    for name, colour in (("black", (0, 0, 0)), ("red", (200, 10, 10)), ("green", (10, 200, 10))):
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 8), colour).save(files[-1])
    found = certify_files(metric, *files)
    assert found.answer == "tie" and found.margin == 0.0 and set(found.radius.values()) == {0.0}
