"""Commands on metrics that images come to in another way than stretched: what they compute, remember and refuse."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lipsim
from lipsim import PerceptualMetric, certificates
from lipsim.cli.demo import THRESHOLD, first_threshold
from lipsim.metric import TiledMetric, save
from lipsim.metric.files import BUNDLED, read_facts
from lipsim.metric.thresholds import Threshold, choose_threshold
from lipsim.students import FoldedNetwork, OrthogonalProjection
from lipsim.utils.weights import read_safetensors

Run = Callable[[str], tuple[int, str, str]]
TILES = "--metric quickstart --framing tiles"


@pytest.fixture(scope="module")
def tiled() -> TiledMetric:
    metric = lipsim.load("quickstart", framing="tiles")
    assert isinstance(metric, TiledMetric)
    return metric


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where commands run: two folders of wide images, nearly equal where names are."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for number in range(4):
        image = rng.integers(0, 256, (3, 5, 3)).astype(np.uint8)
        for name in ("a", "b"):
            Path(name).mkdir(exist_ok=True)
            large = np.asarray(Image.fromarray(image).resize((150, 90), Image.Resampling.BICUBIC), np.int16)
            near = (large + rng.integers(-5, 6, large.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(near).save(f"{name}/{number}.png")


def _images(metric: PerceptualMetric, *files: str) -> list[Tensor]:
    return [metric.preprocess(file)[None] for file in files]


def test_tiles_prove_by_the_lengths_of_their_features(run: Run, tiled: TiledMetric) -> None:
    """What the metric itself proves of the images, which is more than of the directions of all tiles."""
    x, y = _images(tiled, "a/0.png", "b/1.png")
    facts = json.loads(run(f"distance a/0.png b/1.png {TILES} --eps 0.5 --json")[1])
    found = [facts["lower"], facts["upper"]]
    assert facts["distance"] == pytest.approx(float(tiled(x, y)), rel=1e-5)
    assert found == pytest.approx([float(end) for end in tiled.distance_bounds(x, y, 0.5)], rel=1e-6)
    z, z_other = tiled.embed(x).double(), tiled.embed(y).double()
    low, high = certificates.distance_interval(z, z_other, 0.5, **tiled.certificate_options)
    assert found[0] > float(low) + 1e-3 and found[1] < float(high) - 1e-3

    (row,) = csv.DictReader(io.StringIO(run(f"rank a/0.png b/1.png {TILES} --eps 0.5 --csv")[1]))
    assert [float(row["lower"]), float(row["upper"])] == found

    threshold = 0.7 * facts["distance"]
    status, out, _ = run(f"same a/0.png b/1.png {TILES} --threshold {threshold} --json")
    radius = json.loads(out)["radius"]
    assert status == 1
    for name, pair in (("left", (x, y)), ("right", (y, x))):
        assert radius[name] == pytest.approx(float(tiled.threshold_radius(*pair, threshold)), rel=1e-5)
    assert radius["left"] > 1.05 * float(
        certificates.threshold_radius(z, z_other, threshold, **tiled.certificate_options)
    )


def test_a_threshold_of_tiles(run: Run, tiled: TiledMetric) -> None:
    """Its certified rates are counts of the metric's own radii; the file says the framing, and keeps all else."""
    left, right = (torch.cat(_images(tiled, *(f"{name}/{i}.png" for i in range(4)))) for name in ("a", "b"))
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    value = choose_threshold(tiled(left[i], right[j])[i != j], 0.0)
    radius = tiled.threshold_radius(left, right, value)
    z, y = tiled.embed(left).double(), tiled.embed(right).double()
    whole = certificates.threshold_radius(z, y, value, **tiled.certificate_options)
    eps = float(radius[0] + whole[0]) / 2  # which the directions of the tiles alone do not reach
    line = f"calibrate a b {TILES} --far 0 --eps {eps} --attack-pairs 1 --steps 2 --output c.safetensors --json"
    status, out, err = run(line)
    facts = json.loads(out)
    assert status == 0 and "error" not in err and facts["violations"] == 0
    assert facts["threshold"]["value"] == pytest.approx(value, rel=1e-4)
    right_answers = tiled(left, right) <= value
    certified = float((right_answers & (radius > eps)).sum()) / 4
    assert list(facts["same"]["certified"].values()) == [certified]
    assert certified > float((right_answers & (whole > eps)).sum()) / 4
    (attacked,), (proven,) = (facts["attacked_same"][kind].values() for kind in ("attacked", "certified"))
    assert attacked >= proven

    own = read_facts("quickstart").header
    header = read_facts("c.safetensors").header
    assert header.pop("threshold")["value"] == facts["threshold"]["value"]
    assert header == {**own, "framing": "tiles", "grid": 2}
    for name, tensor in read_safetensors(BUNDLED / "quickstart.safetensors")[0].items():
        assert torch.equal(tensor, read_safetensors(Path("c.safetensors"))[0][name])
    assert run("same a/1.png b/1.png --metric c.safetensors")[0] == 0
    text = run("info c.safetensors")[1]
    assert "tiles, 2 × 2 of 64 × 64, resized in float" in text
    again = lipsim.load("c.safetensors")
    assert isinstance(again, TiledMetric) and again.threshold is not None and again.threshold.far == 0


@pytest.mark.parametrize("framing", ["pad", "tiles"])
def test_an_index_remembers_how_images_came_to_it(framing: str, run: Run) -> None:
    status, out, _ = run(f"index a --metric quickstart --framing {framing} --json")
    assert status == 0 and json.loads(out)["framing"] == framing and json.loads(out)["images"] == 4
    metric = lipsim.load("quickstart", framing=framing)
    x, *others = _images(metric, "b/2.png", *(f"a/{i}.png" for i in range(4)))
    expected = sorted((float(metric(x, y)), i) for i, y in enumerate(others))
    for options in ("", f"--metric quickstart --framing {framing}"):
        status, out, _ = run(f"search b/2.png --top 4 --json {options}")
        facts = json.loads(out)
        assert status == 0 and facts["radius"]["top-1"] > 0
        assert [Path(one["file"]).stem for one in facts["nearest"]] == [str(i) for _, i in expected]
        assert [one["distance"] for one in facts["nearest"]] == pytest.approx([d for d, _ in expected], rel=1e-4)
    rows = list(csv.DictReader(io.StringIO(run("search b/2.png --csv")[1])))
    assert [Path(row["file"]).stem for row in rows] == [str(i) for _, i in expected]
    for line, message in (
        ("search b/2.png --metric quickstart", f"its framing is {framing}"),
        ("search b/2.png --metric quickstart --framing center-crop", "prepared in another way"),
        ("search b/2.png --framing pad", "--framing and --grid go with --metric"),
        ("index a --metric quickstart", f"its framing is {framing}"),
        ("index none --metric quickstart --output other.safetensors", "none"),
        ("search none.png", "none.png"),
        ("search a", "got the folder a"),
    ):
        status, out, err = run(line)
        assert status == 2 and out == "" and message in err and err.count("\n") == 1
    Path("a/9.png").write_text("no image")
    assert run(f"index a --metric quickstart --framing {framing}")[0] == 1  # left out, which is no error


def test_a_metric_of_tiles_is_folded_as_its_tile_is(run: Run) -> None:
    save(PerceptualMetric(OrthogonalProjection(8, 24), 8), "m.safetensors", {"by": "us"})
    status, out, err = run("export m.safetensors --framing tiles --grid 3 --output t.safetensors --check")
    assert status == 0 and "error" not in err and out.count("ok     ") == 3
    folded, whole = lipsim.load("t.safetensors"), lipsim.load("m.safetensors", framing="tiles", grid=3)
    assert isinstance(folded, TiledMetric) and folded.grid == 3
    assert isinstance(folded.tile.encoder, FoldedNetwork)
    x, y = torch.rand(2, 2, 3, 24, 24)
    torch.testing.assert_close(folded(x, y), whole(x, y), rtol=1e-5, atol=1e-7)
    assert folded.notes["by"] == "us" and folded.notes["folded_from"] == "OrthogonalProjection"
    for name in ("onnx", "torch"):
        status, _, err = run(f"export m.safetensors --framing tiles --format {name}")
        # The last line: on a busy machine it is told before how far it is.
        assert status == 1 and err.splitlines()[-1].startswith("error: a TiledMetric has no graphs")


def test_a_page_begins_with_the_threshold_of_the_file(tmp_path: Path) -> None:
    metric = lipsim.load("quickstart")
    assert first_threshold(metric) == THRESHOLD and first_threshold(metric, 0.3) == 0.3
    metric.threshold = Threshold(0.25, 0.01, 7, 300, "abc")
    again = lipsim.load(save(metric, tmp_path / "c.safetensors"))
    assert first_threshold(again) == 0.25 and first_threshold(again, 0.3) == 0.3
    with pytest.raises(ValueError, match="threshold in"):
        first_threshold(metric, 3)
