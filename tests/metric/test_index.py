"""An index of images: what it keeps, what it embeds again, what it refuses, and what no attack breaks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim.attacks import pgd
from lipsim.certificates import Gallery, rank, reference_radius
from lipsim.cli.main import main
from lipsim.metric import PerceptualMetric, TiledMetric, save
from lipsim.metric.index import ImageIndex
from lipsim.metric.index_files import embedding_fingerprint, write_part
from lipsim.students import OrthogonalProjection


@pytest.fixture(scope="module")
def metric() -> PerceptualMetric:
    torch.manual_seed(3)
    return PerceptualMetric(OrthogonalProjection(image_size=8, out_features=12), image_size=8).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, old enough that their times are to be trusted."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    for number in range(10):
        write(root / f"{number % 2}" / f"{number}.png", rng.integers(0, 256, (8, 8, 3)))
    return root


def write(path: Path, pixels: np.ndarray, age: float = 1e4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    settle(path, age)


def settle(path: Path, age: float) -> None:
    changed = path.stat().st_mtime - age
    os.utime(path, (changed, changed))


def embed_counter(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that the metric of an index embeds from now on."""
    counts: list[int] = []
    embed = index.metric.embed
    monkeypatch.setattr(index.metric, "embed", lambda x: counts.append(len(x)) or embed(x))
    return counts


def test_search_finds_what_comparing_all_pairs_finds(metric: PerceptualMetric, folder: Path) -> None:
    index = ImageIndex.build(metric, folder, batch_size=4)
    queries = sorted(folder.rglob("*.png"))[:3]
    found = index.search([*queries], k=4)
    images = torch.stack([metric.preprocess(index.path(i)) for i in range(len(index))])
    query = torch.stack([metric.preprocess(path) for path in queries])
    for row in range(3):
        distance = metric(query[row : row + 1], images)
        order = distance.argsort()[:4]
        assert found.items[row].tolist() == order.tolist()
        torch.testing.assert_close(found.distance[row].float(), distance[order], atol=1e-6, rtol=1e-4)
        assert found.names[row][0] == str(queries[row])
        z = metric.embed(torch.cat([query[row : row + 1], images])).double()
        pair = reference_radius(z[:1], z[1 + order[:1]], z[1 + order[1:2]], **metric.certificate_options)
        assert found.top_radius[row].item() <= pair.item() * (1 + 1e-3) > 0  # other last digits of the features
    assert found.compared == found.total == 10


@pytest.mark.parametrize("place", [0, 2])
def test_no_attack_on_a_rank_breaks_its_radius(metric: PerceptualMetric, folder: Path, place: int) -> None:
    index = ImageIndex.build(metric, folder)
    query = torch.rand(4, 3, 8, 8)
    found = index.search(query, k=4)
    p = torch.nn.functional.normalize(torch.cat([index.records.features, torch.ones(10, 1)], 1), dim=1)

    class Rank:
        """The largest advantage of any other item that is on the wrong side of the item at this rank."""

        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __call__(self, x: Tensor) -> Tensor:
            z = metric.encoder(x)
            similarity = torch.cat([z, torch.ones(len(z), 1)], 1) @ p.T
            own = similarity.gather(1, found.items[self.rows, place : place + 1])
            ahead = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, found.items[self.rows, :place], True)
            wrong = torch.where(ahead, own - similarity, similarity - own)
            return wrong.scatter(1, found.items[self.rows, place : place + 1], -torch.inf).amax(1)

        def select(self, rows: Tensor) -> Rank:
            return Rank(self.rows[rows])

    objective, broken = Rank(torch.arange(4)), 0
    assert (objective(query) < 0).all()
    for row in range(4):
        radius = float(found.rank_radius[row, place])
        one = objective.select(torch.tensor([row]))
        for length, holds in ((radius * (1 - 1e-3), True), (radius * 1.05 + 1e-3, False)):
            attacked = pgd(one, query[row : row + 1], eps=length, steps=30, box=None)
            assert not (holds and one(attacked).item() > 0)
            broken += not holds and one(attacked).item() > 0
    assert broken >= 3  # an orthonormal map: the radius is all there is


def test_update_embeds_only_what_is_new(
    metric: PerceptualMetric, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ImageIndex.build(metric, folder)
    before = index.records
    counts = embed_counter(index, monkeypatch)
    assert index.update().kept == 10 and counts == []
    rng = np.random.default_rng(9)
    write(folder / "0" / "0.png", rng.integers(0, 256, (8, 8, 3)))  # changed
    write(folder / "new.png", rng.integers(0, 256, (8, 8, 3)))
    (folder / "1" / "1.png").unlink()
    (folder / "1" / "3.png").rename(folder / "1" / "moved.png")
    settle(folder / "0" / "2.png", 5e3)  # another time, the same content
    changes = index.update()
    assert (changes.embedded, changes.kept, changes.removed) == (2, 8, 2) and sum(counts) == 2
    assert sorted(index.records.names) == index.records.names and "1/moved.png" in index.records.names
    own = dict(zip(index.records.names, index.records.features, strict=True))
    for name, feature in zip(before.names, before.features, strict=True):
        if name in own:
            assert torch.equal(own[name], feature) == (name != "0/0.png")
    fresh = ImageIndex.build(metric, folder)
    torch.testing.assert_close(fresh.records.features, index.records.features)


def test_equal_contents_are_embedded_once_and_tie(metric: PerceptualMetric, folder: Path) -> None:
    """Also new ones in different batches, where an embedding has other last digits."""
    root = folder.parent / "copies"
    for number in range(33):
        write(root / f"{number:02}.png", np.full((8, 8, 3), (200, 30, 90)))
    index = ImageIndex(metric)
    changes = index.update(root)
    assert (changes.embedded, changes.kept, len(index)) == (1, 32, 33)
    assert (index.records.features == index.records.features[0]).all()
    assert metric.feature_error == index.feature_error == 0  # which would hide the difference
    assert not index.search(torch.rand(50, 3, 8, 8), k=1).top_radius.any()


def test_a_file_that_was_just_written_is_told_by_its_content(metric: PerceptualMetric, folder: Path) -> None:
    rng, path = np.random.default_rng(4), folder / "fresh.png"
    write(path, rng.integers(0, 256, (8, 8, 3)), age=0)
    index = ImageIndex.build(metric, folder)
    first, status = index.records.features[index.records.names.index("fresh.png")], path.stat()
    while True:  # another picture of the same size in bytes
        write(path, rng.integers(0, 256, (8, 8, 3)), age=0)
        if path.stat().st_size == status.st_size:
            break
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert index.update().embedded == 1
    assert not torch.equal(index.records.features[index.records.names.index("fresh.png")], first)


def test_save_and_load(metric: PerceptualMetric, folder: Path, tmp_path: Path) -> None:
    (folder / "bröken.png").write_bytes(b"no image")
    index = ImageIndex.build(metric, folder)
    assert list(index.skipped) == ["bröken.png"] and len(index) == 10
    file, exported = tmp_path / "index.safetensors", save(metric, tmp_path / "metric.safetensors")
    index.save(file, metric=str(exported))
    again = ImageIndex.load(file)  # its metric from the export: equal weights
    assert again.records.names == index.records.names and again.skipped == index.skipped
    assert torch.equal(again.records.features, index.records.features) and again.root == folder
    assert again.feature_error == index.feature_error
    query = torch.rand(2, 3, 8, 8)
    assert again.search(query, 3).names == index.search(query, 3).names
    other = PerceptualMetric(OrthogonalProjection(image_size=8, out_features=12), image_size=8)
    with pytest.raises(ValueError, match="another metric"):
        ImageIndex.load(file, other)
    with pytest.raises(ValueError, match="no index of images"):
        ImageIndex.load(exported, metric)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"damaged|cannot read"):
        ImageIndex.load(file, metric)
    with pytest.raises(FileNotFoundError, match="no index"):
        ImageIndex.load(tmp_path / "none.safetensors", metric)


def test_an_update_that_was_cut_short_continues(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipsim.metric.index._CHUNK", 4)
    unfinished, index = tmp_path / "parts", ImageIndex(metric)
    embed, calls = metric.embed, []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(x)

    monkeypatch.setattr(metric, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.update(folder, unfinished=unfinished)
    assert len(index) == 0 and len(list(unfinished.iterdir())) == 2
    calls[:] = [0] * 5
    changes = index.update(folder, unfinished=unfinished)
    assert calls[5:] == [2] and len(index) == 10 and changes.embedded == 2
    index.save(tmp_path / "index.safetensors", unfinished=unfinished)
    assert not unfinished.exists()


def test_a_part_from_another_device_keeps_its_error(metric: PerceptualMetric, folder: Path, tmp_path: Path) -> None:
    there = ImageIndex.build(metric, [sorted(folder.rglob("*.png"))[0]])
    write_part(tmp_path / "parts", there.records, embedding_fingerprint(metric), 0.25)
    index = ImageIndex.build(metric, folder, unfinished=tmp_path / "parts")
    assert index.feature_error == 0.25 > metric.feature_error
    assert index.update().kept == 10 and index.feature_error == 0.25  # which these embeddings still have


def test_an_update_that_fails_leaves_the_index_as_it_was(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, other = ImageIndex.build(metric, folder), tmp_path / "other"
    write(other / "new.png", np.zeros((8, 8, 3)))
    before = [index.path(i) for i in range(len(index))]
    with pytest.raises(FileNotFoundError):
        index.update(tmp_path / "nowhere")

    def broken_off(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metric, "embed", broken_off)
        for images in (other, [other / "new.png"]):
            with pytest.raises(KeyboardInterrupt):
                index.update(images)
    assert [index.path(i) for i in range(len(index))] == before and index.root == folder
    assert index.search(before[3], k=1).names == [[before[3]]]
    assert index.update(other).removed == 10 and index.root == other


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_layers_between_the_weights_are_a_part_of_the_metric(folder: Path, tmp_path: Path) -> None:
    class Function(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function, self.calls = function, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # is no part of what it computes
            return self.function(x)

    def metric_of(between: nn.Module, tiled: bool = False) -> PerceptualMetric:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), between, nn.Linear(6, 6))
        metric = PerceptualMetric(encoder, 8, lipschitz=1.0).eval()
        return TiledMetric(metric, 2) if tiled else metric

    for own, others in (
        (nn.LeakyReLU(0.1), (nn.Tanh(), nn.LeakyReLU(0.2))),
        (Function(torch.tanh), (Function(torch.sigmoid), Function(torch.relu))),
    ):
        for tiled in (False, True):
            index = ImageIndex.build(metric_of(own, tiled), folder)
            file = index.save(tmp_path / "index.safetensors")
            assert len(index.search(sorted(folder.rglob("*.png"))[0], k=2).names[0]) == 2
            assert len(ImageIndex.load(file, metric_of(own, tiled))) == 10
            for other in others:
                with pytest.raises(ValueError, match="embeddings of another metric"):
                    ImageIndex.load(file, metric_of(other, tiled))
    scripted = PerceptualMetric(torch.jit.script(metric_of(nn.Tanh()).encoder), 8, lipschitz=1.0).eval()
    assert len(ImageIndex.build(scripted, folder)) == 10


def test_half_precision_is_refused_before_anything_is_embedded(folder: Path) -> None:
    half = PerceptualMetric(OrthogonalProjection(image_size=8, out_features=12), image_size=8).eval().half()
    with pytest.raises(ValueError, match=r"half precision|float16"):
        ImageIndex.build(half, folder)


def test_certificates_cover_the_error_of_the_embeddings(metric: PerceptualMetric, folder: Path) -> None:
    index, query = ImageIndex.build(metric, folder), torch.rand(1, 3, 8, 8)
    assert index.feature_error == metric.feature_error
    before = index.search(query, 3).rank_radius
    index.feature_error = 0.01  # of another machine, say
    after = index.search(query, 3).rank_radius
    assert (after < before).all()
    unbounded = PerceptualMetric(metric.encoder, 8, lipschitz=float("inf"))
    assert not ImageIndex.build(unbounded, folder).search(query, 3).rank_radius.any()


def test_the_rounding_of_float64_features_is_covered_whoever_built_the_index(folder: Path, tmp_path: Path) -> None:
    encoder = OrthogonalProjection(image_size=8, out_features=12).double().eval()
    unbounded = PerceptualMetric(encoder, 8, lipschitz=float("inf"))
    file = ImageIndex.build(unbounded, folder).save(tmp_path / "own.safetensors")
    metric = PerceptualMetric(encoder, 8, lipschitz=1.0)
    index = ImageIndex.load(file, metric)
    assert index.feature_error == ImageIndex.build(metric, folder).feature_error > 0
    stored = torch.stack([metric.preprocess(index.path(i)) for i in range(len(index))]).double()
    query = torch.rand(200, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        exact = rank(metric.embed(query), Gallery(metric.embed(stored)), k=1).rank_radius
    assert (index.search(query, k=1).rank_radius <= exact).all()


def test_files_by_name(metric: PerceptualMetric, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))[:3]
    index = ImageIndex.build(metric, files)
    assert index.search(files[1], k=9).names[0][0] == str(files[1])
    assert torch.isinf(index.search(files[1], k=9).set_radius).all()
    with pytest.raises(ValueError, match="no folder"):
        index.update()
    with pytest.raises(ValueError, match="empty"):
        ImageIndex(metric).search(files[0])


def test_queries_of_every_kind(metric: PerceptualMetric, folder: Path) -> None:
    index, file = ImageIndex.build(metric, folder), folder / "0" / "0.png"
    expected = index.search(file, 2)
    picture = Image.open(file)
    pixels = np.asarray(picture)
    bits = torch.tensor(pixels).movedim(-1, 0)
    batch = bits[None].float() / 255
    for query in (picture, pixels, bits, bits[None], batch[0], batch, [picture], [pixels], (file,)):
        found = index.search(query, 2)
        assert found.names == expected.names
        torch.testing.assert_close(found.rank_radius, expected.rank_radius, rtol=1e-4, atol=1e-6)
    assert index.search([pixels, file], 1).names == [[str(file)]] * 2
    with pytest.raises(ValueError, match="at least one image"):
        index.search([])


def test_approximate_search_says_what_it_certifies(metric: PerceptualMetric, folder: Path) -> None:
    pytest.importorskip("faiss")
    index, query = ImageIndex.build(metric, folder), torch.rand(2, 3, 8, 8)
    found, exact = index.search(query, 1, approximate=True), index.search(query, 1)
    assert found.compared <= found.total == 10
    assert (found.distance >= exact.distance - 1e-12).all()
    # All of so few images are candidates, so that their certificates are those of the index.
    torch.testing.assert_close(found.rank_radius, exact.rank_radius)


def test_the_commands(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, index = str(save(metric, tmp_path / "metric.safetensors")), str(tmp_path / "index.safetensors")

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, out, _ = run("index", str(folder), "--metric", exported, "--output", index)
    assert code == 0 and "10 images (10 embedded, 0 kept" in out
    (folder / "broken.png").write_bytes(b"no image")
    code, out, err = run("index", str(folder), "--metric", exported, "--output", index, "--json")
    assert code == 1 and json.loads(out)["kept"] == 10 and "left out: broken.png" in err
    query = str(folder / "0" / "4.png")
    code, out, _ = run("search", query, "--index", index, "--top", "3", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["nearest"][0]["file"] == query and facts["compared"] == facts["images"] == 10
    assert 0 < facts["radius"]["set"] and facts["radius"]["top-1"] == facts["nearest"][0]["radius"] > 0
    assert facts["original_radius"]["top-1"] == pytest.approx(facts["radius"]["top-1"], rel=1e-5)
    code, out, _ = run("search", query, "--index", index, "--csv")
    assert out.splitlines()[0] == "rank,file,distance,radius" and len(out.splitlines()) == 6
    code, out, _ = run("search", query, "--index", index, "--top", "20")
    assert code == 0 and "certified among all 10 images" in out and "R = inf" in out
    code, _, err = run("search", str(folder), "--index", index)
    assert code and "expected an image file" in err
    code, _, err = run("index", str(folder), "--metric", "quickstart", "--output", index)
    assert code and "another metric" in err
    content = Path(index).read_bytes()
    for damaged in (b"", content[: len(content) // 2], content.replace(b'\\"fingerprint\\"', b'\\"fingerprinT\\"')):
        Path(index).write_bytes(damaged)
        code, _, err = run("index", str(folder), "--metric", exported, "--output", index)
        assert code and "remove the file and index the folder again" in err and err.count("\n") == 1
        assert "get it again" not in err
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable/one.png").write_bytes(b"no image")
    code, _, err = run(
        "index", str(tmp_path / "unreadable"), "--metric", exported, "--output", str(tmp_path / "none.safetensors")
    )
    assert code and "left out: one.png: " in err and "got none that could be read" in err


def test_weights_that_change_make_embeddings_stale(folder: Path, tmp_path: Path) -> None:
    """Those of the old weights are at no distance from queries of the new ones, in memory and in a file."""
    own = PerceptualMetric(OrthogonalProjection(image_size=8, out_features=12), image_size=8).eval()
    index, query = ImageIndex.build(own, folder), torch.rand(2, 3, 8, 8)
    index.search(query)
    own.encoder.load_state_dict(OrthogonalProjection(image_size=8, out_features=12).state_dict())
    with pytest.raises(ValueError, match=r"changed since its index was made.*index\.update"):
        index.search(query)
    file = index.save(tmp_path / "index.safetensors")  # of the weights that it was made with
    with pytest.raises(ValueError, match="another metric"):
        ImageIndex.load(file, own)
    changes, fresh = index.update(), ImageIndex.build(own, folder)
    assert (changes.kept, changes.embedded, changes.removed) == (0, 10, 0)
    assert torch.equal(index.records.features, fresh.records.features)
    assert torch.equal(index.search(query).set_radius, fresh.search(query).set_radius)
    assert len(ImageIndex.load(index.save(file), own)) == 10 and index.update().kept == 10
