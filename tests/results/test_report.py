"""`lipsim report` on results of two runs, and the tables in each format."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from sections import SOURCE, attacked_section, certified_section, smoothed_section

from lipsim.cli.main import main
from lipsim.results import SCHEMA, plots, read_results, report, update_results
from lipsim.results.comparison import effort
from lipsim.results.formats import escape_latex, html_page, latex_table, markdown_table
from lipsim.results.report import write_report
from lipsim.results.runs import load_runs
from lipsim.results.schema import Scores
from lipsim.results.tables import smoothed_rows


def _write(
    folder: Path, natural: float, eps: dict[str, float], scores: list[float], data: str = "d", **changed: float
) -> Path:
    source = {"weights_sha256": f"w{natural}", "data_sha256": {"builtin": data}}
    budgets = list(eps.values())
    certified = certified_section({"builtin": scores}, budgets, source=source, **{"majority": natural, **changed})
    left: Scores = {label: score + 0.05 for label, score in zip(eps, scores, strict=True)}
    attacked = attacked_section({"metric": (natural, left), "teacher": (natural, left)}, budgets, **source)
    update_results(folder / "results.json", {"certified": certified})
    update_results(folder / "results.json", {"attacked": attacked})
    (folder / "plots").mkdir()
    matplotlib.image.imsave(folder / "plots" / "gallery.png", [[0.0, 1.0], [1.0, 0.0]])
    (folder / "plots" / ".0.tmp.png").touch()  # of a process that was killed
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    small = {"36/255": 36 / 255, "72/255": 72 / 255}
    return [
        str(_write(tmp_path / "first_run", 0.876, small, [0.654, 0.321])),
        f"<B> & 100%={_write(tmp_path / 'second', 0.9, {**small, '1': 1.0}, [0.7, 0.6, 0.123])}",
    ]


def _report(*args: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, args)])
    return stop.value.code  # type: ignore[return-value]


def test_reports_hold_the_numbers(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _report(*runs, "--output", out, "--radius", "certified", "published") == 0
    assert "first_run" in capsys.readouterr().out
    markdown = (out / "report.md").read_text()
    assert "| metric | natural | 36/255 | 72/255 | 1 |" in markdown
    assert "| first_run | 87.6 | 65.4 | 32.1 |  |" in markdown
    assert "| <B> & 100%, published radius | 90.0 | 35.0 | 30.0 | 6.2 |" in markdown  # 6.15 rounds to even
    assert "| first_run: teacher (apgd, square; 20 steps) | 87.6 | 70.4 | 37.1 |  |" in markdown
    latex = (out / "report.tex").read_text()
    assert r"first\_run & 87.6 & 65.4 & 32.1 & -- \\" in latex
    assert r"\textless{}B\textgreater{} \& 100\% & 90.0 & 70.0 & 60.0 & 12.3 \\" in latex
    assert r"\multicolumn{3}{c}{Certified score}" in latex and r"$\frac{36}{255}$ & $\frac{72}{255}$ & $1$" in latex
    for name in ("table", "tabular"):
        assert latex.count(rf"\begin{{{name}}}") == latex.count(rf"\end{{{name}}}") == 2
    assert latex.count("{") == latex.count("}") and latex.isascii()
    with open(out / "report.csv", newline="") as file:
        rows = {(r["run"], r["metric"], r["score"], r["eps"]): float(r["value"]) for r in csv.DictReader(file)}
    assert rows["first_run", "metric", "certified", "36/255"] == 0.654
    assert rows["first_run", "metric", "majority", ""] == 0.876
    (attacked,) = (
        key for key in rows if key[:2] == ("<B> & 100%", "teacher") and "attacked" in key[2] and key[3] == "1"
    )
    assert attacked[2].startswith("attacked, norm 2 (") and rows[attacked] == pytest.approx(0.173)
    assert (out / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert (out / "curves.png").stat().st_size > 5000


def test_smoothed_metrics_are_rows_beside_the_exact_ones(tmp_path: Path) -> None:
    eps = [36 / 255, 1.0]
    scores: Scores = {"36/255": 0.61, "1": 0.0}
    smoothed = smoothed_section({"metric": (0.72, scores), "teacher": (0.75, scores)}, eps)
    exact = certified_section({"builtin": [0.7, 0.5]}, eps, source=SOURCE)
    for name, sections in (("both", {"certified": exact, "smoothed": smoothed}), ("alone", {"smoothed": smoothed})):
        update_results(tmp_path / name / "results.json", sections)  # type: ignore[arg-type]
    runs = load_runs([str(tmp_path / "both"), str(tmp_path / "alone")])
    write_report(runs, tmp_path / "out")
    markdown = (tmp_path / "out/report.md").read_text()
    assert "| metric | natural | abstains | passes | 36/255 | 1 |" in markdown
    assert "| both | 90.0 |  | 3 | 70.0 | 50.0 |" in markdown
    row = "smoothed, σ = 0.25, n = 1000, α = 0.001 an answer | {} | 20.0 | 1378 | 61.0 | 0.0 |"
    assert f"| both, {row.format('72.0')}" in markdown and f"| alone: teacher, {row.format('75.0')}" in markdown
    # With noise on all images: where all move, and where one does.
    jointly = smoothed_section({"metric": (0.8, scores)}, eps, moving="all")
    jointly["sets"]["builtin"]["metrics"]["metric"]["certified_single"] = {"36/255": 0.7, "1": 0.2}
    update_results(tmp_path / "jointly" / "results.json", {"smoothed": jointly})
    write_report(load_runs([str(tmp_path / "jointly")]), tmp_path / "jointly")
    all_images, cells = (tmp_path / "jointly/report.md").read_text(), "| 80.0 | 20.0 | 1378 |"
    named = "| jointly, smoothed, σ = 0.25, n = 1000, α = 0.001 an answer, "
    assert f"{named}all three images move {cells} 61.0 | 0.0 |" in all_images
    assert f"{named}noise on all, one image moves {cells} 70.0 | 20.0 |" in all_images
    assert [row["36/255"] for row in smoothed_rows(jointly)] == ["61.0", "70.0"]
    numbers = (tmp_path / "jointly/report.csv").read_text()
    assert 'α = 0.001 an answer, noise on all, one image moves: certified",1,0.2' in numbers
    latex = (tmp_path / "out/report.tex").read_text()
    assert latex.isascii() and r"$\sigma$ = 0.25" in latex and r"$\alpha$ = 0.001" in latex
    numbers = (tmp_path / "out/report.csv").read_text()
    assert 'builtin,alone,teacher,"smoothed, σ = 0.25, n = 1000, α = 0.001 an answer: certified",36/255,0.61' in numbers
    page = (tmp_path / "out/report.html").read_text()
    assert "100 draws to choose an answer" in page


def test_the_page_needs_nothing_else(runs: list[str], tmp_path: Path) -> None:
    assert _report(*runs, "--output", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # the curves and a gallery for each run
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|<script|<B>""", page)
    for text in ("87.6", "65.4", "12.3", "&lt;B&gt; &amp; 100%", "w0.876", "1.00001"):
        assert text in page


def test_runs_that_do_not_compare(tmp_path: Path) -> None:
    a = _write(tmp_path / "a", 0.8, {"1": 1.0}, [0.5])
    b = _write(tmp_path / "b", 0.9, {"1": 1.0}, [0.5], data="other")
    assert _report(a, b, "--output", tmp_path / "out") == 0
    for file in ("report.md", "report.html"):
        assert "Different data under the name builtin: a; b." in (tmp_path / "out" / file).read_text()


def test_bad_runs_are_one_line(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("text", "hello"),
        ("old", '{"schema": 1}'),
        ("empty", json.dumps({"schema": SCHEMA, "versions": {}})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    for args, message in (
        ([tmp_path / "nowhere"], "no results at"),
        ([tmp_path / "text"], "is no JSON"),
        ([tmp_path / "old"], "of an older lipsim"),
        ([tmp_path / "empty"], "neither certified nor attacked"),
        ([runs[0], runs[0]], "several runs are called first_run"),
        ([runs[0], "--radius", "guessed"], "invalid choice"),
    ):
        assert _report(*args, "--output", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "begun").mkdir()
    assert _report(tmp_path / "begun", "--output", tmp_path / "out") == 1 and "no results at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert _report(runs[0], tmp_path / "begun", "--output", tmp_path / "out") == 0
    assert f"left out, without a results.json so far: {tmp_path / 'begun'}" in capsys.readouterr().err


def test_names_of_somebody_else_run_nothing_in_a_page() -> None:
    """In every place that takes a text: names of runs, sets, columns and pictures come from files."""
    hostile = "\"'><script>alert(1)</script>"
    rows = [{hostile: hostile}]
    picture = {"title": hostile, "heading": hostile, "base64": "AA=="}
    sets = [{"name": hostile, "tables": [{"title": hostile, "rows": rows}], "curves": picture}]
    page = html_page(
        warnings=[hostile],
        notes=[hostile],
        sets=sets,
        runs=[{"name": hostile, "facts": rows, "pictures": [picture]}],
    )
    assert page.count("alert(1)") >= 12 and "<script" not in page and "'>" not in page and hostile not in page


def test_cells_are_escaped() -> None:
    rows = [{"metric": "a|b <i>", "natural": "1"}]
    assert "| a\\|b <i> | 1 |" in markdown_table(rows)
    run = {"name": "a <b>", "facts": rows, "pictures": []}
    page = html_page(warnings=["<u>"], sets=[], runs=[run])
    assert "<td>a|b &lt;i&gt;</td>" in page and "<h2>a &lt;b&gt;</h2>" in page and "<strong>&lt;u&gt;</strong>" in page
    assert escape_latex("λ = 8, τ") == r"$\lambda$ = 8, $\tau$"
    assert escape_latex("50 % of $x_1^2\\\n ℓ∞ ε") == (
        r"50 \% of \$x\_1\textasciicircum{}2\textbackslash{} $\ell_\infty$ $\varepsilon$"
    )


def test_fractions_of_votes_have_a_column_and_ties_are_counted(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", 0.8, {"1": 1.0}, [0.5], vote=0.75, num_tied_votes=12)
    second = _write(tmp_path / "b", 0.9, {"1": 1.0}, [0.6])
    out = tmp_path / "out"
    assert _report(first, second, "--output", out) == 0
    markdown, latex = (out / "report.md").read_text(), (out / "report.tex").read_text()
    assert "| metric | natural | vote share | 1 |" in markdown and "| a | 80.0 | 75.0 | 50.0 |" in markdown
    assert "188 to 200 triplets (and 12 with a tied vote, left out)" in markdown
    assert r"\begin{tabular}{lccc}" in latex and r"\cmidrule(lr){4-4}" in latex and "a & 80.0 & 75.0 & 50.0" in latex


def test_what_has_no_gradient_stands_in_the_table(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", 0.8, {"1": 1.0}, [0.5])
    content = read_results(folder / "results.json")["attacked"]
    content["sets"]["builtin"]["metrics"]["teacher"]["no_gradient"] = 17
    update_results(folder / "results.json", {"attacked": content})
    tables = write_report(load_runs([str(folder)]), tmp_path / "report")
    (attacked,) = [table for table in tables if "under attack" in table.title]
    assert [row["no gradient"] for row in attacked.rows] == ["0", "17"] and "no gradient" in attacked.title
    assert "17" in (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")


def test_a_colour_a_metric_and_a_line_style_a_radius(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, write = [], plots.save

    def keep(figure: Figure, path: Path, dpi: int) -> None:
        drawn.append(figure)
        write(figure, path, dpi)

    monkeypatch.setattr(plots, "save", keep)
    runs = [_write(tmp_path / name, natural, {"1": 1.0}, [0.5]) for name, natural in (("one", 0.8), ("two", 0.9))]
    write_report(load_runs(list(map(str, runs))), tmp_path / "report", ["certified", "published", "joint"])
    (axes,) = drawn[0].axes
    curves = [line for line in axes.lines if line.get_linestyle() != "None" and line.get_color() != "0.7"]
    assert {line.get_color() for line in curves} == {"C0", "C1"}
    assert {line.get_linestyle() for line in curves if line.get_marker() == "None"} == {"-", "--", ":"}
    (legend,) = drawn[0].legends
    drawn[0].canvas.draw()
    assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0 + 1
    labels = [text.get_text() for text in legend.texts]
    assert labels == ["one", "two", "exact radius", "published radius", "all three images move", "under attack"]
    assert drawn[0].get_figwidth() == 3.3


def _spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, Any, Any]]:
    """Name of a PNG → title, certified and attacked curves that were drawn into it."""
    drawn: dict[str, tuple[str, Any, Any]] = {}

    def draw(path: Path, certified: Any, attacked: Any, title: str) -> None:
        if path.suffix == ".png":
            assert path.name not in drawn
            drawn[path.name] = title, certified, attacked
        path.parent.mkdir(exist_ok=True)
        path.write_text(title)

    monkeypatch.setattr(report, "plot_scores", draw)
    return drawn


def test_each_set_has_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _spied(monkeypatch)
    names = ["noise 0.1", "noise 0.5", "noise/0.5", "Noise 0.5"]
    section = certified_section({name: [0.5] for name in names}, [1.0], source={**SOURCE, "data_sha256": {}})
    section["data_sha256"] = dict.fromkeys(names, "d")
    update_results(tmp_path / "run/results.json", {"certified": section})
    write_report(load_runs([str(tmp_path / "run")]), tmp_path / "out")
    files = ["curves-noise-0.1.png", "curves-noise-0.5.png", "curves-noise-0.5-2.png", "curves-Noise-0.5-3.png"]
    assert {file: title for file, (title, *_) in drawn.items()} == dict(zip(files, names, strict=True))
    page = (tmp_path / "out/report.html").read_text()
    shown = [base64.b64decode(found).decode() for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    assert shown == names


def test_attacks_in_another_norm_alone_have_a_table_and_no_picture(tmp_path: Path) -> None:
    attacked = attacked_section({"metric": (0.9, {"4/255": 0.1})}, [4 / 255], norm="inf")
    update_results(tmp_path / "run/results.json", {"attacked": attacked})
    (table,) = write_report(load_runs([str(tmp_path / "run")]), tmp_path / "out")
    assert table.rows[0]["4/255"] == "10.0" and not list((tmp_path / "out").glob("curves*"))
    assert "data:image" not in (tmp_path / "out/report.html").read_text()


def test_a_sum_alone_has_no_published_radius(tmp_path: Path) -> None:
    found = certified_section({"builtin": [0.5]}, [1.0])
    keys = ("weights_sha256", "data_sha256", "feature_error", "eps")
    summed: Any = {key: found[key] for key in keys}  # type: ignore[literal-required]
    scores: Any = {k: v for k, v in found["sets"]["builtin"].items() if k not in ("published", "one_pixel_immune")}
    del scores["curve"]["published"]
    summed |= {"second": "scattering", "second_sha256": "x", "weight": 8.0, "scale": 0.03, "second_feature_error": 0.0}
    update_results(tmp_path / "run/results.json", {"summed": {**summed, "sets": {"builtin": scores}}})
    runs = load_runs([str(tmp_path / "run")])
    assert write_report(runs, tmp_path / "out", ["published"]) == []
    assert not list((tmp_path / "out").glob("curves*"))
    (table,) = write_report(runs, tmp_path / "both", ["certified", "published"])
    assert [row["1"] for row in table.rows] == ["50.0"]


def test_an_attack_stands_beside_the_radius_that_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _spied(monkeypatch)
    for folder, target, left in (("x", "all", 0.1), ("y", "reference", 0.4)):
        attacked = attacked_section({"metric": (0.9, {"1": left})}, [1.0], target=target)
        section = certified_section({"builtin": [0.5]}, [1.0])
        update_results(tmp_path / folder / "results.json", {"certified": section, "attacked": attacked})
    runs = load_runs([f"m={tmp_path / 'x'}", f"m={tmp_path / 'y'}"], seeds=True)
    reference = {"under attack": ([0.0, 1.0], [0.9, 0.4])}
    everything = {"all three images under attack": ([0.0, 1.0], [0.9, 0.1])}
    for number, (kinds, expected) in enumerate(
        ((["certified"], reference), (["joint"], everything), (["certified", "joint"], {**reference, **everything}))
    ):
        write_report(runs, tmp_path / str(number), kinds)  # type: ignore[arg-type]
        assert drawn.pop("curves.png")[2] == {"m": expected}
    with open(tmp_path / "0/report.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["score"].startswith("attacked")]
    how = f"({effort(attacked)})"
    assert {row["score"]: (float(row["value"]), row["runs"]) for row in rows} == {
        f"attacked, norm 2, all {how}": (0.1, "1"),
        f"attacked, norm 2 {how}": (0.4, "1"),
    }


def test_what_differs_in_more_than_a_seed_is_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of draws or of steps under one name: in the file of numbers and in curves as in tables."""
    drawn = _spied(monkeypatch)
    for folder, draws, steps, score in (("x", 100, 2, 0.9), ("y", 1000, 100, 0.1)):
        attacked = attacked_section({"metric": (0.9, {"1": score})}, [1.0], steps=steps)
        smoothed = smoothed_section({"metric": (0.9, {"1": score})}, [1.0], n=draws)
        update_results(tmp_path / folder / "results.json", {"attacked": attacked, "smoothed": smoothed})
    write_report(load_runs([f"m={tmp_path / 'x'}", f"m={tmp_path / 'y'}"], seeds=True), tmp_path / "out")
    (certified, attacked_curves) = drawn["curves.png"][1:3]
    assert len(certified["m"]) == len(attacked_curves["m"]) == 2
    with open(tmp_path / "out/report.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eps"] == "1"]
    assert sorted((float(row["value"]), row["runs"]) for row in rows) == [(0.1, "1")] * 2 + [(0.9, "1")] * 2


def test_searches_of_the_null_space_alone_are_a_report(tmp_path: Path) -> None:
    reach: Any = {"mean_length": 1.0, "largest_length": 1.0, "rmse": 0.1, "ssim": 0.2, "lpips": None}
    moves: Any = {
        "mean_length": 1.0, "median_change": 0.0, "largest_change": 0.0, "exact": 1.0, "largest_distance": 0.0,
        "flipped": 0.0,
    }  # fmt: skip
    found: Any = {"layer": "0", "reason": None, "moves": moves, "same": {"random": reach}, "answer": {"random": reach}}
    sets: Any = {"a_$5_$6": {"num_triplets": 3, "metrics": {"metric": found}}}
    section: Any = {**SOURCE, "seed": 0, "same": None, "max_triplets": None, "sets": sets}
    update_results(tmp_path / "run/results.json", {"null_space": section})
    tables = write_report(load_runs([str(tmp_path / "run")]), tmp_path / "out")
    assert tables and not list((tmp_path / "out").glob("curves*"))


def test_a_set_whose_name_is_mathematics_is_drawn(tmp_path: Path) -> None:
    section = certified_section({"a_$5_$6": [0.5]}, [1.0])
    update_results(tmp_path / "run/results.json", {"certified": section})
    write_report(load_runs([str(tmp_path / "run")]), tmp_path / "out")
    assert (tmp_path / "out/curves.png").is_file()


def test_a_run_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for the results of the current folder."""
    update_results(tmp_path / "results.json", {"durations": {"seconds": {"teacher": 1.0}}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="typo"):
        load_runs(["typo"])


def test_how_far_references_move_stands_in_the_report(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", 0.8, {"1": 1.0}, [0.5])
    reach = {"mean_length": 12.345, "largest_length": 20.0, "rmse": 0.1234, "ssim": 0.5, "lpips": 0.25}
    found = {"layer": "Conv2d first", "reason": None, "moves": None, "same": {"semantic": reach}, "answer": {}}
    sets = {"builtin": {"num_triplets": 200, "metrics": {"metric": found, "teacher": {**found, "same": {}}}}}
    section: Any = {"weights_sha256": "w0.8", "data_sha256": {"builtin": "d"}, "seed": 0, "same": 0.1, "sets": sets}
    update_results(folder / "results.json", {"null_space": section})
    out = tmp_path / "report"
    write_report(load_runs([str(folder)]), out)
    assert "| run, same, semantic | 12.35 | 20.00 | 0.123 | 0.500 | 0.250 |" in (out / "report.md").read_text()
    assert "run, same, semantic" in (out / "report.html").read_text()
    assert r"run, same, semantic & 12.35" in (out / "report.tex").read_text()
    with open(out / "report.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "null space, same, semantic, length"]
    assert [float(row["value"]) for row in rows] == [12.345]


def test_headings_of_latex_keep_abbreviations_and_symbols() -> None:
    table = latex_table([dict.fromkeys(("metric", "RMSE", "median R", "n", "ν", "vote share"), "1")], "", [], "")
    for heading in ("Metric", "RMSE", "Median R", "n", "Vote share"):
        assert f"{{*}}{{{heading}}}" in table
    assert r"{*}{$\nu$}" in table


def test_budgets_of_latex_headings_may_name_their_norm() -> None:
    table = latex_table(
        [{"metric": "a", "36/255": "1", "1": "2", "ℓ∞ 4/255": "3"}], "", ["36/255", "1", "ℓ∞ 4/255"], "ε"
    )
    assert r"$\frac{36}{255}$ & $1$ & $\ell_\infty$ $\frac{4}{255}$" in table
