"""An evaluation that was cut short, by a signal or an error, continues; on one process or several."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import evaluations
import pytest
import torch
from evaluations import (
    BATCH,
    CERTIFY,
    COUNT,
    args,
    command_line_of,
    config,
    cut_short,
    fork_two,
    forked,
    kill_after,
    prepare,
    rows,
    run_command,
    write_config,
)

from lipsim import PerceptualMetric, students
from lipsim.cli.evaluate import evaluate, main
from lipsim.data import collate_triplets
from lipsim.data.loading import Finished, read_batch, remaining
from lipsim.datamodules import BuiltinData
from lipsim.metric import save
from lipsim.results import read_results


def _assert_same_files(run: Path, whole: Path) -> None:
    for name in ("results.json", "radii.csv", "attacks.csv", "plots/gallery.png"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (run / "unfinished").exists()


TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return evaluations.spy_on_embedding(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, patch)
        computed = evaluations.spy_on_embedding(patch)
        evaluate(args("whole"))
    assert computed == list(range(COUNT)) and not (folder / "whole/unfinished").exists()
    return folder / "whole"


@pytest.mark.no_cover  # test_what_is_left_is_continued_with_the_same_error runs the same
def test_what_a_kill_leaves_is_continued(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(config(steps=2))
    evaluate(args("whole"))
    assert computed == list(range(COUNT)) and not Path("whole/unfinished").exists()
    lines = cut_short(monkeypatch, 3, args("cut"))
    part = Path("cut/unfinished/part-0-of-1.jsonl")
    part.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])  # killed over the last line
    computed.clear()
    evaluate(args("cut"))
    assert len(lines) == 3 and computed == list(range(2 * BATCH, COUNT))
    _assert_same_files(Path("cut"), Path("whole"))


@pytest.mark.slow  # starts a process
def test_a_killed_run_continues(computed: list[int], whole: Path) -> None:
    shutil.copy(whole.parent / "metric.safetensors", "metric.safetensors")  # the order of a header changes by itself
    lines = kill_after(2, args("killed"))
    assert 2 <= len(lines) < 8
    part = Path("killed/unfinished/part-0-of-1.jsonl")
    part.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])  # killed over the last line
    evaluate(args("killed"))
    assert computed == list(range(BATCH * (len(lines) - 1), COUNT))
    _assert_same_files(Path("killed"), whole)


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
@pytest.mark.no_cover  # test_what_is_left_is_continued_with_the_same_error runs the same
def test_two_processes_give_the_results_of_one() -> None:
    """Started as torchrun would, but forked: Lightning's own start, of interpreters, is among the slow tests."""
    write_config(config(steps=2))
    evaluate(args("one"))
    fork_two(args("two", *TWO))
    _assert_results_of(Path("one"), Path("two"))


def test_a_log_file_is_told_of_what_is_continued(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = cut_short(monkeypatch, 3, args("cut", CERTIFY))
    evaluate(args("cut", CERTIFY, "--trainer.enable_progress_bar=true"))
    assert len(lines) == 3 and not Path("cut/unfinished").exists()


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_each_node_may_have_a_disk_of_its_own() -> None:
    def on_its_own() -> None:
        evaluate(args(f"disk{os.environ['RANK']}", CERTIFY, *TWO))

    evaluate(args("one", CERTIFY))
    forked(2, on_its_own)
    found, one = (read_results(Path(f"{name}/results.json"))["certified"]["sets"] for name in ("disk0", "one"))
    assert found == one and not Path("disk0/unfinished").exists()


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_certified_scores_are_the_same_on_one_two_and_three_processes() -> None:
    """17 triplets, which neither two nor three processes can share evenly, in batches that do not divide them."""
    given = [CERTIFY, "--data.num_test=17", "--trainer.strategy=ddp"]
    evaluate(args("on1", CERTIFY, "--data.num_test=17"))
    one = read_results(Path("on1/results.json"))
    for count in (2, 3):
        forked(count, evaluate, args(f"on{count}", *given, f"--trainer.devices={count}"))
        found = read_results(Path(f"on{count}/results.json"))
        assert found["certified"]["sets"].keys() == one["certified"]["sets"].keys()
        for name, scores in one["certified"]["sets"].items():
            for key in ("majority", "vote", "certified", "published", "joint", "num_triplets"):
                assert scores[key] == found["certified"]["sets"][name][key]
        ours, theirs = (rows(f"{folder}/radii.csv") for folder in ("on1", f"on{count}"))
        assert [row["index"] for row in theirs] == list(range(17))
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


@pytest.mark.slow  # starts processes: half a minute of two cores
def test_one_process_finishes_what_two_began(computed: list[int], whole: Path) -> None:
    shutil.copy(whole.parent / "metric.safetensors", "metric.safetensors")
    lines = kill_after(3, args("mixed", *TWO))
    computed.clear()
    evaluate(args("mixed"))
    done = {i for line in lines for i in json.loads(line)["index"]}
    assert done and set(range(COUNT)) - done <= set(computed) and len(computed) < COUNT
    _assert_results_of(whole, Path("mixed"))


def _assert_results_of(whole: Path, other: Path) -> None:
    """Scores exactly, radii to a relative 1e-5."""
    one, found = (read_results(folder / "results.json") for folder in (whole, other))
    scores, others = one["certified"]["sets"]["builtin"], found["certified"]["sets"]["builtin"]
    for key in ("majority", "vote", "certified", "published", "joint", "num_triplets"):
        assert scores[key] == others[key]
    assert one["attacked"]["sets"] == found["attacked"]["sets"]
    moves, others = (results["null_space"]["sets"]["builtin"]["metrics"] for results in (one, found))
    for kind in ("mean_length", "largest_change", "largest_distance", "flipped", "exact"):
        assert moves["metric"]["moves"][kind] == pytest.approx(others["metric"]["moves"][kind], rel=1e-5, abs=1e-9)
    assert one["certified"]["data_sha256"] == found["certified"]["data_sha256"]
    tables = [rows(str(folder / "radii.csv")) for folder in (whole, other)]
    assert len(tables[1]) == COUNT
    for a, b in zip(*tables, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_rows_of_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(config(steps=2))
    cut_short(monkeypatch, 1, args("run"))
    save(PerceptualMetric(students.OrthogonalProjection(16, 4), 16), "metric.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(args("run", "--data.seed=3"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "differs in metric_sha256, data;" in error and error.count("error:") == 1
    assert Path("run/unfinished/part-0-of-1.jsonl").is_file()


class TwoSets(BuiltinData):
    """Two test sets of one module, the second with fewer batches."""

    def __init__(self) -> None:
        super().__init__(num_test=9, image_size=16, batch_size=2)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        other = BuiltinData(num_test=5, image_size=16, seed=3)
        other.setup(stage)
        self.test_sets = {**self.test_sets, "other": other.test_sets["builtin"]}


@pytest.mark.slow  # starts processes: a minute of two cores
def test_two_sets_from_one_process_to_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command_line_of(TwoSets, tmp_path, monkeypatch)
    write_config(config(steps=60) | {"data": {"class_path": "lipsim.datamodules.TwoSets"}})
    evaluate(args("whole"))
    two = args("resumed", "--trainer.devices=2", "--trainer.strategy=ddp")
    first = cut_short(monkeypatch, 2, args("resumed"))
    second = kill_after(len(first) + 2, two)
    assert 2 <= len(first) < len(second) < 8
    run_command(two)
    whole, resumed = (read_results(Path(folder, "results.json")) for folder in ("whole", "resumed"))
    assert list(resumed["certified"]["sets"]) == ["builtin", "other"]
    for name, scores in whole["certified"]["sets"].items():
        for key in ("num_triplets", "majority", "vote", "certified", "published", "joint"):
            assert resumed["certified"]["sets"][name][key] == scores[key]
    assert resumed["attacked"]["sets"] == whole["attacked"]["sets"]
    assert resumed["certified"]["feature_error"] == whole["certified"]["feature_error"]


def test_what_is_left_is_continued_with_the_same_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(config(steps=2))
    cut_short(monkeypatch, 1, args("run"))
    path = Path("run/unfinished/fingerprint.json")
    settings = json.loads(path.read_text())
    measured = settings["feature_error"]
    assert measured > 0
    for error, message in ((measured / 2, "whose features were off by at most"), (None, "no fingerprint.json")):
        path.unlink() if error is None else path.write_text(json.dumps({**settings, "feature_error": error}))
        with pytest.raises(SystemExit):
            main(args("run"))
        assert message in capsys.readouterr().err
    path.write_text(json.dumps({**settings, "feature_error": 2 * measured}))
    evaluate(args("run"))
    assert read_results(Path("run/results.json"))["certified"]["feature_error"] == 2 * measured


def test_batches_keep_their_composition() -> None:
    data = BuiltinData(num_test=5, image_size=16, batch_size=2)
    data.setup("test")
    loader = remaining(data.test_dataloader()[0], {0, 1, 2})
    batches = list(loader)
    assert isinstance(batches[0], Finished)
    assert [batch.index.tolist() for batch in batches[1:]] == [[2, 3], [4]]
    whole = collate_triplets([data.test_sets["builtin"][0]])
    assert torch.equal(read_batch(loader, [0]).reference, whole.reference)
