"""The metric of tiles: the mean of the distances of tiles, its certificates, its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lipsim
from lipsim import PerceptualMetric, certificates
from lipsim.attacks import TwoAFCObjective, minimal_norm, pgd
from lipsim.audit import lipschitz_bound
from lipsim.audit.lower_bounds import attack_lipschitz
from lipsim.cli.main import main
from lipsim.layers import exact_copy
from lipsim.metric import TiledMetric, certify_files, original_radii, save
from lipsim.metric.pairs import pair_geometry
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT

SIDE = 8


def _tiled(anchor: float = 1.0, grid: int = 2) -> TiledMetric:
    tile = PerceptualMetric(OrthogonalProjection(SIDE, 6), SIDE, anchor=anchor).eval().requires_grad_(False)
    return TiledMetric(tile.frozen_copy(torch.float64), grid)


def _triplet(grid: int = 2, count: int = 2) -> list[Tensor]:
    base = torch.rand(count, 3, grid * SIDE, grid * SIDE, dtype=torch.float64)
    return [(base + 0.3 * torch.randn_like(base)).clamp(0, 1) for _ in range(3)]


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_the_distance_is_the_mean_over_the_tiles(anchor: float) -> None:
    metric = _tiled(anchor, grid=3)
    x, y, z = _triplet(3)
    cut = [(slice(r, r + SIDE), slice(c, c + SIDE)) for r in (0, 8, 16) for c in (0, 8, 16)]
    expected = torch.stack([metric.tile(x[..., r, c], y[..., r, c]) for r, c in cut]).mean(0)
    torch.testing.assert_close(metric(x, y), expected, rtol=1e-12, atol=1e-14)
    certificate = metric.certify(x, y, z)
    torch.testing.assert_close(certificate.margin, metric(x, z) - metric(x, y), rtol=1e-10, atol=1e-13)
    assert metric.image_size == 24 and metric.preprocess(Image.new("RGB", (50, 30))).shape == (3, 24, 24)


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_the_features_grow_no_faster_than_those_of_a_tile(anchor: float) -> None:
    metric = _tiled(anchor)
    report = lipschitz_bound(metric.encoder, metric.image_size)
    assert report.total == metric.lipschitz == metric.tile.lipschitz
    images = torch.cat(_triplet())
    assert 0.5 < attack_lipschitz(metric.encoder, images) <= metric.lipschitz * (1 + 1e-9)
    x, y = torch.rand(2, 200, 3, 16, 16, dtype=torch.float64)
    y[100:] = x[100:] + 1e-3 * torch.randn_like(x[100:])
    growth = (metric.embed(x) - metric.embed(y.clamp(0, 1))).norm(dim=1) / (x - y.clamp(0, 1)).flatten(1).norm(dim=1)
    assert growth.max() <= metric.lipschitz


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_attacks_on_pixels_do_not_break_the_certificates(anchor: float) -> None:
    """Of a linear encoder, which reaches its bound: those of ``certify``, of the features, and of distances."""
    metric = _tiled(anchor)
    images = _triplet()
    certificate = metric.certify(*images)
    weaker = PerceptualMetric.certify(metric, *images)  # what follows from the features alone
    assert torch.equal(certificate.prefers_left, weaker.prefers_left)
    for name in ("radius", "left_radius", "right_radius", "joint_radius"):
        assert (getattr(certificate, name) >= getattr(weaker, name)).all() and (getattr(weaker, name) > 0).all(), name
    for target, radius in (
        ("reference", certificate.radius),
        ("left", certificate.left_radius),
        ("right", certificate.right_radius),
        ("all", certificate.joint_radius),
    ):
        objective = TwoAFCObjective(metric, *images, target=target)  # type: ignore[arg-type]
        parts = objective.parts
        found = minimal_norm(objective, objective.images, steps=25, polish=25, box=None, parts=parts)
        change = (found - objective.images).unflatten(1, (parts, 3)).flatten(2).norm(dim=-1).amax(1)
        broken = objective(found) > 0
        assert broken.all() and (change >= radius * (1 - 1e-9)).all(), target
        if target != "all" and not anchor:
            assert (change / radius).median() < 1.01, target
    x, y, _ = images
    eps = 0.5 * float(certificate.radius.min())
    lower, upper = metric.distance_bounds(x, y, eps)
    weak_lower, weak_upper = PerceptualMetric.distance_bounds(metric, x, y, eps)
    assert (lower >= weak_lower).all() and (upper <= weak_upper).all()
    threshold = 0.5 * float(metric(x, y).min() + metric(x, y).max())
    radius = metric.threshold_radius(x, y, threshold)
    features = certificates.threshold_radius(metric.embed(x), metric.embed(y), threshold, **metric.certificate_options)
    assert (radius >= features).all() and radius.max() > 0
    apart = lipsim.attacks.DistanceObjective(metric, y, increase=True)
    together = lipsim.attacks.DistanceObjective(metric, y, increase=False)
    assert (metric(pgd(apart, x, eps=eps, steps=30), y) <= upper).all()
    assert (metric(pgd(together, x, eps=eps, steps=30), y) >= lower).all()


def test_a_linear_encoder_reaches_the_radius() -> None:
    """Two features a tile, the same in every tile, without an anchor: a closed form, and the change that reaches it."""
    angle, length = 0.3, 0.2  # of the features of the reference, between two candidates at ±45°
    linear = nn.Linear(3 * SIDE**2, 2).double().requires_grad_(False)
    linear.weight.copy_(torch.linalg.qr(torch.randn(3 * SIDE**2, 2, dtype=torch.float64)).Q.T)
    linear.bias.copy_(-linear.weight.sum(1) / 2)  # gray is 0
    metric = TiledMetric(PerceptualMetric(nn.Sequential(nn.Flatten(), linear), SIDE, anchor=0.0, lipschitz=1.0).eval())

    def image(*angles: float) -> Tensor:
        points = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64) * length
        tiles = 0.5 + (points @ linear.weight).view(2, 2, 3, SIDE, SIDE)
        return tiles.permute(2, 0, 3, 1, 4).reshape(1, 3, 16, 16)

    left, right = image(*[math.pi / 4] * 4), image(*[-math.pi / 4] * 4)
    certificate = metric.certify(image(*[angle] * 4), left, right)
    # Turning every tile by the angle takes √4 of what one needs; turning fewer further does not pay.
    assert float(certificate.radius) == pytest.approx(2 * length * math.sin(angle), rel=1e-6)
    at = image(*[-1e-6] * 4)
    assert metric(at, right) < metric(at, left)


def test_file_round_trip(tmp_path: Path) -> None:
    metric = TiledMetric(PerceptualMetric(OrthogonalProjection(SIDE, 6), SIDE, resize="pil").eval(), 3)
    file = save(metric, tmp_path / "tiles.safetensors")
    loaded = lipsim.load(file)
    assert isinstance(loaded, TiledMetric) and loaded.grid == 3 and not loaded.training
    assert loaded.preprocess.describe() == {"framing": "tiles", "image_size": 24, "resize": "pil", "grid": [3, 3]}
    x, y = torch.rand(2, 2, 3, 24, 24)
    torch.testing.assert_close(loaded(x, y), metric(x, y), rtol=1e-6, atol=1e-8)
    assert loaded.lipschitz == metric.lipschitz and loaded.feature_error_kind == "searched" and loaded.feature_error > 0
    finer = lipsim.load(file, grid=2)
    assert isinstance(finer, TiledMetric) and finer.image_size == 16
    padded = lipsim.load(file, framing="pad")
    assert type(padded) is PerceptualMetric and padded.preprocess.framing == "pad"
    again = lipsim.load(save(padded, tmp_path / "pad.safetensors"))
    assert again.preprocess.framing == "pad" and again.frozen_copy().preprocess.framing == "pad"
    tiled = lipsim.load(tmp_path / "pad.safetensors", framing="tiles")
    assert isinstance(tiled, TiledMetric) and tiled.grid == 2
    with pytest.raises(ValueError, match="expected framing to be one of"):
        lipsim.load(file, framing="fit")
    with pytest.raises(ValueError, match="a grid is of the framing tiles, got the framing 'pad'"):
        lipsim.load(tmp_path / "pad.safetensors", grid=2)


def test_bundled_files_stretch() -> None:
    assert lipsim.load("quickstart").preprocess.framing == "stretch"


def test_a_metric_without_a_bound_has_distances_and_no_certificate() -> None:
    metric = TiledMetric(PerceptualMetric(SmallViT(SIDE, 4, 12, 1, 2), SIDE, lipschitz=math.inf).eval())
    x, y, z = (t.float() for t in _triplet())
    assert not metric.has_bound and metric(x, y).shape == (2,)
    assert not metric.certify(x, y, z).radius.any()
    lower, upper = metric.distance_bounds(x, y, 0.1)
    assert not lower.any() and (upper == 2).all()


def test_an_error_of_the_embedding_counts_in_certificates_and_files(tmp_path: Path) -> None:
    metric = _tiled()
    x, y, z = _triplet()
    before = metric.certify(x, y, z).radius
    metric.feature_error = 1e-3
    assert metric.tile_error == 2e-3 and metric.tile_options["feature_error"] == 4e-3
    certificate, (lower, upper) = metric.certify(x, y, z), metric.distance_bounds(x, y, 0.0)
    assert (certificate.radius + 1e-3 < before).all() and (lower < metric(x, y)).all() and (upper > metric(x, y)).all()
    again = lipsim.load(save(metric, tmp_path / "own.safetensors"))
    assert isinstance(again, TiledMetric) and again.tile.declared_feature_error == 2e-3
    assert again.declared_feature_error >= 1e-3
    # What follows from the error of a tile is no other one, however often it is declared, saved and loaded.
    metric = _tiled()
    metric.tile.feature_error = 1e-4
    metric.feature_error = metric.feature_error
    assert metric.tile_error == 1e-4
    # The vector of all tiles has their anchors in it, which are rounded as its features are.
    large = TiledMetric(PerceptualMetric(OrthogonalProjection(SIDE, 5), SIDE, anchor=1e4, lipschitz=1.0), 2)
    large.tile.feature_error = 1e-6
    images = torch.rand(8, 3, 2 * SIDE, 2 * SIDE)
    with torch.no_grad():
        error = (large.embed(images).double() - exact_copy(large.encoder)(images.double())).norm(dim=1)
    assert 2 * 1.5 * 1e-6 < float(error.max()) <= large.feature_error
    again = lipsim.load(save(metric, tmp_path / "own.safetensors"))
    assert isinstance(again, TiledMetric) and again.tile.declared_feature_error == 1e-4


def test_refusals() -> None:
    metric = _tiled()
    with pytest.raises(ValueError, match="expected the metric of one tile"):
        TiledMetric(metric)
    with pytest.raises(ValueError, match="grid ≥ 1"):
        TiledMetric(metric.tile, 0)
    with pytest.raises(ValueError, match=r"is lipsim\.metric\.TiledMetric"):
        PerceptualMetric(metric.tile.encoder, SIDE, framing="tiles")
    with pytest.raises(ValueError, match=r"set metric\.tile\.lipschitz"):
        metric.lipschitz = 2.0
    metric.feature_error = 2.0
    assert metric.certificate_options["feature_error"] == 4.0 and metric.feature_error_kind == "declared"
    metric.feature_error = 0.0
    with pytest.raises(ValueError, match="the anchor of its tile"):
        metric.anchor = 2.0
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 3, 16, 16\)"):
        metric(*torch.rand(2, 1, 3, 8, 8, dtype=torch.float64))
    metric.tile.lipschitz = 2.0
    x, y, z = _triplet()
    for call in (metric.distance_bounds, metric.threshold_radius):
        with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 3 and 2"):
            call(torch.cat([x, x[:1]]), y, 0.5)
    doubled = metric.certify(x, y, z).radius
    torch.testing.assert_close(2 * doubled, _tiled_like(metric).certify(x, y, z).radius, rtol=1e-6, atol=0)
    metric.tile.anchor = 0.5
    with pytest.raises(ValueError, match="has been replaced; make a TiledMetric of it again"):
        metric.certify(x, y, z)


def _tiled_like(metric: TiledMetric) -> TiledMetric:
    """The same with a bound of 1."""
    tile = PerceptualMetric(metric.tile.encoder, SIDE, metric.tile.anchor, lipschitz=1.0).eval()
    return TiledMetric(tile, metric.grid)


@pytest.mark.parametrize("framing", ["center-crop", "pad", "tiles"])
def test_files_are_certified_in_their_own_pixels(
    framing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for name, (width, height) in {"reference": (40, 30), "left": (16, 16), "right": (21, 33)}.items():
        files[name] = tmp_path / f"{name}.png"
        pixels = (torch.rand(height, width, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(files[name])
    checkpoint = save(PerceptualMetric(OrthogonalProjection(SIDE, 6), SIDE), tmp_path / "metric.safetensors")
    metric = lipsim.load(checkpoint, framing=framing)
    found = certify_files(metric, **files)
    assert found.original_radius is not None and found.framing == framing
    for name, size in {"reference": (30, 40), "left": (16, 16), "right": (33, 21)}.items():
        own = metric.preprocess.original_radius(found.radius[name], *size)
        assert found.original_radius[name] == pytest.approx(own, rel=1e-9) and own > 0
    turned = Image.open(files["reference"])
    turned.getexif()[0x0112] = 6
    assert original_radii(metric, {"reference": turned}, {"reference": 1.0}) == {
        "reference": pytest.approx(metric.preprocess.original_radius(1.0, 40, 30), rel=1e-9)
    }
    with pytest.raises(SystemExit) as done:
        main(["certify", "--metric", str(checkpoint), *map(str, files.values()), "--framing", framing, "--json"])
    assert done.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["framing"] == framing and facts["radius"] == pytest.approx(found.radius, rel=1e-5)
    assert facts["image_size"] == (2 * SIDE if framing == "tiles" else SIDE)


def test_certificates_know_that_a_tile_without_direction_takes_that_of_the_image() -> None:
    """Zero features without an anchor are at distance 1 from everything; a change of one tile alone leads there."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 6, bias=False)).double()
    bound = float(torch.linalg.matrix_norm(encoder[1].weight.detach(), 2)) * (1 + 1e-12)
    tile = PerceptualMetric(encoder, SIDE, anchor=0.0, lipschitz=bound)
    metric = TiledMetric(tile.eval().requires_grad_(False), 2)
    x, y, _ = _triplet(count=1)
    x[..., :SIDE, :SIDE] *= 1e-3
    y[..., SIDE:], y[..., SIDE:, :] = x[..., SIDE:], x[..., SIDE:, :]
    black = x.clone()
    black[..., :SIDE, :SIDE] = 0
    change = float((x - black).norm())
    assert float(metric(x, y)) < 0.5 and float(metric(black, y)) == 1
    assert 0 < float(metric.threshold_radius(x, y, 0.6)) <= change
    for image, eps in ((x, change), (black, 0.0)):
        lower, upper = metric.distance_bounds(image, y, eps)
        assert lower <= metric(black, y) <= upper
    assert metric.threshold_radius(black, y, 0.6) == metric.threshold_radius(y, black, 0.6) == 0
    pairs = pair_geometry(metric)  # of files
    features = [metric.embed_tiles(image) for image in (black, y, x)]
    assert float(pairs.distance(*features[:2])) == 1 and float(pairs.distance(*features[1:])) == float(metric(y, x))
    other = 1 - y
    assert 0 < float(metric.certify(x, y, other).radius) <= change
    for triplet in ((black, y, other), (y, black, other), (y, other, black)):
        certificate = metric.certify(*triplet)
        answer = metric(triplet[0], triplet[2]) - metric(triplet[0], triplet[1])
        torch.testing.assert_close(certificate.margin, answer)
        features = (metric.embed_tiles(image) for image in triplet)
        assert certificate.margin == certificates.tiled_margin(*features, anchor=0.0)
        assert bool(certificate.prefers_left) == bool(certificate.margin > 0)
        for name in ("radius", "left_radius", "right_radius", "joint_radius"):
            assert getattr(certificate, name) == 0, name
