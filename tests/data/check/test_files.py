"""The check of data on disk: everything that is wrong, at once, and nothing read twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lipsim.cli.main import main
from lipsim.data.check import Count, DataCheck, check_data, guess_kind
from lipsim.data.sets.folder import FolderImages
from lipsim.utils.errors import LipsimError


def found(check: DataCheck) -> dict[str, str]:
    """Kind of problem by place, without those of counts: made-up folders are smaller than published ones."""
    return {problem.path: problem.kind for problem in check.problems if problem.kind != "count"}


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_everything_that_is_wrong_with_a_folder_at_once_and_again(photos: Path) -> None:
    cut(photos / "train/class0/1.png")
    (photos / "train/class1/2.png").write_bytes(b"")
    (photos / "val/class2/0.png").write_text("no image")
    (photos / "val/notes.txt").write_text("passed over")
    expected = {
        "train/class0/1.png": "truncated",
        "train/class1/2.png": "empty",
        "val/class2/0.png": "unreadable",
    }
    check = check_data(photos, num_workers=0)
    assert check.kind == "folder" and not check.sound and found(check) == expected
    assert (check.files, check.read) == (21, 21) and "notes.txt" in check.passed_over
    assert [(count.name, count.found) for count in check.counts] == [
        ("images", 21), ("images in train", 12), ("images in val", 9)
    ]  # fmt: skip
    again = check_data(photos, num_workers=0)
    assert found(again) == expected and again.read == 3  # what is not whole is looked at each time
    (photos / "val/class2/0.png").write_bytes((photos / "val/class2/1.png").read_bytes())
    os.utime(photos / "val/class1/1.png", ns=(0, 0))
    mended = check_data(photos, num_workers=2)
    assert mended.read == 4 and found(mended).keys() == expected.keys() - {"val/class2/0.png"}
    assert not FolderImages(photos / "train", 8).skipped and ".lipsim" not in check_data(photos).passed_over


def test_what_is_truncated_is_not_told_by_the_name(photos: Path) -> None:
    folder = photos / "val/class2"
    (folder / "0.png").rename(folder / "truncated.png").write_text("no image")
    assert found(check_data(photos, num_workers=0)) == {"val/class2/truncated.png": "unreadable"}


def test_a_stopped_check_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lipsim.data.check import files

    monkeypatch.setattr(files, "_BATCH", 4)
    read = files._Files.__getitem__

    def stop(self: files._Files, index: int) -> tuple[int, str | None]:
        if index == 10:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(files._Files, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        check_data(photos, journal=tmp_path / "journal", num_workers=0)
    (journal,) = (tmp_path / "journal").iterdir()
    assert len(journal.read_text().splitlines()) == 1 + 8
    journal.write_text(journal.read_text()[:-5])  # as a process leaves it that is killed while it writes
    monkeypatch.setattr(files._Files, "__getitem__", read)
    check = check_data(photos, journal=tmp_path / "journal", num_workers=0)
    assert check.sound and check.read == 21 - 7 and check.journal == journal
    assert check_data(photos, journal=tmp_path / "journal", num_workers=0).read == 0
    assert not (photos / files.JOURNAL).exists()
    journal.write_text("{}\n")
    with pytest.raises(LipsimError, match="no journal of this version"):
        check_data(photos, journal=tmp_path / "journal", num_workers=0)


def test_data_that_nobody_may_write_beside(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lipsim.data.check.files.write_text", refuse)
    check = check_data(photos, num_workers=0)
    assert check.sound and check.journal is None
    with pytest.raises(OSError, match="cannot write the journal"):
        check_data(photos, journal=photos, num_workers=0)


def test_nights(nights: Path) -> None:
    (nights / "ref/000/001.png").unlink()
    cut(nights / "distort/000/002_1.png")
    lines = (nights / "data.csv").read_text().splitlines()
    lines[7] = lines[7].replace("ref/000/006.png", "../006.png")
    lines[9] = "1,1" + lines[9][3:]
    (nights / "data.csv").write_text("\n".join(lines) + "\n")
    check = check_data(nights, num_workers=0)
    assert check.kind == "nights"
    assert [problem.kind for problem in check.problems] == ["table", "table", "count", "missing", "truncated"]
    *refused, count, missing, truncated = check.problems
    told = " ".join(sorted(problem.reason for problem in refused))
    assert "line 10: expected one winner" in told and "line 8: a path is '../006.png', which leads out" in told
    assert count.reason == "34 there, 20,019 published"
    assert (missing.path, truncated.path) == ("ref/000/001.png", "distort/000/002_1.png")
    assert [count.found for count in check.counts][1:] == [6, 8, 8]  # with six votes or more


def test_bapps(bapps: Path) -> None:
    root = bapps / "2afc"
    (root / "val/cnn/p1/000003.png").unlink()
    (root / "train/mix/judge/000002.npy").write_bytes(b"no array")
    for file in (root / "val/color/ref").iterdir():
        file.unlink()
    (root / "val/color/ref").rmdir()
    check = check_data(bapps, num_workers=0)
    assert found(check) == {
        "2afc/val/cnn/p1/000003": "missing",
        "2afc/val/color/ref/": "missing",
        "2afc/train/mix/judge/000002.npy": "unreadable",
    }
    assert {count.name: count.found for count in check.counts if count.found != 6} == {"val/cnn": 5, "val/color": 0}
    assert not any(count.agrees for count in check.counts)
    assert check.read == 4 * (9 * 6 - 1 - 6)


def test_material_and_its_published_counts(material: Path) -> None:
    (material / "data/answers_processed_test.json").unlink()
    cut(material / "data/havran1_ennis_298x298_LDR/007.jpg", 0.95)  # within the pixels, behind the header
    check = check_data(material, num_workers=0)
    assert found(check) == {
        "data/answers_processed_test.json": "missing",
        "data/havran1_ennis_298x298_LDR/007.jpg": "truncated",
    }
    assert [(count.name, count.found, count.agrees) for count in check.counts] == [
        ("images", 100, True), ("train judgements without a tie", 5400, False)
    ]  # fmt: skip


def test_a_table_of_too_many_groups_is_not_sound(table: Path) -> None:
    header, *rows = table.read_text().splitlines()
    first = header.split(",").index("group")
    assert first == 0
    named = [f"g{number},{row.partition(',')[2]}" for number, row in enumerate(rows * 3)]
    table.write_text("\n".join([header, *named]))
    (problem,) = check_data(table, num_workers=0).problems
    assert problem.kind == "table" and "the column group has 108 values" in problem.reason


def test_a_table_tells_every_line(table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in range(25):  # more than an error message has
        (table.parent / f"images/{number}-far.png").unlink()
    table.write_text(table.read_text().replace("images/30-near.png", "/images/30-near.png").replace(",test,", ",tset,"))
    csv = tmp_path / "problems.csv"
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(table), "--num-workers", "0", "--json", "--csv", str(csv)])
    assert stop.value.code == 1
    content = json.loads(capsys.readouterr().out)
    kinds = [problem["kind"] for problem in content["problems"]]
    assert content["kind"] == "table" and not content["sound"]
    assert (kinds.count("missing"), kinds.count("table")) == (25, 12 + 1)
    assert len(csv.read_text().splitlines()) == 1 + 38
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(table.parent), "--num-workers", "0"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "folder  found" in out and "sound: every file is there and decodes" in out


def test_kinds_are_guessed_where_there_is_no_doubt(nights: Path, bapps: Path, material: Path, photos: Path) -> None:
    assert [guess_kind(root) for root in (nights, bapps, material, photos, nights / "data.csv")] == [
        "nights", "bapps", "material", "folder", "table"
    ]  # fmt: skip
    (nights / "2afc").mkdir()
    with pytest.raises(LipsimError, match="layout of nights and of bapps; name one as --kind"):
        guess_kind(nights)
    with pytest.raises(FileNotFoundError, match="no data at"):
        check_data(photos / "nowhere")
    with pytest.raises(
        LipsimError, match="a table alone has columns to name, got reference for data of the kind 'folder'"
    ):
        check_data(photos, columns={"reference": "pivot"}, num_workers=0)
    with pytest.raises(LipsimError, match="expected a kind among"):
        check_data(photos, "imagenet")


def test_published_numbers_are_rounded() -> None:
    agrees = {found: Count("mix", found, 56_600, rounded_to=100).agrees for found in (56_549, 56_550, 56_640, 56_651)}
    assert list(agrees.values()) == [False, True, True, False]
    assert Count("images", 100, 100).agrees and not Count("images", 99, 100).agrees
    assert np.all([Count("anything", found).agrees for found in range(3)])
