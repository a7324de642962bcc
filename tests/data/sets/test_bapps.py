"""The BAPPS loader and its data module on a made-up folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lipsim.callbacks import CertifyRadii
from lipsim.data import collate_triplets
from lipsim.data.check import check_data
from lipsim.data.loading import FINGERPRINT_SAMPLES, data_fingerprint
from lipsim.data.packing import pack_images
from lipsim.data.sets.bapps import SUBSETS, BappsTriplets, read_judge
from lipsim.data.transforms import Preprocess
from lipsim.datamodules import BappsData
from lipsim.results import read_results
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.utils.terminal import one_line


@pytest.mark.parametrize("part", ["train", "val"])
def test_subsets_follow_one_another_sorted_by_name(bapps: Path, part: str) -> None:
    triplets = BappsTriplets(bapps, part, Preprocess(20))
    assert len(triplets) == 6 * len(SUBSETS[part])
    assert list(triplets.groups) == list(SUBSETS[part])
    for i in range(len(triplets)):
        folder, name = bapps / "2afc" / part / SUBSETS[part][i // 6], f"{i % 6:06d}"
        found = triplets[i]
        vote = float(np.load(folder / "judge" / f"{name}.npy").reshape(()))
        assert found.right_vote.shape == found.index.shape == () and found.right_vote.dtype == torch.float32
        assert found.right_vote == torch.tensor(vote) and found.index == i
        for kind, image in (("ref", found.reference), ("p0", found.left), ("p1", found.right)):
            pixels = np.array(Image.open(folder / kind / f"{name}.png"))
            assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    votes = torch.stack([triplets[i].right_vote for i in range(len(triplets))])
    assert ((votes > 0) & (votes < 1)).any() and (votes == 0.5).sum() == len(SUBSETS[part])
    for number, name in enumerate(SUBSETS[part]):
        assert triplets.groups[name].nonzero().flatten().tolist() == list(range(6 * number, 6 * number + 6))


def test_subsets_by_name_and_selection(bapps: Path) -> None:
    triplets = BappsTriplets(bapps, "val", Preprocess(8), ["color", "cnn", "color"])
    assert len(triplets) == 12 and "/color/" in triplets.files[0][0] and "/cnn/" in triplets.files[6][0]
    part = triplets.select(torch.tensor([7, 0, 3]))
    assert [part[i].index for i in range(3)] == [0, 1, 2] and len(triplets) == 12
    assert torch.equal(part[0].left, triplets[7].left) and part[0].right_vote == triplets[7].right_vote
    assert {name: mask.tolist() for name, mask in part.groups.items()} == {
        "color": [False, True, True],
        "cnn": [True, False, False],
    }
    assert list(triplets.select(torch.tensor([1])).groups) == ["color"]


def test_a_pack_that_lacks_images_is_refused_at_once(bapps: Path, tmp_path: Path) -> None:
    late = bapps / "2afc" / "val" / "color" / "p1" / "000000.png"
    late.rename(bapps / "late.png")
    pack = pack_images(bapps, tmp_path / "pack", 8, num_workers=0).folder
    (bapps / "late.png").rename(late)
    with pytest.raises(FileNotFoundError, match=r"1 images \(2afc/val/color/p1/000000.png, …\) are not in the pack"):
        BappsTriplets(bapps, "val", Preprocess(8), ["color"], pack)
    assert len(BappsTriplets(bapps, "val", Preprocess(8), ["cnn"], pack)) == 6


def test_an_image_of_two_files_is_refused(bapps: Path) -> None:
    Image.new("RGB", (8, 8)).save(bapps / "2afc/val/cnn/ref/000003.jpg")
    with pytest.raises(ValueError, match=r"1 images of BAPPS have two files, such as 2afc/val/cnn/ref/000003; keep"):
        BappsTriplets(bapps, "val", Preprocess(8))
    found = [problem for problem in check_data(bapps, num_workers=0).problems if problem.kind == "twice"]
    assert [problem.path for problem in found] == ["2afc/val/cnn/ref/000003"]


def test_every_vote_is_of_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "2afc/val/cnn"
    for number in range(40):
        for kind in ("ref", "p0", "p1"):
            path = folder / kind / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 9, 9)).save(path)
        (folder / "judge").mkdir(exist_ok=True)
        np.save(folder / "judge" / f"{number:02d}.npy", np.float32([0.2]))

    def fingerprint() -> str:
        triplets = BappsTriplets(tmp_path, "val", Preprocess(8), ["cnn"])
        return data_fingerprint(DataLoader(triplets, 4, collate_fn=collate_triplets))

    looked_at = set(torch.linspace(0, 39, FINGERPRINT_SAMPLES).long().tolist())
    other = next(number for number in range(40) if number not in looked_at)
    before = fingerprint()
    assert fingerprint() == before
    np.save(folder / "judge" / f"{other:02d}.npy", np.float32([0.9]))
    assert fingerprint() != before


def test_workers_read_the_same(bapps: Path) -> None:
    triplets = BappsTriplets(bapps, "val", Preprocess(8))
    alone, workers = ([*DataLoader(triplets, 5, num_workers=n, collate_fn=collate_triplets)] for n in (0, 2))
    for a, b in zip(alone, workers, strict=True):
        for name in ("reference", "left", "right", "right_vote", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: (r / "2afc").rename(r / "old"),
            r"2afc/train/traditional/ref is missing; run .*PerceptualSimilarity",
        ),
        (lambda r: (r / "2afc/train/cnn/judge").rename(r / "judge"), "2afc/train/cnn/judge is missing"),
        (lambda r: (r / "2afc/train/cnn/p1/000003.png").unlink(), r"1 files \(2afc/train/cnn/p1/000003, …\)"),
        (lambda r: (r / "2afc/train/mix/judge/000000.npy").unlink(), "2afc/train/mix/judge/000000,"),
    ],
)
def test_missing_files_are_named(bapps: Path, damage, message: str) -> None:
    damage(bapps)
    with pytest.raises(FileNotFoundError, match=message) as raised:
        BappsTriplets(bapps, "train", Preprocess(8))
    assert "\n" not in str(raised.value)


def test_empty_and_unknown_subsets(bapps: Path) -> None:
    for kind in ("ref", "p0", "p1", "judge"):
        folder = bapps / "2afc/val/new" / kind
        folder.mkdir(parents=True)
        (folder / "._hidden.png").touch()
    with pytest.raises(FileNotFoundError, match="every file in 2afc/val/new is missing"):
        BappsTriplets(bapps, "val", Preprocess(8), ["new"])
    with pytest.raises(ValueError, match="at least one subset"):
        BappsTriplets(bapps, "val", Preprocess(8), [])
    with pytest.raises(ValueError, match="train, val"):
        BappsTriplets(bapps, "test", Preprocess(8))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([1.5]), "fraction of the judges in .* got 1.5"),
        (np.array([np.nan]), "got nan"),
        (np.array([0.2, 0.4]), "cannot read the judgement"),
        (np.array([{"run": "code"}], dtype=object), "cannot read the judgement"),
        (np.array(["1"]), None),
        (None, "cannot read the judgement"),
    ],
)
def test_judgements_that_are_none(tmp_path: Path, value, message: str | None) -> None:
    file = tmp_path / "judge.npy"
    if value is None:
        file.touch()
    else:
        np.save(file, value, allow_pickle=True)
    if message is None:
        assert read_judge(file) == 1
        return
    with pytest.raises(ValueError, match=message) as raised:
        read_judge(file)
    assert str(file) in str(raised.value)


def test_an_error_in_a_worker_is_one_line(bapps: Path) -> None:
    (bapps / "2afc/val/color/judge/000002.npy").write_bytes(b"no array")
    triplets = BappsTriplets(bapps, "val", Preprocess(8), ["color"])
    with pytest.raises(ValueError, match="judgement") as raised:
        list(DataLoader(triplets, 2, num_workers=1, collate_fn=collate_triplets))
    assert one_line(str(raised.value)).startswith(f"cannot read the judgement {bapps}")


def test_validation_is_held_out_of_training_and_the_test_is_the_official_part(bapps: Path) -> None:
    data = BappsData(bapps, image_size=8, val_triplets=5)
    data.setup("test")
    assert data.train_set is None and len(data.test_sets["bapps"]) == 36  # type: ignore[arg-type]
    data.setup("fit")
    train, val = data.train_set.files, data.val_sets["bapps"].files  # type: ignore[union-attr, attr-defined]
    assert len(val) == 5 and len(train) == 13 and not set(train) & set(val)
    assert all("2afc/train/" in files[0] for files in train + val)
    again = BappsData(bapps, image_size=8, val_triplets=5)
    again.setup("fit")
    assert again.val_sets["bapps"].files == val  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="leave nothing to train on"):
        BappsData(bapps, val_triplets=18).setup("fit")


def test_subsets_and_the_whole_are_scored_as_by_hand(bapps: Path, tmp_path: Path) -> None:
    module = FineTuning(OrthogonalProjection(8, 2))
    data = BappsData(bapps, image_size=8, batch_size=7, num_workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[CertifyRadii(eps=[0.05])], **quiet)  # type: ignore[arg-type]
    trainer.test(module, data, verbose=False)
    sets = read_results(tmp_path / "results.json")["certified"]["sets"]
    assert list(sets) == ["bapps", *(f"bapps_{name}" for name in SUBSETS["val"])]
    triplets = BappsTriplets(bapps, "val", Preprocess(8))
    batch = collate_triplets([triplets[i] for i in range(36)])
    certificate = module.metric.certify(batch.reference, batch.left, batch.right)
    vote = batch.right_vote
    share = torch.where(certificate.prefers_left, 1 - vote, vote).double()
    agree, untied = certificate.prefers_left == (vote < 0.5), vote != 0.5
    for number, name in enumerate(["bapps", *(f"bapps_{name}" for name in SUBSETS["val"])]):
        rows = torch.arange(36) if number == 0 else torch.arange(6 * number - 6, 6 * number)
        kept = rows[untied[rows]]
        assert sets[name]["num_triplets"] == len(rows) and sets[name]["num_tied_votes"] == len(rows) - len(kept)
        assert sets[name]["vote"] == pytest.approx(float(share[rows].mean()))
        assert sets[name]["majority"] == pytest.approx(float(agree[kept].double().mean()))
        certified = (agree & (certificate.radius > 0.05))[kept].double().mean()
        assert sets[name]["certified"]["0.05"] == pytest.approx(float(certified))
        for kind in ("majority", "vote"):
            assert float(trainer.callback_metrics[f"test/{name}/{kind}_score"]) == pytest.approx(sets[name][kind])
