"""The log of a training as one table, whatever interrupted it."""

from __future__ import annotations

from pathlib import Path

from lipsim.results.training_log import budget, last_certified, read_log

HEAD = "epoch,step,train/loss,val/a/certified_1,val/a/certified_36/255,test/a/majority_score\n"


def _write(folder: Path, name: str, *rows: str) -> None:
    (folder / name).write_text(HEAD + "".join(f"{row}\n" for row in rows))


def test_a_part_replaces_what_it_trained_again(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    _write(tmp_path, "metrics-2.csv", "1,2,0.2,,,", "1,3,0.1,,,", "1,3,,0.3,0.6,")
    first = ("0,0,0.9,,,", "0,1,0.8,,,", "0,1,,0.1,0.2,")
    _write(tmp_path, "metrics-1.csv", *first, "1,2,0.7,,,", "1,3,0.6,,,", "1,3,,0.5,0.5,")
    _write(tmp_path, "metrics-10.csv", "2,4,0.05,,,")
    _write(tmp_path, "metrics-old.csv", "0,99,7,,,")  # somebody else's
    rows = read_log(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        *((0, 0.9), (1, 0.8), (2, 0.2), (3, 0.1), (4, 0.05))
    ]
    assert [row["step"] for row in rows if "val/a/certified_1" in row] == [1, 3]
    assert list(last_certified(rows).items()) == [("val/a/certified_36/255", 0.6), ("val/a/certified_1", 0.3)]
    assert budget("36/255") == 36 / 255 and budget("1") == 1


def test_a_validation_that_a_part_begins_with_stands_once(tmp_path: Path) -> None:
    _write(tmp_path, "metrics-1.csv", "0,0,0.9,,,", "0,1,0.8,,,", "0,2,0.7,,,", "0,2,,0.1,0.2,")
    _write(tmp_path, "metrics.csv", "0,2,,0.3,0.4,", "1,3,0.6,,,")
    rows = read_log(tmp_path)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [0.9, 0.8, 0.7, 0.6]
    assert [(row["step"], row["val/a/certified_1"]) for row in rows if "val/a/certified_1" in row] == [(2, 0.3)]


def test_evaluations_in_the_folder_are_no_part_of_it(tmp_path: Path) -> None:
    _write(tmp_path, "metrics-1.csv", "0,0,0.9,,,", "0,1,0.8,,,", "0,1,,0.1,0.2,", "1,2,,,,0.7")
    trained = read_log(tmp_path)
    assert [row["step"] for row in trained] == [0, 1, 1]
    _write(tmp_path, "metrics-2.csv", "0,0,,0.9,0.9,")  # `validate` of a checkpoint, which logs at step 0
    _write(tmp_path, "metrics.csv", "0,0,,,,0.5")  # and `test`
    assert read_log(tmp_path) == trained


def test_the_last_line_of_a_killed_process_may_end_anywhere(tmp_path: Path) -> None:
    _write(tmp_path, "metrics.csv", "0,0,0.9,,,", "0,1,0.8,,,")
    whole = (tmp_path / "metrics.csv").read_text()
    for end in range(len(HEAD) + 11, len(whole)):
        (tmp_path / "metrics.csv").write_text(whole[:end])
        rows = read_log(tmp_path)
        assert rows == [{"epoch": 0, "step": 0, "train/loss": 0.9}]
    (tmp_path / "metrics.csv").write_text("")
    assert read_log(tmp_path) == []
