"""The NIGHTS loader and its data module on a made-up folder."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lipsim import PerceptualMetric
from lipsim.callbacks import CertifyRadii
from lipsim.cli.train import main
from lipsim.data import Triplet, collate_triplets
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.transforms import Preprocess
from lipsim.datamodules import NightsData
from lipsim.metric import save
from lipsim.results import read_results
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.utils.terminal import one_line

ROOT = Path(__file__).parents[3]


def _table(root: Path) -> list[dict[str, str]]:
    with open(root / "data.csv", newline="") as file:
        return list(csv.DictReader(file))


def _pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_is_what_the_table_says_in_its_order(nights: Path, split) -> None:
    triplets = NightsTriplets(nights, split, Preprocess(48))
    expected = [row for row in _table(nights) if row["split"] == split and int(row["votes"]) >= 6]
    assert len(triplets) == len(expected) == 8
    assert [row.id for row in triplets.rows] == [row["id"] for row in expected]
    assert [row.votes for row in triplets.rows] == [int(row["votes"]) for row in expected]
    assert triplets.right_vote.tolist() == [float(row["right_vote"]) for row in expected]
    assert 0 < triplets.right_vote.sum() < 8
    for i, row in enumerate(expected):
        found = triplets[i]
        assert found.index == i and found.right_vote == float(row["right_vote"])
        for name in ("ref", "left", "right"):
            image = found.reference if name == "ref" else getattr(found, name)
            assert torch.equal(image, _pixels(nights / row[f"{name}_path"]))
        nearer_right = (found.right - found.reference).norm() < (found.left - found.reference).norm()
        assert nearer_right == (found.right_vote == 1)
    assert triplets[-1].index == 7
    with pytest.raises(IndexError):
        triplets[8]


def test_the_parts_of_a_split(nights: Path) -> None:
    triplets = NightsTriplets(nights, "test", Preprocess(16))
    flags = [row["is_imagenet"] == "True" for row in _table(nights) if row["split"] == "test" and int(row["votes"]) > 5]
    assert triplets.groups["imagenet"].tolist() == flags
    assert triplets.groups["non_imagenet"].tolist() == [not flag for flag in flags]
    assert len(NightsTriplets(nights, "test", Preprocess(16), min_votes=0)) == 12


@pytest.mark.parametrize("resize", ["float", "pil"])
def test_workers_read_the_same_through_the_preprocess(nights: Path, resize: str) -> None:
    preprocess = Preprocess(16, resize)
    triplets = NightsTriplets(nights, "train", preprocess)
    loaders = [DataLoader(triplets, 3, num_workers=n, collate_fn=collate_triplets) for n in (0, 2)]
    alone, workers = ([*loader] for loader in loaders)
    assert [len(batch) for batch in workers] == [3, 3, 2]
    for a, b in zip(alone, workers, strict=True):
        for name in ("reference", "left", "right", "right_vote", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    path = nights / triplets.rows[0].paths[0]
    assert torch.equal(alone[0].reference[0], preprocess(Image.open(path)))


def _drop_column(root: Path) -> None:
    text = (root / "data.csv").read_text()
    (root / "data.csv").write_text(text.replace("is_imagenet", "imagenet", 1))


def _edit(root: Path, line: int, old: str, new: str) -> None:
    lines = (root / "data.csv").read_text().splitlines()
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    (root / "data.csv").write_text("\n".join(lines))


def _votes(root: Path, line: int) -> str:
    """The first two cells, both votes."""
    return (root / "data.csv").read_text().splitlines()[line][:3]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda r: (r / "data.csv").unlink(),
            FileNotFoundError,
            r"data\.csv missing; download .*nights\.zip.*--data\.",
        ),
        (_drop_column, ValueError, "no column is_imagenet"),
        (lambda r: (r / "distort/000/002_0.png").unlink(), FileNotFoundError, r"1 images \(distort/000/002_0\.png"),
        (lambda r: _edit(r, 1, "train", "tran"), ValueError, r"line 2: split is 'tran'"),
        (lambda r: _edit(r, 1, ",train", ",many,train"), ValueError, "line 2"),
        (lambda r: _edit(r, 1, ",6,train", ",nan,train"), ValueError, "line 2: votes is 'nan'"),
        (lambda r: _edit(r, 1, ",6,train", ",1e400,train"), ValueError, "line 2: votes is '1e400'"),
        (lambda r: _edit(r, 3, _votes(r, 3), "1,1"), ValueError, "line 4: expected one winner"),
        (lambda r: _edit(r, 1, "ref/", "../"), ValueError, r"line 2: a path is '\.\./.*leads out"),
        (lambda r: _edit(r, 1, "ref/", "/etc/"), ValueError, "line 2: a path is '/etc/.*expected a path relative"),
        (lambda r: _edit(r, 1, "ref/", "C:\\"), ValueError, "line 2: a path is 'C:.*expected a path relative"),
        (lambda r: (r / "data.csv").write_bytes(b"\xff\xfe\x00"), ValueError, "not in the published layout"),
        (lambda r: (r / "data.csv").write_text((r / "data.csv").read_text() + "1,0,36\n"), ValueError, "line 38"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(nights: Path, damage, error: type[Exception], message: str) -> None:
    damage(nights)
    with pytest.raises(error, match=message) as raised:
        NightsTriplets(nights, "train", Preprocess(16))
    assert "\n" not in str(raised.value) and str(nights) in str(raised.value)


def test_rows_that_are_left_out_may_be_anything(nights: Path) -> None:
    _edit(nights, 2, _votes(nights, 2), ",")  # five votes
    assert len(NightsTriplets(nights, "train", Preprocess(16))) == 8


def test_bad_arguments(nights: Path) -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        NightsTriplets(nights, "valid", Preprocess(16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no row of the split 'val' with 12 votes"):
        NightsTriplets(nights, "val", Preprocess(16), min_votes=12)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_image_is_named(nights: Path, num_workers: int) -> None:
    file = nights / "ref/000/003.png"
    file.write_bytes(file.read_bytes()[:300])
    loader = DataLoader(
        NightsTriplets(nights, "train", Preprocess(16)), 4, num_workers=num_workers, collate_fn=collate_triplets
    )
    with pytest.raises(ValueError, match="cannot read the image") as raised:
        list(loader)
    line = one_line(str(raised.value))
    assert line.startswith(f"cannot read the image {file} (") and line.endswith("replace the file")


class _AtRandom(FineTuning):
    """Untrained, so that it is right on some triplets only."""

    def __init__(self) -> None:
        super().__init__(OrthogonalProjection(8, 1))


def _test(data: L.LightningDataModule, root: Path, **options: object) -> tuple[dict, dict[str, float], FineTuning]:
    module = _AtRandom()
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[CertifyRadii(eps=[0.001, 0.1])],
        **options,  # type: ignore[arg-type]
    )
    trainer.test(module, data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return read_results(root / "results.json")["certified"]["sets"], logged, module


def test_parts_are_scored_as_by_hand(nights: Path, tmp_path: Path) -> None:
    lines = (nights / "data.csv").read_text().splitlines()
    for i in range(27, 33):  # judges who chose the other side: no metric that sees grey agrees
        lines[i] = ("1,0" if lines[i][0] == "0" else "0,1") + lines[i][3:]
    (nights / "data.csv").write_text("\n".join(lines))
    data = NightsData(nights, image_size=8, batch_size=3, num_workers=0)
    sets, logged, module = _test(data, tmp_path)
    assert list(sets) == ["nights", "nights_imagenet", "nights_non_imagenet"]
    triplets = NightsTriplets(nights, "test", Preprocess(8))
    batch = collate_triplets([triplets[i] for i in range(8)])
    agree, radius = _answers(batch, module)
    assert 0 < agree.sum() < 8
    masks = {"nights": torch.ones(8, dtype=torch.bool)} | {f"nights_{k}": m for k, m in triplets.groups.items()}
    for name, mask in masks.items():
        assert sets[name]["num_triplets"] == mask.sum()
        share = float(agree[mask].double().mean())
        assert sets[name]["majority"] == sets[name]["vote"] == pytest.approx(share)
        assert logged[f"test/{name}/majority_score"] == pytest.approx(share)
        for eps, label in ((0.001, "0.001"), (0.1, "0.1")):
            certified = float((agree & (radius > eps))[mask].double().mean())
            assert sets[name]["certified"][label] == pytest.approx(certified)
            assert logged[f"test/{name}/certified_{label}"] == pytest.approx(certified)
    with open(tmp_path / "radii.csv", newline="") as file:
        column = [row["nights_imagenet"] == "1" for row in csv.DictReader(file)]
    assert column == triplets.groups["imagenet"].tolist()


def _answers(batch: Triplet, module: FineTuning) -> tuple[torch.Tensor, torch.Tensor]:
    certificate = module.metric.certify(batch.reference, batch.left, batch.right)
    return certificate.prefers_left == (batch.right_vote < 0.5), certificate.radius


def test_a_part_of_which_nothing_was_seen(nights: Path, tmp_path: Path) -> None:
    """One batch of one ImageNet triplet, as limits and fast runs leave it."""
    data = NightsData(nights, image_size=8, batch_size=1, num_workers=0)
    triplets = NightsTriplets(nights, "test", Preprocess(8))
    seen, unseen = ("imagenet", "non_imagenet") if triplets.groups["imagenet"][0] else ("non_imagenet", "imagenet")
    sets, logged, _ = _test(data, tmp_path, limit_test_batches=1)
    assert list(sets) == ["nights", f"nights_{seen}"]
    assert math.isnan(logged[f"test/nights_{unseen}/majority_score"])


def _args(nights: Path, root: Path, *options: str) -> list[str]:
    """The shipped config, on an exported metric of 8 pixels."""
    metric = save(PerceptualMetric(OrthogonalProjection(8, 4), 8), root / "metric.safetensors")
    config = ["--config", str(ROOT / "configs/nights/finetune.yaml"), "--model.init_from", str(metric)]
    data = ["--data.root", str(nights), "--data.image_size=8", "--trainer.enable_progress_bar=false"]
    return ["test", *config, *data, *options]


def _run(nights: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As its users run it."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), *_args(nights, root, *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=400)


@pytest.mark.slow  # starts processes: a minute of two cores
def test_each_of_two_processes_sees_one_part_only(nights: Path, tmp_path: Path) -> None:
    """The first two triplets of the test are of different parts; no process waits for scores that another lacks."""
    one_batch = ["--data.batch_size=1", "--data.num_workers=0", "--trainer.limit_test_batches=1"]
    run = _run(nights, tmp_path, *one_batch, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert run.returncode == 0, run.stderr[-3000:]
    sets = read_results(tmp_path / "runs/nights/results.json")["certified"]["sets"]
    assert {name: scores["num_triplets"] for name, scores in sets.items()} == {
        "nights": 2,
        "nights_imagenet": 1,
        "nights_non_imagenet": 1,
    }
    with open(tmp_path / "runs/nights/metrics.csv", newline="") as file:
        (logged,) = csv.DictReader(file)
    for name, scores in sets.items():
        assert float(logged[f"test/{name}/majority_score"]) == scores["majority"]


def test_damage_is_one_line_for_the_user(
    nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a loading process has read it."""
    file = nights / "distort/002/006_1.png"
    file.write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(_args(nights, tmp_path, "--data.num_workers=1", "--trainer.accelerator=cpu"))
    output = capsys.readouterr().err
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert stop.value.code == 1 and len(errors) == 1
    assert errors[0].startswith(f"error: cannot read the image {file} (") and "Traceback" not in output


def test_a_stage_reads_its_own_splits_only(nights: Path) -> None:
    data = NightsData(nights, image_size=8)
    data.setup("test")
    assert data.test_names == ["nights"] and data.train_set is None and not data.val_sets
    data.setup("fit")
    assert [len(s) for s in (data.train_set, data.val_sets["nights"])] == [8, 8]  # type: ignore[arg-type]
    assert set(data.test_groups["nights"]) == {"imagenet", "non_imagenet"}
