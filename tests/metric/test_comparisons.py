"""Files compared: as tensors are, in any order and batch, and what cannot be read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim import PerceptualMetric, certificates
from lipsim.metric import certify_files, compare_files, comparisons, rank_files, same_files
from lipsim.metric.comparisons import certify_many, threshold_of
from lipsim.metric.pairs import pair_geometry
from lipsim.metric.thresholds import Threshold
from lipsim.students import OrthogonalProjection

SIZE = 8


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(SIZE, 24), SIZE).eval().requires_grad_(False)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven images of different sizes, and one that is none."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (SIZE + number, SIZE, 3), dtype=np.uint8)).save(path)
    (tmp_path / "broken.png").write_text("no image")
    return [*paths, tmp_path / "broken.png"]


def expected(metric: PerceptualMetric, left: Path, right: Path) -> float:
    """The distance in float64 by its definition."""
    z, y = (metric.embed(metric.preprocess(file)[None])[0].double() for file in (left, right))
    e, other = (torch.cat([features, torch.tensor([metric.anchor]).double()]) for features in (z, y))
    return 1 - float(e @ other / (e.norm() * other.norm()))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_distances_are_those_of_the_images(metric: PerceptualMetric, files: list[Path], batch_size: int) -> None:
    *whole, broken = files
    pairs = [(whole[0], file) for file in whole] + [(whole[2], broken), (whole[5], whole[4])]
    done: list[int] = []
    found = compare_files(metric, pairs, batch_size=batch_size, advance=done.append)
    assert found.places == (*range(7), 8) and sum(done) == len(pairs)
    for place, one in zip(found.places, found.distances, strict=True):
        assert (one.left, one.right) == pairs[place] and one.interval is None
        assert one.distance == pytest.approx(expected(metric, *pairs[place]), abs=1e-7)
    assert found.distances[0].distance == 0  # of a file and itself
    assert list(found.broken) == [broken] and "broken.png" in found.broken[broken]
    assert found.mean == pytest.approx(sum(one.distance for one in found.distances) / 8)


def test_an_image_that_many_pairs_share_is_embedded_once(
    metric: PerceptualMetric, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    load_image = comparisons.load_image
    monkeypatch.setattr(comparisons, "load_image", lambda file, *args: read.append(file) or load_image(file, *args))
    rank_files(metric, files[0], files, batch_size=2)
    assert sorted(read) == sorted(files)


def test_intervals_hold_what_the_left_image_can_do(metric: PerceptualMetric, files: list[Path]) -> None:
    eps = 0.3
    pairs = [(files[0], files[1]), (files[2], files[3])]
    found = compare_files(metric, pairs, eps=eps)
    for (left, right), one in zip(pairs, found.distances, strict=True):
        x, y = (metric.preprocess(file)[None] for file in (left, right))
        lower, upper = metric.distance_bounds(x, y, eps)
        assert one.interval == pytest.approx((float(lower), float(upper)), abs=1e-6)
        assert one.interval is not None and one.interval[0] < one.distance < one.interval[1]
    unbounded = PerceptualMetric(metric.encoder, SIZE, lipschitz=math.inf)
    assert compare_files(unbounded, pairs).distances[0].distance == found.distances[0].distance
    with pytest.raises(ValueError, match="no Lipschitz bound"):
        compare_files(unbounded, pairs, eps=eps)
    with pytest.raises(ValueError, match="eps ≥ 0"):
        compare_files(metric, pairs, eps=-1)


def test_ranks(metric: PerceptualMetric, files: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "a copy.png"
    copy.write_bytes(files[3].read_bytes())
    ranked = rank_files(metric, files[0], [*files, copy])
    distances = [one.distance for one in ranked.distances]
    assert distances == sorted(distances) and len(distances) == 8 and list(ranked.broken) == [files[-1]]
    assert ranked.distances[0].right == files[0]
    order = [one.right for one in ranked.distances]
    assert abs(order.index(copy) - order.index(files[3])) == 1
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.png"):
        rank_files(metric, files[-1], files[:2])


def test_the_same_and_its_radius(metric: PerceptualMetric, files: list[Path]) -> None:
    """The radius is that of the angle between the features, ‖e‖ sin|θ_τ − θ|/L, and holds at its boundary."""
    left, right = files[:2]
    distance = expected(metric, left, right)
    for threshold in (distance * 0.8, distance * 1.2):
        found = same_files(metric, left, right, threshold)
        assert found.same == (distance <= threshold) and found.answer == ("same" if found.same else "different")
        assert found.distance == pytest.approx(distance, abs=1e-7) and found.radius is not None
        free = abs(math.acos(1 - threshold) - math.acos(1 - distance))
        for name, file in (("left", left), ("right", right)):
            norm = math.hypot(float(metric.embed(metric.preprocess(file)[None]).norm()), metric.anchor)
            assert found.radius[name] == pytest.approx(norm * math.sin(free) / metric.lipschitz, rel=1e-5)
        assert found.original_radius is not None
        own = certificates.original_radius(found.radius["left"], (SIZE, SIZE), SIZE)
        assert found.original_radius["left"] == pytest.approx(own, rel=1e-9)
        assert found.answer in str(found) and f"{found.radius['left']:.6g}" in str(found)
    unbounded = PerceptualMetric(metric.encoder, SIZE, lipschitz=math.inf)
    open_ended = same_files(unbounded, left, right, 2.0)
    assert open_ended.same and open_ended.radius is None and "not certified" in str(open_ended)


def test_a_tie_at_the_threshold_is_the_same_and_has_no_radius(metric: PerceptualMetric, files: list[Path]) -> None:
    tie = same_files(metric, files[0], files[1], 0.5).distance
    assert same_files(metric, files[0], files[1], tie).same
    assert same_files(metric, files[0], files[1], tie).radius == {"left": 0.0, "right": 0.0}
    assert not same_files(metric, files[0], files[1], math.nextafter(tie, 0)).same
    z = pair_geometry(metric).embed(torch.rand(5, 3, SIZE, SIZE))
    same, *radii = pair_geometry(metric).decide(z, z, 0.0)  # copies of an image at the smallest threshold there is
    assert same.all() and all((radius == 0).all() for radius in radii)


def test_where_the_threshold_comes_from(metric: PerceptualMetric) -> None:
    with pytest.raises(ValueError, match=r"no threshold; `lipsim calibrate PAIRS"):
        threshold_of(metric)
    metric.threshold = Threshold(0.25, 0.01, 1, 1, "")
    assert threshold_of(metric) == 0.25 and threshold_of(metric, 0.5) == 0.5
    with pytest.raises(ValueError, match="threshold in"):
        threshold_of(metric, 2.5)


def test_many_triplets(metric: PerceptualMetric, files: list[Path]) -> None:
    triplets = [(files[0], files[1], files[2]), (files[3], files[-1], files[4]), (files[5], files[6], files[0])]
    found = certify_many(metric, triplets)
    assert found.places == (0, 2) and list(found.broken) == [1]
    assert list(found.certificates) == [certify_files(metric, *triplets[place]) for place in (0, 2)]
    with pytest.raises(ValueError, match="no Lipschitz bound"):
        certify_many(PerceptualMetric(metric.encoder, SIZE, lipschitz=math.inf), triplets)
