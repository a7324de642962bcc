"""The page of a training: what it says, and that it needs nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sections import certified_section

from lipsim.cli.main import main
from lipsim.results import update_results
from lipsim.results.charts import chart, thinned, ticks
from lipsim.results.run_page import Status, is_training, read_status, write_run_page, write_status, write_training_pages
from lipsim.results.runs import find_results
from lipsim.utils.errors import LipsimError

RUNNING: Status = {
    **{"state": "running", "message": "", "stage": "FineTuning", "step": 40, "steps": 100, "epoch": 1, "epochs": 3},
    **{"images_per_second": 1234.5, "seconds": 61.0, "seconds_left": 7800.0, "written": "2026-01-02T03:04:05+01:00"},
}  # type: ignore[typeddict-item]
LOG = """epoch,step,train/loss,train/lr,val/a<b/certified_1,val/a<b/certified_36/255,val/a<b/majority_score
0,0,2.5,0.001,,,
0,1,nan,0.002,,,
0,1,,,0.25,0.5,0.75
1,2,0.5,0.003,,,
1,2,,,0.35,0.55,0.85
"""
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in turn, and keeps attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _page(folder: Path, **options: int) -> Page:
    return Page(write_run_page(folder, **options).read_text(encoding="utf-8"))  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run <1>"
    folder.mkdir()
    (folder / "metrics.csv").write_text(LOG)
    (folder / "config.yaml").write_text("model: '</pre><script>alert(1)</script>'\n")
    write_status(folder, RUNNING)
    return folder


def test_a_running_training(run: Path) -> None:
    page = _page(run, refresh=60)
    assert {"http-equiv": "refresh", "content": "60"} in page.all("meta")
    assert page.all("progress") == [{"max": "1", "value": "0.4"}]
    text = " ".join(page.text.split())
    for said in ("run <1> running: 2 h 10 min left", "40 of 100", "1 finished of 3", "1 min 01 s", "1,234 images/s"):
        assert said in text
    assert "1 logged values are not finite" in text
    # The latest first, natural before certified, by budget.
    assert "step a<b, natural a<b, 36/255 a<b, 1 3 85.0 55.0 35.0 2 75.0 50.0 25.0" in text
    for name in ("loss: 0.5", "learning rate: 0.003", "natural: 85.0 %", "certified at 36/255: 55.0 %"):
        assert name in text
    # Self-contained, nothing of a file becomes markup, and lines are told apart without colours.
    assert "alert(1)" in text and not page.all("script") and not page.all("link") and not page.all("b")
    assert not any(key in ("src", "href") for _, attributes in page.elements for key in attributes)
    dashes = [line["stroke-dasharray"] for line in page.all("polyline")][-3:]
    assert len(set(dashes)) == 3
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.all("svg"))


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_one_that_has_ended_is_not_read_again(run: Path, state: str) -> None:
    write_status(run, {**RUNNING, "state": state, "message": "the loss is <nan>"})  # type: ignore[typeddict-item]
    (run / "not_finite.safetensors").touch()
    (run / "skipped.csv").write_text("epoch,step,sample,reason\n0,1,a.png,truncated\n0,2,b.png,missing\n")
    (run / "skipped-1.csv").write_text("epoch,step,sample,reason\n0,1,c.png,truncated\n")
    page = _page(run, refresh=60)
    assert not any("http-equiv" in meta for meta in page.all("meta"))
    text = " ".join(page.text.split())
    assert f"{state}: the loss is <nan>" in text and "its batch is in not_finite.safetensors" in text
    assert "3 samples could not be read" in text
    assert (f"{state} after 40 of 100 steps" in text) == (state != "finished")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "<b>"), ("message", 1), ("stage", None), ("written", {}), ("step", None), ("step", "<b>"),
        ("step", -1), ("steps", 10**400), ("epoch", 0.5), ("epochs", []), ("images_per_second", "1"),
        ("seconds", math.nan), ("seconds", None), ("seconds_left", math.inf),
    ],
)  # fmt: skip
def test_a_state_of_somebody_else(run: Path, name: str, value: object) -> None:
    """What is no state is left out, and the page is written of the rest."""
    (run / "progress.json").write_text(json.dumps({**RUNNING, name: value}))
    assert read_status(run) is None
    assert "unknown: there is no progress.json of a training" in " ".join(_page(run).text.split())


@pytest.mark.parametrize(
    ("head", "rows"),
    [
        ("train/loss", ["nan,1", "inf,1", "-1,1", "1e300,1"]),  # steps that are none
        ("train/loss", ["0,1e308", "1,-1e308", "2,1"]),  # the difference is no float
        ("train/loss", ["0,5e-324", "1,1e-323"]),
        ("val/a/certified_1e+-,val/a/certified_1.2.3,train/loss", ["0,1,1,1"]),  # no budgets
        ("train/loss", ["0," + "1" * 200_000, "1,1"]),  # longer than the reader of Python takes
        ("train/loss", ["0,\udcff", "1,1"]),  # no UTF-8
    ],
    ids=["steps", "range", "tiny", "budgets", "long", "bytes"],
)
def test_a_log_of_somebody_else(run: Path, head: str, rows: list[str]) -> None:
    (run / "metrics.csv").write_text("\n".join([f"step,{head}", *rows, ""]), "utf-8", "surrogateescape")
    (run / "skipped.csv").write_text(f"epoch,step\n{'1' * 200_000}\n0,1\n")
    page = _page(run)
    assert "1 samples could not be read" in page.text
    # A quote that is never closed: what comes before it is read.
    with open(run / "metrics.csv", "a") as file:
        file.write('1,"2\n' + "3,4\n" * 50_000)
    with open(run / "skipped.csv", "a") as file:
        file.write('1,"2\n' + "3,4\n" * 50_000)
    assert "1 samples could not be read" in _page(run).text
    (run / "metrics-².csv").write_text("step\n1\n")
    page = _page(run)
    numbers = [line["points"] for line in page.all("polyline")]
    assert not any(word in str(numbers) for word in ("nan", "inf"))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(LipsimError, match=r"has no training: neither progress\.json nor rows"):
        write_run_page(tmp_path)
    assert not is_training(tmp_path)
    (tmp_path / "progress.json").write_text('{"state": "running"')  # of another version, or damaged
    assert read_status(tmp_path) is None
    write_status(tmp_path, {**RUNNING, "steps": None, "seconds_left": None, "images_per_second": None, "epochs": None})
    page = _page(tmp_path)
    assert "No curves: there is no metrics.csv." in page.text and not page.all("progress") and not page.all("svg")
    (tmp_path / "results.json").write_text("{")
    assert "is no JSON" in _page(tmp_path).text
    write_status(tmp_path, {**RUNNING, "steps": None, "seconds": 100.0, "seconds_left": 300.0})
    assert _page(tmp_path).all("progress")[0]["value"] == "0.25"  # of its time


def test_report_shows_it_on_demand(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def report(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments])
        return stop.value.code  # type: ignore[return-value]

    assert report(str(run), f"run-1={run}") == 0
    assert "the page of a training is report/training-run-1-.html" in capsys.readouterr().out
    pages = sorted(path.name for path in Path("report").iterdir())
    assert pages == ["training-run-1-.html", "training-run-1.html"]  # and no comparison: nothing was tested
    written = re.sub("<title>.*?</title>|<h1>.*?</h1>", "", Path("report/training-run-1.html").read_text())
    assert written == re.sub("<title>.*?</title>|<h1>.*?</h1>", "", write_run_page(run).read_text())
    # Runs with results are compared besides, and what is no run at all is left to the comparison to refuse.
    update_results(run / "results.json", {"certified": certified_section({"a": [0.5]}, [1.0])})
    (page,), compared = write_training_pages([str(run), "nowhere"], Path("both"))
    assert compared == [str(run), "nowhere"] and not Path("both/training-nowhere.html").exists()
    assert "natural and certified at ℓ2 budgets ε" in page.read_text()


def test_an_empty_list_of_what_was_skipped_has_no_samples(run: Path) -> None:
    (run / "skipped.csv").touch()
    assert "samples could not be read" not in _page(run).text
    (run / "skipped-1.csv").write_text("epoch,step,sample,reason\n1,2,3,bad\n")
    assert "1 samples could not be read" in _page(run).text


def test_an_unfinished_folder_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/lr=0.1").mkdir(parents=True)
    update_results(Path("runs/lr=0.2/results.json"), {"certified": certified_section({"a": [0.5]}, [1.0])})
    assert find_results("runs/lr=0.1/results.json") == [("lr=0.1", Path("runs/lr=0.1/results.json"))]
    assert find_results("m=runs/lr=0.1/results.json") == [("m", Path("runs/lr=0.1/results.json"))]
    for pattern, name in (("runs/*", "lr=0.2"), ("m=runs/*", "m")):
        with pytest.raises(SystemExit) as stop:
            main(["report", pattern])
        said = capsys.readouterr()
        assert stop.value.code == 0 and "without a results.json so far" in said.err and "lr=0.1" in said.err
        assert f"| {name} | 90.0 | 50.0 |" in Path("report/report.md").read_text()


def test_ticks_are_round_and_span_the_values() -> None:
    assert ticks(0, 1, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]
    for low, high in ((0.0, 0.0), (2.5, 2.5), (-3e-7, 1e-6), (0, 1.2e6), (-7, -2)):
        found = ticks(low, high, 6)
        assert found[0] <= low <= high <= found[-1] and 2 <= len(found) <= 12


def test_points_are_where_their_values_are() -> None:
    found = chart("t", {"a": [(0, 0.0), (50, 0.5), (100, 1.0)], "none": [], "bad": [(1, float("nan"))]}, percent=True)
    assert found is not None and [line.name for line in found.lines] == ["a"]
    (line,), y = found.lines, {tick.label: tick.at for tick in found.y_ticks}
    assert [(dot.x, dot.y) for dot in line.dots] == [
        (found.left, y["0 %"]),
        ((found.left + found.right) / 2, pytest.approx((y["40 %"] + y["60 %"]) / 2)),
        (found.right, y["100 %"]),
    ]
    assert chart("t", {"a": [(1, float("inf"))]}) is None


def test_a_long_curve_keeps_its_means_and_its_end() -> None:
    points = [(float(x), x % 2) for x in range(100_001)]
    few = thinned(points)
    assert len(few) <= 400 and few[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for _, y in few[:-1])
    assert thinned(points[:400]) == points[:400]
