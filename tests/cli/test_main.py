"""`lipsim audit` and `lipsim certify`: what they print, and the faults they have to catch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim import PerceptualMetric, __version__, certificates
from lipsim.audit import UnboundedModuleError, lipschitz_bound, lower_bounds
from lipsim.cli.main import main
from lipsim.data.transforms import read_image, to_tensor
from lipsim.layers import ExplicitConv2d, OrthogonalLinear
from lipsim.metric import SmoothedMetric, files, load, save
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork
from lipsim.teachers import SmallViT

SMALL = {"image_size": 16, "out_features": 8, "linear_depth": 1, "linear_width": 8}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    encoder = OrthogonalShiftNetwork(grid=4, widths=(8,), depths=(1,), **SMALL)
    return save(PerceptualMetric(encoder, 16), tmp_path / "metric.safetensors")


def _run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code  # type: ignore[return-value]


def test_audit_prints_each_layer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("audit", checkpoint, "--samples", "2", "--steps", "5") == 0
    output = capsys.readouterr().out
    for word in ("OrthogonalPatches", "ChannelShift", "SLLLinear", "whole network", "forward error", "sound"):
        assert word in output


def test_audit_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("audit", checkpoint, "--samples", "2", "--steps", "5", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0.1 < facts["lower_bound"] <= facts["lipschitz"] <= 1 + 1e-5
    assert 0 < facts["feature_error"] < 1e-4 and facts["failures"] == []
    assert all(0 < layer["reached"] <= layer["bound"] * (1 + 1e-9) for layer in facts["layers"])


def test_audit_of_ones_own_images(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("audit", checkpoint, "--images", tmp_path) == 1
    assert "no images in" in capsys.readouterr().err
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    assert _run("audit", checkpoint, "--images", tmp_path, "--steps", "1") == 0
    assert "on these 1" in capsys.readouterr().out
    (tmp_path / "._red.png").write_bytes(b"of macOS")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert _run("audit", checkpoint, "--images", tmp_path, "--steps", "1") == 0
    found = capsys.readouterr()
    assert "on these 1" in found.out
    assert "1 broken links (first: gone.png), 1 files with other endings (first: metric.safetensors)" in found.err
    assert "1 hidden files or folders (first: ._red.png)" in found.err


def test_a_requirement_that_fails(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("audit", checkpoint, "--samples", "1", "--steps", "1", "--require", "0.9") == 1
    assert "FAILED: the bound 1.0000" in capsys.readouterr().out


def test_an_encoder_that_forgot_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16)
    torch.nn.init.zeros_(metric.encoder[2].weight)  # type: ignore[index, arg-type]
    metric.lipschitz = 1.0
    assert _run("audit", save(metric, tmp_path / "m.safetensors"), "--samples", "1", "--steps", "1") == 0
    assert "whole network" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = PerceptualMetric(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), 16, lipschitz=float("inf"))
    save(teacher, tmp_path / "teacher.safetensors")
    for args, message in (
        (["nothing.safetensors"], "no metric file"),
        ([tmp_path / "teacher.safetensors"], "no Lipschitz bound is known for SmallViT"),
        (["quickstart", "--samples", "0"], "--samples"),
    ):
        assert _run("audit", *args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_half_precision_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16)
    metric.encoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"half precision \(torch.bfloat16\).*metric\.lipschitz = math\.inf"):
        save(metric_with_bound(metric), tmp_path / "half.safetensors")
    with pytest.MonkeyPatch.context() as patch:  # a file of an earlier version
        patch.setattr(files, "_check_declared", lambda metric: None)
        save(metric_with_bound(metric), tmp_path / "half.safetensors")
    assert _run("audit", tmp_path / "half.safetensors") == 1
    assert "half precision (torch.bfloat16)" in capsys.readouterr().err


def metric_with_bound(metric: PerceptualMetric) -> PerceptualMetric:
    metric.lipschitz = 1.0
    return metric


def test_a_layer_that_declares_too_little_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forward pass scaled by 1.05 behind a bound that does not know it, and a bound that is a little too small."""
    file = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "m.safetensors")
    options = "audit", file, "--samples", "1", "--steps", "2"
    with monkeypatch.context() as patch:
        patch.setattr(OrthogonalLinear, "forward", lambda self, x: 1.05 * nn.functional.linear(x, self.weights()[0]))
        assert _run(*options) == 1
        assert "OrthogonalLinear at '2' runs another OrthogonalLinear.forward" in capsys.readouterr().err
    # By less than what the audit allows for rounding in float32; the command looks in float64.
    monkeypatch.setattr("lipsim.layers.orthogonal.matrix_norm_bound", lambda weight: 1 - 5e-5)
    assert _run(*options) == 1
    output = capsys.readouterr().out
    assert "FAILED: OrthogonalLinear at '2' reaches" in output and "FAILED: an attack reaches" in output


def test_lower_bounds_reach_known_constants() -> None:
    linear = nn.Linear(12, 12, bias=False).double()
    network = nn.Sequential(nn.Flatten(), linear)
    norm = float(torch.linalg.matrix_norm(linear.weight.detach(), ord=2))
    images = torch.rand(3, 3, 2, 2)
    assert lower_bounds.attack_lipschitz(network, images, steps=20) == pytest.approx(norm, rel=1e-3)
    assert lower_bounds.layer_norms(network, images, ["1"])["1"] == pytest.approx(norm, rel=1e-3)


def test_the_attack_beats_the_local_jacobian() -> None:
    """Slope 3 above 1 and slope 1 below: found from points where the Jacobian is 1."""

    class Kink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + 2 * torch.relu(x.flatten(1) - 1)

    kink, images = Kink(), torch.full((1, 3, 2, 2), 0.9)
    assert float(lower_bounds.jacobian_norm(kink, images.double())[0]) == pytest.approx(1.0)
    assert 2.5 < lower_bounds.attack_lipschitz(kink, images, steps=60) <= 3 + 1e-9


def test_planted_faults_show_in_the_bound() -> None:
    from orthogonium.layers.conv.adaptiveSOC import AdaptiveSOCConv2d
    from torchvision.transforms import Normalize

    unsound = AdaptiveSOCConv2d(16, 16, 3)
    with pytest.raises(UnboundedModuleError, match="FastSOC"):
        lipschitz_bound(nn.Sequential(nn.PixelUnshuffle(4), unsound), 16)
    assert lipschitz_bound(nn.Sequential(nn.Conv2d(3, 16, 1), ExplicitConv2d(unsound)), 8).layers[1].bound > 1.001
    normalised = nn.Sequential(Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), OrthogonalProjection(8, 4))
    assert lipschitz_bound(normalised, 8).total == pytest.approx(1 / 0.224, rel=1e-6)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three image files of different sizes."""
    files = []
    for name, size in (("reference", (40, 30)), ("left", (16, 16)), ("right", (21, 33))):
        pixels = (torch.rand(size[1], size[0], 3) * 255).to(torch.uint8).numpy()
        files.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def test_gray_files_have_smaller_radii_and_palettes_none(
    checkpoint: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gray, palette = tmp_path / "gray.png", tmp_path / "palette.png"
    with Image.open(pictures[1]) as picture:  # 16 × 16, not resized
        picture.convert("L").save(gray)
        picture.convert("P").save(palette)
    assert _run("certify", "--metric", checkpoint, gray, pictures[1], pictures[2], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    expected = certificates.original_radius(facts["radius"]["reference"], (16, 16), 16) / 3**0.5
    assert facts["original_radius"]["reference"] == pytest.approx(expected, rel=1e-9)
    assert _run("certify", "--metric", checkpoint, palette, pictures[1], pictures[2]) == 0
    assert "none in the file's own pixels" in capsys.readouterr().out


def test_sixteen_bits_are_certified_in_full(
    checkpoint: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Files that differ in their low bytes alone have margins of their own, and radii in their own pixels."""
    metric, facts = load(checkpoint), []
    pixels = np.random.default_rng(0).integers(0, 65536, (30, 40, 3), dtype=np.uint16)
    for name, values in (("full", pixels), ("high", pixels & 0xFF00)):
        (tmp_path / f"{name}.png").write_bytes(imagecodecs.png_encode(values))
        assert _run("certify", "--metric", checkpoint, tmp_path / f"{name}.png", *pictures[1:], "--json") == 0
        facts.append(json.loads(capsys.readouterr().out))
        x = torch.from_numpy((values / 65535).astype(np.float32)).permute(2, 0, 1)[None]
        x = nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
        y, z = (metric.preprocess(read_image(file))[None] for file in pictures[1:])
        assert facts[-1]["margin"] == pytest.approx(float(metric.certify(x, y, z).margin), abs=1e-7)
    assert abs(facts[0]["margin"] - facts[1]["margin"]) > 1e-5
    resize = certificates.resize_norm((30, 40), 16)
    found = facts[0]["original_radius"]["reference"]
    assert found == pytest.approx(facts[0]["radius"]["reference"] / resize, rel=1e-4)
    tifffile.imwrite(tmp_path / "signed.tif", pixels[..., 0].view(np.int16))
    assert _run("certify", "--metric", checkpoint, tmp_path / "signed.tif", *pictures[1:]) == 1
    error = capsys.readouterr().err
    assert "signed.tif: a TIFF of signed integers" in error and error.count("\n") == 1


def test_certify_agrees_with_the_metric(
    checkpoint: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    metric = load(checkpoint)
    expected = metric.certify(*(metric.preprocess(read_image(file)).unsqueeze(0) for file in pictures))
    assert _run("certify", "--metric", checkpoint, *pictures, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answer"] == ("left" if expected.prefers_left else "right") and facts["margin"] == expected.margin
    radii = [expected.radius, expected.left_radius, expected.right_radius, expected.joint_radius]
    assert 0 < facts["feature_error"] == metric.feature_error < 1e-4 and facts["pixels"] == expected.pixels
    assert list(facts["radius"].values()) == [float(radius) for radius in radii]
    assert facts["linf_radius"] == pytest.approx(facts["radius"]["reference"] / (3 * 16 * 16) ** 0.5)
    sizes = {"reference": (30, 40), "left": (16, 16), "right": (33, 21)}
    original = facts["original_radius"]
    for name, size in sizes.items():
        assert original[name] == pytest.approx(certificates.original_radius(facts["radius"][name], size, 16), rel=1e-9)
    joint = min(certificates.original_radius(facts["radius"]["joint"], size, 16) for size in sizes.values())
    assert original["joint"] == pytest.approx(joint, rel=1e-9)
    assert _run("certify", "--metric", checkpoint, *pictures) == 0
    output = capsys.readouterr().out
    assert f"answer: {facts['answer']}" in output and f"{original['reference']:.6g}" in output


def test_smoothing_certifies_files_of_any_metric(pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    encoder = SmallViT(image_size=16, patch_size=8, width=16, depth=1)
    file = save(PerceptualMetric(encoder, 16, lipschitz=math.inf), pictures[0].parent / "teacher.safetensors")
    options = ["--smooth", "0.2", "--samples", "40", "--selection", "10", "--alpha", "0.01"]
    assert _run("certify", "--metric", file, *pictures, *options, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    images = [load(file).preprocess(read_image(picture)).unsqueeze(0) for picture in pictures]
    expected = SmoothedMetric(load(file), 0.2, samples=40, selection=10, alpha=0.01).certify(*images)
    assert (facts["n"], facts["n0"], facts["alpha"], facts["sigma"], facts["passes"]) == (40, 10, 0.01, 0.2, 52)
    assert list(facts["counts"].values()) == expected.counts[0].tolist()
    radius = facts["radius"]["reference"]
    assert radius == float(expected.radius)
    original = certificates.original_radius(radius, (30, 40), 16)
    assert facts["original_radius"]["reference"] == pytest.approx(original, rel=1e-9)
    assert _run("certify", "--metric", file, *pictures, *options, "--moving", "all") == 0
    output = capsys.readouterr().out
    assert "all three, each: R =" in output and "holds with probability 0.99;" in output
    # With noise on all, any of them may move alone, by √3 times what each may where all do.
    options = ["--smooth", "0.01", "--samples", "40", "--moving", "all", "--json"]
    assert _run("certify", "--metric", file, *pictures, *options) == 0
    facts = json.loads(capsys.readouterr().out)
    radii, original = facts["radius"], facts["original_radius"]
    assert list(radii) == list(original) == ["reference", "left", "right", "joint"] and radii["joint"] > 0
    assert radii["reference"] == radii["left"] == radii["right"] == pytest.approx(3**0.5 * radii["joint"])
    assert _run("certify", "--metric", file, *pictures, "--smooth", "0") == 1
    assert "expected a finite sigma > 0" in capsys.readouterr().err
    assert _run("certify", "--metric", file, *pictures, "--smooth", "0.2", "--samples", "20", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["n"], facts["n0"], facts["alpha"]) == (20, 100, 0.001)  # what is not given has its default


def test_options_of_smoothing_are_not_ignored_without_it(
    checkpoint: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"moving": "all", "alpha": "0.01", "samples": "1000", "selection": "10", "seed": "0"}
    for name, value in options.items():
        assert _run("certify", "--metric", checkpoint, *pictures, f"--{name}", value) == 1
        assert f"--{name} is of randomized smoothing; give the noise with --smooth SIGMA" in capsys.readouterr().err


def test_radii_hold_in_the_pixels_of_the_file(checkpoint: Path, pictures: list[Path]) -> None:
    """A change of the file of length R never moves the resized image further than the norm allows."""
    metric = load(checkpoint)
    x = to_tensor(read_image(pictures[0]))
    resize = lambda image: torch.nn.functional.interpolate(  # noqa: E731
        image[None].double(), size=(16, 16), mode="bicubic", antialias=True
    )[0].clamp(0, 1)
    norm = certificates.resize_norm((30, 40), metric.image_size)
    for _ in range(20):
        change = torch.randn_like(x, dtype=torch.float64)
        moved = torch.linalg.vector_norm(resize(x + 0.1 * change) - resize(x))
        assert moved <= norm * 0.1 * torch.linalg.vector_norm(change)


def test_certify_of_a_tie_and_of_8_bit_resizing(
    tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16, resize="pil")
    file = save(metric, tmp_path / "pil.safetensors")
    assert _run("certify", "--metric", file, pictures[0], pictures[1], pictures[1], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answer"] == "tie" and set(facts["radius"].values()) == {0.0} and facts["original_radius"] is None
    assert _run("certify", "--metric", file, *pictures) == 0
    assert "resized in 8 bits" in capsys.readouterr().out


def test_certify_refuses_in_one_line(
    checkpoint: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = PerceptualMetric(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), 16, lipschitz=float("inf"))
    save(teacher, tmp_path / "teacher.safetensors")
    (tmp_path / "text.png").write_text("hello")
    for args, message in (
        (["--metric", tmp_path / "teacher.safetensors", *pictures], "has no Lipschitz bound"),
        (["--metric", checkpoint, "nowhere.png", *pictures[1:]], "no image file nowhere.png"),
        (["--metric", checkpoint, tmp_path / "text.png", *pictures[1:]], "cannot read the image"),
        (pictures[1:], "expected three images"),
    ):
        assert _run("certify", *args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--version") == 0
    assert capsys.readouterr().out.strip() == f"lipsim {__version__}"


def test_home_folders(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    Image.new("RGB", (20, 20)).save(checkpoint.parent / "x.png")
    x = "~/x.png"
    assert _run("certify", "--metric", f"~/{checkpoint.name}", x, x, x) == 0
    assert capsys.readouterr().out.startswith("answer: tie")
