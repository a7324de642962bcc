"""The commands that use a metric on files: numbers, tables, exit statuses, examples, completion."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.cli import verify as verify_command
from lipsim.cli.main import COMMANDS, main
from lipsim.metric import load, save
from lipsim.metric.files import BUNDLED
from lipsim.students import OrthogonalProjection
from lipsim.utils import progress
from lipsim.utils.files import file_sha256, write_safetensors
from lipsim.utils.weights import read_safetensors

SIZE = 8
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: two folders of four images, nearly equal where names are, and a metric."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(4):
        image = rng.integers(20, 230, (SIZE, SIZE + number, 3))
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            near = image + rng.integers(-9, 10, image.shape)
            Image.fromarray(near.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    save(PerceptualMetric(OrthogonalProjection(SIZE, 48), SIZE), "m.safetensors", {"by": "us", "epochs": 3})
    return tmp_path


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def distance(left: str, right: str) -> float:
    metric = load("m.safetensors")
    return float(metric(metric.preprocess(left)[None], metric.preprocess(right)[None]))


@pytest.mark.usefixtures("folder")
def test_two_images_have_one_number(run: Run) -> None:
    expected = pytest.approx(distance("a/0.png", "b/1.png"), rel=1e-5)
    status, out, err = run("distance a/0.png b/1.png --metric m.safetensors")
    assert (status, err) == (0, "") and float(out) == expected
    status, out, _ = run("distance a/0.png b/1.png --metric m.safetensors --eps 0.1 --json")
    facts = json.loads(out)
    assert status == 0 and facts["distance"] == expected and facts["eps"] == 0.1
    assert facts["lower"] < facts["distance"] < facts["upper"]
    status, out, _ = run("distance a/0.png b/1.png --metric m.safetensors --eps 0.1")
    assert f"certified: {facts['lower']:.6g} to {facts['upper']:.6g}" in out
    (row,) = table(run("distance a/0.png b/1.png --metric m.safetensors --csv")[1])
    assert float(row["distance"]) == expected and row["left"] == "a/0.png"


@pytest.mark.usefixtures("folder")
def test_the_default_is_the_bundled_metric(run: Run) -> None:
    metric = load()
    x, y = (metric.preprocess(file)[None] for file in ("a/0.png", "a/1.png"))
    assert float(run("distance a/0.png a/1.png")[1]) == pytest.approx(float(metric(x, y)), rel=1e-4)


def test_two_folders(folder: Path, run: Run) -> None:
    status, out, err = run("distance a b --metric m.safetensors --json")
    facts = json.loads(out)
    assert status == 0 and err == "" and facts["without_partner"] == [] and facts["left_out"] == {}
    found = [pair["distance"] for pair in facts["pairs"]]
    assert found == pytest.approx([distance(f"a/{i}.png", f"b/{i}.png") for i in range(4)], rel=1e-4)
    assert facts["mean"] == pytest.approx(sum(found) / 4)
    (folder / "a/3.png").unlink()
    (folder / "a/1.png").write_text("no image")
    status, out, err = run("distance a b --metric m.safetensors")
    assert status == 1 and "without a partner: b/3.png" in err and "left out: cannot read the image a/1.png" in err
    assert f"mean {(found[0] + found[2]) / 2:.6g} of 2" in out and "1.png" not in out
    status, out, _ = run("distance a b --metric m.safetensors --csv --batch-size 1")
    assert status == 1 and [row["left"] for row in table(out)] == ["a/0.png", "a/2.png"]


def test_lists_and_patterns(folder: Path, run: Run) -> None:
    rows = table(run("distance a/0.png 'b/*.png' a/1.png --metric m.safetensors --csv")[1])
    assert [row["right"] for row in rows] == [f"b/{i}.png" for i in range(4)] + ["a/1.png"]
    (folder / "pairs.csv").write_text("left,right\na/0.png,b/3.png\na/1.png,b/1.png\n")
    status, out, _ = run("distance --pairs pairs.csv --metric m.safetensors")
    assert status == 0 and "a/0.png, b/3.png" in out and out.rstrip().endswith("of 2")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("distance a/0.png", "expected two images"),
        ("distance a/0.png none.png", "no image file none.png"),
        ("distance a/0.png m.safetensors --metric m.safetensors", "cannot read the image m.safetensors"),
        ("distance a/0.png a/1.png --metric none", "no metric file none"),
        ("distance a/0.png a/1.png --eps -1 --metric m.safetensors", "eps ≥ 0"),
        ("distance a/0.png a/1.png --json --csv", "not allowed with"),
        ("rank a b --metric m.safetensors", "got the folder a"),
        ("same a/0.png b/0.png --metric m.safetensors", "no threshold; `lipsim calibrate"),
        ("same a/0.png --threshold 0.1", "required: right"),
    ],
)
def test_errors_are_not_answers(line: str, message: str, run: Run) -> None:
    status, out, err = run(line)
    assert status == 2 and out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_ranks(folder: Path, run: Run) -> None:
    (folder / "b/9.png").write_text("no image")
    status, out, err = run("rank a/2.png b --metric m.safetensors --eps 0.1 --json")
    ranking = json.loads(out)["ranking"]
    assert status == 1 and "left out: cannot read the image b/9.png" in err
    found = [row["distance"] for row in ranking]
    assert [row["rank"] for row in ranking] == [1, 2, 3, 4] and ranking[0]["file"] == "b/2.png"
    assert sorted(found) == found == pytest.approx([distance("a/2.png", row["file"]) for row in ranking], rel=1e-4)
    (folder / "b/9.png").unlink()
    status, out, _ = run("rank a/2.png b --metric m.safetensors --top 2 --csv")
    assert status == 0 and [float(row["distance"]) for row in table(out)] == pytest.approx(found[:2], rel=1e-4)
    assert run("rank a/2.png 'b/*' --metric m.safetensors --top 1")[1].splitlines()[1].startswith("1     b/2.png")


def test_calibrate_and_same(folder: Path, run: Run) -> None:
    line = "calibrate a b --metric m.safetensors --far 0 --output c.safetensors --attack-pairs 2 --steps 3 --eps 0.05"
    status, out, err = run(f"{line} --json")
    facts = json.loads(out)
    assert (status, err) == (0, "") and facts["violations"] == 0 and facts["output"] == "c.safetensors"
    assert facts["threshold"]["same_pairs"] == 4 and facts["threshold"]["different_pairs"] == 12
    assert facts["false_accepts"] == 0 and facts["same"]["natural"] == 1
    assert load("c.safetensors").threshold.value == facts["threshold"]["value"]  # type: ignore[union-attr]
    status, out, _ = run(line)
    assert status == 0 and "accepts 100.0 % of 4 same pairs and 0.00 % of 12" in out and "written c.safetensors" in out
    rows = table(run("calibrate a b --metric m.safetensors --attack-pairs 0 --csv")[1])
    assert [row["pairs"] for row in rows] == ["same, certified", "different, certified"]

    status, out, _ = run("same a/1.png b/1.png --metric c.safetensors")
    assert status == 0 and out.startswith("same (distance") and "certified while the left image changes by" in out
    value = facts["threshold"]["value"]
    other = next(i for i in (0, 2, 3) if distance("a/1.png", f"b/{i}.png") > 1.01 * value)
    status, out, _ = run(f"same a/1.png b/{other}.png --metric c.safetensors --json")
    assert status == 1 and json.loads(out)["answer"] == "different" and json.loads(out)["radius"]["left"] > 0
    assert run("same a/1.png b/2.png --metric c.safetensors --threshold 1.9")[0] == 0
    assert "false-accept rate ≤ 0 on 12 different pairs, 4 same ones" in run("info c.safetensors")[1]


def test_calibrate_on_a_table(folder: Path, run: Run) -> None:
    lines = [f"a/{i}.png,b/{j}.png,{int(i == j)}" for i in range(4) for j in range(4)]
    (folder / "pairs.csv").write_text("\n".join(["x,right,same", *lines]) + "\n")
    options = "--metric m.safetensors --attack-pairs 0 --far 1/4"
    status, out, _ = run(f"calibrate pairs.csv {options} --columns left=x")
    assert status == 0 and "25.00 % of 12 different ones" in out and "nothing written" in out
    for line, message in (
        ("pairs.csv", "no column left"),
        ("a b --columns left=x", "expected a CSV file or two folders"),
        ("pairs.csv --columns left=x --different 3", "leave --different out"),
        ("a b --far 2", "expected a number in [0, 1]"),
    ):
        assert run(f"calibrate {line}")[0] == 1 and message in run(f"calibrate {line}")[2]


def test_a_broken_certificate_fails_a_calibration(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = load("m.safetensors")
    original.lipschitz = 0.01
    monkeypatch.setattr("lipsim.cli.calibrate.load_metric", lambda options: original)
    status, _, err = run("calibrate a b --metric m.safetensors --attack-pairs 4 --steps 10 --eps 0.5 2")
    assert status == 1 and "FAILED: attacks broke" in err


@pytest.mark.usefixtures("folder")
def test_info(run: Run) -> None:
    status, out, _ = run("info m.safetensors")
    assert status == 0
    for text in (
        "OrthogonalProjection",
        "8 × 8, stretch, resized in float",
        "anchor",
        "note: by",
        "epochs",
        "none; lipsim calibrate",
    ):
        assert text in out
    assert run("info --metric m.safetensors") == (status, out, "")
    facts = json.loads(run("info --json")[1])
    assert facts["file"] == str(BUNDLED / "photos.safetensors") and facts["lipschitz"] < 1.0001
    assert len(facts["sha256"]) == 64 and facts["values"] > 1e6 and facts["image_size"] == 64


def test_a_table_of_triplets(folder: Path, run: Run) -> None:
    (folder / "a/3.png").write_text("no image")
    lines = ["reference,left,right", "a/0.png,b/0.png,b/1.png", "a/3.png,b/0.png,b/1.png", "a/1.png,b/2.png,b/1.png"]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    status, out, err = run("certify t.csv --metric m.safetensors --csv")
    rows = table(out)
    assert status == 1 and "left out, triplet 2: cannot read the image a/3.png" in err
    assert [row["answer"] for row in rows] == ["left", "right"]
    one = json.loads(run("certify a/1.png b/2.png b/1.png --metric m.safetensors --json")[1])
    assert float(rows[1]["radius"]) == one["radius"]["reference"]
    assert float(rows[1]["joint_radius"]) == one["radius"]["joint"]
    assert float(rows[1]["original_left_radius"]) == one["original_radius"]["left"]
    (single,) = table(run("certify a/1.png b/2.png b/1.png --metric m.safetensors --csv")[1])
    assert single == rows[1]
    facts = json.loads(run("certify t.csv --metric m.safetensors --json")[1])
    assert facts["triplets"][1]["radius"] == one["radius"] and list(facts["left_out"]) == ["2"]
    assert "joint radius" in run("certify t.csv --metric m.safetensors")[1]
    for name in ("quickstart", "photos"):  # the default as well, when it is named
        status, _, err = run(f"info {name} --metric m.safetensors")
        assert status == 1 and f"expected one metric, got {name} and --metric m.safetensors" in err
    for line, message in (
        ("m.safetensors a/0.png b/0.png b/1.png", "the metric is --metric FILE"),
        ("t.csv --smooth 0.1", "not a table"),
        ("a/0.png", "or a CSV file of triplets, got a/0.png alone"),
    ):
        status, _, err = run(f"certify {line}")
        assert status == 1 and message in err


@pytest.mark.usefixtures("folder")
def test_info_says_what_the_file_is_and_not_what_it_claims_to_be(run: Run) -> None:
    """A header is somebody's text: facts about the file are of the file, and odd values are shown as they are."""
    state, metadata = read_safetensors(Path("m.safetensors"))
    header = json.loads(metadata["metric"])
    own = {"sha256": "0" * 64, "file": "/trusted", "values": 7}
    for odd in (own, {"threshold": {"far": 0.1}}, {"lipschitz": [1]}, {"lipschitz": "abc"}, {"config": [1, 2]},
                {"notes": "text"}):  # fmt: skip
        write_safetensors(Path("odd.safetensors"), state, {**metadata, "metric": json.dumps({**header, **odd})})
        digest = file_sha256(Path("odd.safetensors"))
        status, output, _ = run("info odd.safetensors")
        assert status == 0 and digest in output and "trusted" not in output
        facts = json.loads(run("info odd.safetensors --json")[1])
        assert facts["sha256"] == digest and facts["file"].endswith("odd.safetensors")


@pytest.mark.usefixtures("folder")
def test_a_reader_that_stops_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        monkeypatch.setattr("sys.stdout", _Closed(stream))
        with pytest.raises(SystemExit) as stop:
            main(["info", "m.safetensors"])
    assert stop.value.code == 141


class _Closed(io.StringIO):
    """A pipe whose reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def fileno(self) -> int:
        return self.stream.fileno()

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_option(shell: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {name: COMMANDS[name] for name in ("distance", "calibrate", "certify")}  # all of them take seconds to load
    monkeypatch.setattr("lipsim.cli.main.COMMANDS", few)
    status, script, _ = run(f"--print-completion {shell}")
    assert status == 0 and all(name in script for name in (*few, "train", "evaluate"))
    assert "attack-pairs" in script and "smooth" in script
    if shell == "bash":
        (tmp_path / "completion").write_text(script)
        asked = (
            f"source {tmp_path / 'completion'}; COMP_WORDS=(lipsim calibrate --fa); COMP_CWORD=2; "
            "_shtab_lipsim lipsim --fa calibrate; echo ${COMPREPLY[@]}"
        )
        found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["--far"]


def test_verify_tells_what_it_does_where_its_output_is_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each message of a check that lasts becomes a line on stderr, and stdout has the result alone."""
    for name in ("_FIRST", "_SHORTEST"):
        monkeypatch.setattr(progress, name, 0.01)
    told: list[str] = []

    def slow(*images: object, progress: Callable[[str], None], **options: object) -> None:
        for message in ("attacking 1 of 15", "controls"):
            progress(message)
            for _ in range(200):
                told.append(capsys.readouterr().err)
                if message in told[-1]:
                    break
                time.sleep(0.01)
        raise ValueError("enough")

    monkeypatch.setattr(verify_command, "verify", slow)
    with pytest.raises(SystemExit):
        main(["verify", "quickstart"])
    assert "verifying: attacking 1 of 15 (" in "".join(told) and "verifying: controls (" in "".join(told)
