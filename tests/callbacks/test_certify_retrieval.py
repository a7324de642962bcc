"""Searches in a folder of classes: scores against comparing every pair, certificates against attacks."""

from __future__ import annotations

import csv
import io
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lipsim
from lipsim.attacks import pgd
from lipsim.attacks.retrieval import GOALS, RetrievalObjective
from lipsim.callbacks import CertifyRadii, CertifyRetrieval
from lipsim.data import Preprocess
from lipsim.data.loading import data_fingerprint
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.datamodules import BuiltinData, LabelledFolderData
from lipsim.datamodules.labelled import _files
from lipsim.metric import PerceptualMetric, save
from lipsim.results import read_results, update_results
from lipsim.results.report import write_report
from lipsim.results.retrieval import retrieval_rows, retrieval_tables
from lipsim.results.runs import load_runs
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning

KS, EPS = [1, 3, 10], [0.05, 0.3, 1.0]
QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}


@pytest.fixture
def metric() -> PerceptualMetric:
    torch.manual_seed(5)
    return PerceptualMetric(OrthogonalProjection(image_size=8, out_features=10), image_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Noisy tiles of three greys: twelve of each to search in, four to search with."""
    rng = np.random.default_rng(2)
    for part, count in (("train", 12), ("val", 4)):
        for label, grey in (("dark", 90), ("mid", 110), ("light", 130)):
            for number in range(count):
                path = tmp_path / "images" / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(grey - 60, grey + 60, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def data(folder: Path, batch_size: int = 5, **options: Any) -> LabelledFolderData:
    return LabelledFolderData(folder, image_size=8, batch_size=batch_size, num_workers=0, **options)


@pytest.mark.parametrize(
    ("gallery", "queries"), [(".", "val/dark"), ("val/dark", "."), ("train", "val/../train/dark"), ("train", "train")]
)
def test_no_query_is_in_the_gallery(gallery: str, queries: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected queries (in another folder than the|and) gallery"):
        data(folder, gallery=gallery, queries=queries)
    assert data(folder, gallery="train", queries="train-2").query_part == "train-2"  # beside it
    shutil.copytree(folder / "val/light", folder / "again/light")
    (folder / "again/dark").symlink_to(folder / "train/dark", target_is_directory=True)
    with pytest.raises(ValueError, match=r"queries in .*again are files of the gallery .*train, too \(first: dark/"):
        data(folder, queries="again").setup("test")
    # Where a file system numbers no files, their places tell them apart.
    images = LabelledFolder(folder / "again", Preprocess(8))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda path, **_: SimpleNamespace(st_dev=1, st_ino=0))
        found = _files(images)
    assert len(set(found)) == len(images) and folder.resolve() / "train/dark/0.png" in found


def test_scores_are_those_of_all_pairs_and_no_attack_passes_a_certificate(
    metric: PerceptualMetric, folder: Path, tmp_path: Path
) -> None:
    found = {}
    for batch_size in (5, 7):
        directory, callback = tmp_path / f"run{batch_size}", CertifyRetrieval(KS, EPS, steps=6, error_sample=2)
        results = lipsim.evaluate(metric, data(folder, batch_size), callbacks=[callback], directory=directory, **QUIET)
        with open(directory / "retrieval.csv", newline="") as file:
            broken = {float(row[c]) for row in csv.DictReader(file) for c in row if c.endswith("broken at")}
        assert broken <= {0.0, *EPS, math.inf} and len(broken) > 3
        found[batch_size] = results["retrieval"]["sets"]["search"]
    scores = found[5]
    assert scores == found[7]  # whatever the batches
    assert (scores["num_queries"], scores["num_gallery"], scores["num_classes"]) == (12, 36, 3)
    assert scores["violations"] == 0 and scores["num_attacked"] == 12
    parts = data(folder)
    parts.setup("test")
    gallery, queries = parts.gallery, parts.queries
    assert gallery is not None and queries is not None
    images, asked = gallery.load(range(36)), queries.folder.load(range(12))
    nearest = torch.stack([metric(query[None], images).argsort(stable=True) for query in asked])
    labels, own = gallery.labels[nearest], queries.folder.labels
    proven = broken = 0.0
    for k in KS:
        recall = (labels[:, :k] == own[:, None]).any(1).double().mean()
        assert scores["recall"][str(k)]["natural"] == pytest.approx(recall.item())
        right = [max(row[:k].tolist(), key=row[:k].tolist().count) for row in labels]  # the first of equals
        assert scores["knn"][str(k)]["natural"] == pytest.approx((torch.tensor(right) == own).double().mean().item())
        for of_k in (scores["recall"][str(k)], scores["knn"][str(k)]):
            last = of_k["natural"]
            for eps, score in of_k["certified"].items():
                assert score <= of_k["attacked"][eps] <= of_k["natural"] and score <= last
                last = score
            proven += of_k["certified"]["0.05"]
            broken += of_k["natural"] - of_k["attacked"]["1"]
    assert scores["recall"]["1"] == scores["knn"]["1"] and proven > 0.5 and broken > 0.5
    # Of some of the queries, beside the natural score of the same: in results, in the terminal and in reports.
    callback = CertifyRetrieval([1], EPS, steps=2, max_attacked=4, seed=1, error_sample=0)
    found = lipsim.evaluate(metric, data(folder), callbacks=[callback], directory=tmp_path / "some", **QUIET)
    some = found["retrieval"]["sets"]["search"]["recall"]["1"]
    with open(tmp_path / "some/retrieval.csv", newline="") as file:
        chosen = [float(row["recall@1"]) for row in csv.DictReader(file) if float(row["attacked"])]
    assert len(chosen) == 4 and some["natural_of_attacked"] == sum(chosen) / 4 != some["natural"]
    assert retrieval_rows(found["retrieval"])[0]["natural of attacked"] == f"{25 * sum(chosen):.1f}"
    certified, attacked = retrieval_tables(load_runs([str(tmp_path / "some")]))["search"]
    assert certified.rows[0]["natural"] == f"{100 * some['natural']:.1f}"
    assert attacked.rows[0]["natural"] == f"{25 * sum(chosen):.1f}"


def test_what_ends_on_the_sphere_counts(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a change of length ε may be a little longer than ε."""

    def found(name: str) -> Any:
        callback = CertifyRetrieval([1, 3], EPS, steps=4, error_sample=2)
        return lipsim.evaluate(metric, data(folder), callbacks=[callback], directory=tmp_path / name, **QUIET)

    exact = found("exact")["retrieval"]["sets"]
    monkeypatch.setattr(
        "lipsim.callbacks.certify_retrieval.pgd", lambda goal, x, **o: x + (pgd(goal, x, **o) - x) * (1 + 1e-6)
    )
    assert found("longer")["retrieval"]["sets"] == exact


def test_a_search_in_another_gallery_is_not_continued(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: CertifyRetrieval, *args: Any) -> Any:
        if fails.left == 0:
            raise InterruptedError
        fails.left -= 1
        return see(self, *args)

    see, fails.left = CertifyRetrieval.see, 1  # type: ignore[attr-defined]
    shutil.copytree(folder / "train", folder / "other")
    shutil.copy(folder / "other" / "dark" / "1.png", folder / "other" / "mid" / "one more.png")

    def search(gallery: str) -> Any:
        callback, images = CertifyRetrieval([1], EPS, steps=0, error_sample=0), data(folder, gallery=gallery)
        return lipsim.evaluate(metric, images, callbacks=[callback], directory=tmp_path / "run", **QUIET)

    with monkeypatch.context() as patch:
        patch.setattr(CertifyRetrieval, "see", fails)
        with pytest.raises(InterruptedError):
            search("train")
    with pytest.raises(ValueError, match="differs in data"):
        search("other")
    assert search("train")["retrieval"]["sets"]["search"]["num_gallery"] == 36


def test_other_labels_and_other_pixels_are_other_data(folder: Path) -> None:
    def fingerprint() -> str:
        queries = data(folder)
        queries.setup("test")
        return data_fingerprint(queries.test_dataloader()[0])

    first, file = fingerprint(), folder / "val" / "dark" / "0.png"
    assert fingerprint() == first
    for write in (lambda: file.write_bytes(_recoloured(file)), lambda: file.rename(folder / "val" / "mid" / "9.png")):
        write()
        now = fingerprint()
        assert now != first
        first = now


def _recoloured(file: Path) -> bytes:
    """Other pixels in a file of the same size."""
    found = io.BytesIO()
    Image.fromarray(np.asarray(Image.open(file))[::-1].copy()).save(found, "png")
    return found.getvalue()


def test_reports_show_searches(metric: PerceptualMetric, folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        callback = CertifyRetrieval([1, 3], EPS, steps=0, error_sample=0)
        lipsim.evaluate(metric, data(folder), callbacks=[callback], directory=tmp_path / name, **QUIET)
    assert read_results(tmp_path / "one" / "results.json")["retrieval"]["sets"]["search"]["num_attacked"] == 0
    (table,) = write_report(load_runs([str(tmp_path / "one"), str(tmp_path / "two")]), tmp_path / "report")
    assert [row["metric"] for row in table.rows][:4] == ["one: recall@1", "one: recall@3", "one: 1-NN", "one: 3-NN"]
    assert "gallery of 36 images in 3 classes" in (tmp_path / "report" / "report.md").read_text()
    assert "recall@3, certified" in (tmp_path / "report" / "report.csv").read_text()
    assert "recall@1" in (tmp_path / "report" / "report.html").read_text()
    section = read_results(tmp_path / "two" / "results.json")["retrieval"]
    section["sets"]["search"] |= {"num_queries": 9, "num_gallery": 40}
    update_results(tmp_path / "two" / "results.json", {"retrieval": section})
    (table,) = write_report(load_runs([str(tmp_path / "one"), str(tmp_path / "two")]), tmp_path / "others")
    assert table.title.startswith("search: %, 9 to 12 queries, gallery of 36 to 40 images in 3 classes, certified")


def test_objectives_are_positive_where_a_query_is_broken(metric: PerceptualMetric) -> None:
    torch.manual_seed(1)
    labels = torch.arange(40) % 4
    unit = torch.nn.functional.normalize(torch.randn(40, 11), dim=1)
    images, own = torch.rand(60, 3, 8, 8), torch.randint(4, (60,))
    z = torch.cat([metric.embed(images), torch.ones(60, 1)], 1)
    nearest = labels[(z @ unit.T).argsort(dim=1, descending=True)]
    for k in (1, 5):
        lost = {
            "recall": (nearest[:, :k] != own[:, None]).all(1),
            "vote": torch.tensor([max(row, key=row.count) for row in nearest[:, :k].tolist()]) != own,
        }
        for goal in GOALS:
            objective = RetrievalObjective(metric, images, unit, labels, own, k, goal)
            x = images.clone().requires_grad_()
            value = objective(x)
            assert torch.equal(value > 0, lost[goal]) and lost[goal].any() and not lost[goal].all()
            (gradient,) = torch.autograd.grad(value.sum(), x)
            assert (gradient.flatten(1).norm(dim=1) > 0).all()
            rows = torch.tensor([3, 50])
            torch.testing.assert_close(objective.select(rows)(images[rows]), value[rows].detach())


def test_refuses_other_data_and_too_many_neighbours(metric: PerceptualMetric, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every k below 36"):
        lipsim.evaluate(metric, data(folder), callbacks=[CertifyRetrieval([36])], directory=tmp_path / "run", **QUIET)
    triplets, larger = BuiltinData(num_test=4, image_size=16), PerceptualMetric(OrthogonalProjection(16, 4), 16)
    with pytest.raises(ValueError, match="LabelledFolderData to search in, got BuiltinData"):
        lipsim.evaluate(larger, triplets, callbacks=[CertifyRetrieval([1])], directory=tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match="another folder than the gallery"):
        data(folder, queries="../images/train")
    with pytest.raises(ValueError, match="ascending order"):
        CertifyRetrieval([3, 1])
    with pytest.raises(ValueError, match="no triplets"):
        lipsim.evaluate(metric, data(folder), callbacks=[CertifyRadii()], directory=tmp_path / "run", **QUIET)


def test_a_stage_of_training_searches_as_its_metric_does(
    metric: PerceptualMetric, folder: Path, tmp_path: Path
) -> None:
    found = lipsim.evaluate(
        metric, data(folder), callbacks=[CertifyRetrieval(KS, EPS, steps=0)], directory=tmp_path / "run", **QUIET
    )
    stage = FineTuning(metric.encoder)
    callback = CertifyRetrieval(KS, EPS, steps=0, directory=tmp_path / "stage")
    L.Trainer(callbacks=[callback], **QUIET).test(stage, data(folder))
    assert read_results(tmp_path / "stage" / "results.json")["retrieval"]["sets"] == found["retrieval"]["sets"]


@pytest.mark.slow  # starts processes: half a minute of two cores
def test_two_processes_give_the_results_of_one(
    metric: PerceptualMetric, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluations import fork_two

    from lipsim.cli.evaluate import evaluate

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    save(metric, "metric.safetensors")
    callback = {"ks": KS, "eps": EPS, "steps": 6, "max_attacked": 7}
    content = {
        "trainer": {
            **QUIET,
            "callbacks": [{"class_path": "lipsim.callbacks.CertifyRetrieval", "init_args": callback}],
        },
        "data": {
            "class_path": "lipsim.datamodules.LabelledFolderData",
            "init_args": {"root": str(folder), "image_size": 8, "batch_size": 5, "num_workers": 0},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(content))
    given = ["--config", "config.yaml", "--checkpoint", "metric.safetensors", "--trainer.default_root_dir"]
    evaluate([*given, "one"])
    fork_two([*given, "two", "--trainer.devices=2", "--trainer.strategy=ddp"])
    one, two = (read_results(Path(run, "results.json"))["retrieval"] for run in ("one", "two"))
    assert one["sets"] == two["sets"] and one["sets"]["search"]["num_attacked"] == 7
