"""scripts/evaluate.py as its users run it: killed and continued, on two processes, on bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lipsim import PerceptualMetric, students, teachers
from lipsim.cli.evaluate import evaluate, main
from lipsim.data import BuiltinTriplets, Triplet, collate_triplets
from lipsim.data.loading import Finished, read_batch, remaining
from lipsim.datamodules import BuiltinData
from lipsim.evaluation.exported import ExportedMetric
from lipsim.metric import load, save
from lipsim.results import read_results
from lipsim.training import FineTuning

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts/evaluate.py")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
COUNT, BATCH = 15, 2


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    save(PerceptualMetric(students.OrthogonalProjection(16, 8), 16), "metric.safetensors")
    Path("config.yaml").write_text(yaml.safe_dump(_config()))


def _config(steps: int = 80) -> dict[str, Any]:
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lipsim.callbacks.CertifyRadii", "init_args": {"error_sample": 4}},
                {"class_path": "lipsim.callbacks.AttackRobustness", "init_args": {"steps": steps, "queries": 40}},
                {"class_path": "lipsim.callbacks.NullSpaceRobustness"},
                {"class_path": "lipsim.callbacks.TripletGallery", "init_args": {"num_triplets": 1, "steps": 5}},
            ],
        },
        "data": {
            "class_path": "lipsim.datamodules.BuiltinData",
            "init_args": {"num_test": COUNT, "image_size": 16, "batch_size": BATCH},
        },
    }


def _args(folder: str, *more: str) -> list[str]:
    given = ["--config", "config.yaml", "--checkpoint", "metric.safetensors", "--trainer.default_root_dir", folder]
    return [*given, *more]


def _kill_after(batches: int, args: list[str]) -> list[str]:
    """Start an evaluation, kill it and its children when some batches are finished; returns the lines that are kept."""
    folder = Path(args[args.index("--trainer.default_root_dir") + 1]) / "unfinished"
    process = subprocess.Popen(
        [*SCRIPT, *args], env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines: list[str] = []
    try:
        deadline = time.monotonic() + 200
        while len(lines) < batches and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            lines = [line for path in folder.glob("part-*.jsonl") for line in path.read_text().splitlines()]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return [line for path in folder.glob("part-*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the triplets that evaluations in this process embed."""
    seen: list[int] = []
    step = ExportedMetric.test_step

    def spy(self: ExportedMetric, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        seen.extend([] if isinstance(batch, Finished) else batch.index.tolist())
        return step(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(ExportedMetric, "test_step", spy)
    return seen


def test_a_killed_run_continues(computed: list[int]) -> None:
    evaluate(_args("whole"))
    assert computed == list(range(COUNT)) and not Path("whole/unfinished").exists()
    computed.clear()
    lines = _kill_after(2, _args("killed"))
    assert 2 <= len(lines) < 8
    part = Path("killed/unfinished/part-0-of-1.jsonl")
    part.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])  # killed over the last line
    evaluate(_args("killed"))
    assert computed == list(range(BATCH * (len(lines) - 1), COUNT))
    for name in ("results.json", "radii.csv", "attacks.csv", "plots/gallery.png"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert not Path("killed/unfinished").exists()


def test_two_processes_give_the_results_of_one(computed: list[int]) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    evaluate(_args("one"))
    run = subprocess.run([*SCRIPT, *_args("two", *two)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = _kill_after(3, _args("mixed", *two))
    computed.clear()
    evaluate(_args("mixed"))  # what two processes began, one finishes
    done = {i for line in lines for i in json.loads(line)["index"]}
    assert done and set(range(COUNT)) - done <= set(computed) and len(computed) < COUNT
    one = read_results(Path("one/results.json"))
    for other in ("two", "mixed"):
        found = read_results(Path(other, "results.json"))
        scores, others = one["certified"]["sets"]["builtin"], found["certified"]["sets"]["builtin"]
        for key in ("majority", "vote", "certified", "published", "joint", "num_triplets"):
            assert scores[key] == others[key]
        assert one["attacked"]["sets"] == found["attacked"]["sets"]
        assert one["certified"]["data_sha256"] == found["certified"]["data_sha256"]
        tables = []
        for folder in ("one", other):
            with open(Path(folder, "radii.csv"), newline="") as file:
                tables.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
        assert len(tables[1]) == COUNT
        for a, b in zip(*tables, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_rows_of_something_else_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _kill_after(1, _args("run"))
    save(PerceptualMetric(students.OrthogonalProjection(16, 4), 16), "metric.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(_args("run", "--data.seed=3"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "differs in checkpoint_sha256, data;" in error and error.count("error:") == 1
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


def _command_line_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command line's processes import a data module of these tests."""
    runner = folder / "run.py"
    runner.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_evaluate, lipsim.datamodules\n"
        f"lipsim.datamodules.{name} = test_evaluate.{name}\n"
        "from lipsim.cli.evaluate import main\nif __name__ == '__main__':\n    main()\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", [sys.executable, str(runner)])


def test_two_sets_from_one_process_to_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lipsim.datamodules.TwoSets", TwoSets, raising=False)
    _command_line_of("TwoSets", tmp_path, monkeypatch)
    config = _config(steps=60) | {"data": {"class_path": "lipsim.datamodules.TwoSets"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    evaluate(_args("whole"))
    two = _args("resumed", "--trainer.devices=2", "--trainer.strategy=ddp")
    first = _kill_after(2, _args("resumed"))
    second = _kill_after(len(first) + 2, two)
    assert 2 <= len(first) < len(second) < 8
    run = subprocess.run([*SCRIPT, *two], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    whole, resumed = (read_results(Path(folder, "results.json")) for folder in ("whole", "resumed"))
    assert list(resumed["certified"]["sets"]) == ["builtin", "other"]
    for name, scores in whole["certified"]["sets"].items():
        for key in ("num_triplets", "majority", "vote", "certified", "published", "joint"):
            assert resumed["certified"]["sets"][name][key] == scores[key]
    assert resumed["attacked"]["sets"] == whole["attacked"]["sets"]
    assert resumed["certified"]["feature_error"] == whole["certified"]["feature_error"]


def test_checkpoints_of_training_are_evaluated_too() -> None:
    metric = PerceptualMetric(students.OrthogonalProjection(16, 8), 16)
    stage = FineTuning(init_from=save(metric, "start.safetensors"))
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=2, enable_progress_bar=False, limit_val_batches=0)
    trainer.fit(stage, BuiltinData(num_train=8, num_val=2, image_size=16, batch_size=4))
    trainer.save_checkpoint("last.ckpt")
    certify = "--trainer.callbacks=lipsim.callbacks.CertifyRadii"
    evaluate(_args("ckpt", certify, "--checkpoint=last.ckpt"))
    evaluate(_args("file", certify, f"--checkpoint={save(stage.metric, 'last.safetensors')}"))
    found, expected = (read_results(Path(folder, "results.json"))["certified"] for folder in ("ckpt", "file"))
    assert found == expected
    torch.save({"state_dict": {}}, "other.ckpt")
    with pytest.raises(ValueError, match="does not say how to rebuild a metric"):
        load("other.ckpt")


def test_what_is_left_is_continued_with_the_same_error(capsys: pytest.CaptureFixture[str]) -> None:
    _kill_after(1, _args("run"))
    path = Path("run/unfinished/fingerprint.json")
    settings = json.loads(path.read_text())
    measured = settings["feature_error"]
    assert measured > 0
    for error, message in ((measured / 2, "whose features were off by at most"), (None, "no fingerprint.json")):
        path.unlink() if error is None else path.write_text(json.dumps({**settings, "feature_error": error}))
        with pytest.raises(SystemExit):
            main(_args("run"))
        assert message in capsys.readouterr().err
    path.write_text(json.dumps({**settings, "feature_error": 2 * measured}))
    evaluate(_args("run"))
    assert read_results(Path("run/results.json"))["certified"]["feature_error"] == 2 * measured


def test_nothing_of_another_evaluation_stays() -> None:
    evaluate(_args("run", "--trainer.callbacks.steps=1"))
    certify = ["--trainer.callbacks=lipsim.callbacks.CertifyRadii"]
    evaluate(_args("run", *certify))
    assert Path("run/attacks.csv").is_file() and "attacked" in read_results(Path("run/results.json"))  # the same data
    evaluate(_args("run", *certify, "--data.seed=5"))
    assert sorted(path.name for path in Path("run").glob("*.csv")) == ["radii.csv"]
    assert not list(Path("run/plots").glob("*.png")) and "attacked" not in read_results(Path("run/results.json"))


class BadData(BuiltinData):
    """Built-in triplets with a fault in the seventh."""

    def __init__(self, fault: str) -> None:
        super().__init__(num_test=8, image_size=16, batch_size=2)
        self.fault = fault

    def setup(self, stage: str) -> None:
        super().setup(stage)
        triplets = [self.test_sets["builtin"][i] for i in range(8)]
        x = triplets[6]
        if self.fault == "nan":
            triplets[6] = Triplet(x.reference * float("nan"), x.left, x.right, x.right_vote, x.index)
        elif self.fault == "vote":
            triplets[6] = Triplet(x.reference, x.left, x.right, x.right_vote * float("nan"), x.index)
        elif self.fault == "none":
            self.collate = lambda batch: torch.stack([triplet.reference for triplet in batch])
        self.test_sets = {"builtin": [] if self.fault == "empty" else triplets}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "have NaN or infinite pixels (triplets [6, 7]"),
        ("vote", "triplets [6] have no vote in [0, 1]"),
        ("none", "no triplets with votes"),
        ("empty", "has no test triplets"),
    ],
)
def test_bad_data_is_one_line(
    fault: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipsim.datamodules.BadData", BadData, raising=False)
    config = _config(steps=1) | {"data": {"class_path": "lipsim.datamodules.BadData", "init_args": {"fault": fault}}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(_args("run"))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 1 and len(errors) == 1 and message in errors[0]


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    vit = teachers.SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    save(PerceptualMetric(vit, 16, lipschitz=float("inf")), "teacher.safetensors")
    certify = "--trainer.callbacks=lipsim.callbacks.CertifyRadii"
    for more, message in (
        (["--checkpoint=teacher.safetensors"], "no Lipschitz bound is known for SmallViT"),
        (["--checkpoint=nothing.safetensors"], "no metric file nothing.safetensors"),
        ([certify, "--trainer.callbacks.eps=[0.1,-0.2]"], "expected a finite budget eps ≥ 0, got -0.2"),
        (["--trainer.callbacks=null"], "nothing to evaluate"),
        ([certify, "--trainer.callbacks.eps=[0.5,0.1]"], "eps in ascending order, each once, got [0.5, 0.1]"),
        (["--data.image_size=24"], "expected images of shape (N, 3, 16, 16)"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(_args("run", *more))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stop.value.code and len(errors) == 1 and message in errors[0], more


def test_images_resized_in_another_way_are_refused(nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config() | {"data": {"class_path": "lipsim.datamodules.NightsData"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    given = [f"--data.root={nights}", "--data.image_size=16", "--data.num_workers=0"]
    with pytest.raises(SystemExit):
        main(_args("run", *given, "--data.resize=pil"))
    assert "expects images resized by 'float'; pass --data.resize=float" in capsys.readouterr().err


def test_budgets_and_curve() -> None:
    certify = ["--trainer.callbacks=lipsim.callbacks.CertifyRadii", "--trainer.callbacks.eps=[0.1,0.5]"]
    evaluate(_args("run", *certify))
    certified = read_results(Path("run/results.json"))["certified"]
    assert certified["eps"] == [0.1, 0.5]
    curve = certified["sets"]["builtin"]["curve"]
    assert curve["eps"][-1] == pytest.approx(0.75) and curve["certified"] == sorted(curve["certified"], reverse=True)


def test_parts_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parts(BuiltinData):
        @property
        def test_groups(self) -> dict[str, dict[str, torch.Tensor]]:
            return {"builtin": {"early": torch.arange(COUNT) < 4, "none": torch.zeros(COUNT, dtype=torch.bool)}}

    monkeypatch.setattr("lipsim.datamodules.Parts", Parts, raising=False)
    config = _config(steps=1)
    config["data"] = {**config["data"], "class_path": "lipsim.datamodules.Parts"}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    evaluate(_args("run"))
    for section in ("certified", "attacked"):
        sets = read_results(Path("run/results.json"))[section]["sets"]
        assert {name: scores["num_triplets"] for name, scores in sets.items()} == {"builtin": COUNT, "builtin_early": 4}
    with open("run/radii.csv", newline="") as file:
        assert [row["builtin_early"] for row in csv.DictReader(file)] == ["1"] * 4 + ["0"] * (COUNT - 4)


def test_the_record_of_a_run_runs_again() -> None:
    config = ROOT / "configs/evaluate/builtin.yaml"
    small = ["--data.num_test=4", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    cli = evaluate(["--config", str(config), "--checkpoint", "quickstart", *small])
    folder = Path(cli.trainer.default_root_dir)
    first = (folder / "results.json").read_bytes()
    results = json.loads(first)
    assert set(results) == {"schema", "certified", "attacked", "versions", "evaluation"}
    assert results["evaluation"]["checkpoint_sha256"] == cli.keep.settings["checkpoint_sha256"]
    evaluate(["--config", str(folder / "config.yaml")])
    assert (folder / "results.json").read_bytes() == first


class Cases(L.LightningDataModule):
    """Loaders of the user's own over built-in triplets."""

    def __init__(self, case: str, size: int = 7) -> None:
        super().__init__()
        self.case, self.size = case, size
        self.test_groups: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def test_names(self) -> list[str]:
        names = {
            "names": ["a", "a"],
            "dict": [],
            "parts": ["a", "a_b"],
            "several": ["a", "b", "c"],
            "empty": ["a", "b"],
        }
        return names.get(self.case, ["a"])

    def test_dataloader(self) -> Any:
        first, other = (BuiltinTriplets("test", n, image_size=16, seed=s) for n, s in ((self.size, 0), (6, 5)))
        few = Subset(first, [4, 6, 1, 0, 2])
        if self.case in ("subset", "mask", "masks", "typo"):
            self.test_groups = {
                "subset": {},
                "mask": {"a": {"low": torch.tensor([False, False, True, True, True])}},
                "masks": {"a": {"low": torch.arange(self.size) < 3}},
                "typo": {"b": {"low": torch.ones(5, dtype=torch.bool)}},
            }[self.case]
            return self._loader(few)
        if self.case == "parts":
            self.test_groups = {"a": {"b": torch.ones(self.size, dtype=torch.bool)}}
        loaders = {
            "first": lambda: self._loader(first),
            "other": lambda: self._loader(other),
            "concat": lambda: self._loader(ConcatDataset([first, other])),
            "names": lambda: [self._loader(first), self._loader(other)],
            "parts": lambda: [self._loader(first), self._loader(other)],
            "dict": lambda: {"x": self._loader(first), "y": self._loader(other)},
            "drop": lambda: self._loader(first, drop_last=True),
            "sampler": lambda: self._loader(first, sampler=[5, 1, 2]),
            "batch_sampler": lambda: DataLoader(first, batch_sampler=[[5, 1, 2], [6, 0]], collate_fn=collate_triplets),
            "empty": lambda: [self._loader(Subset(first, [])), self._loader(other)],
            "several": lambda: [self._loader(first), self._loader(Subset(other, [3])), loaders["batch_sampler"]()],
        }
        return loaders[self.case]()

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=2, collate_fn=collate_triplets, **options)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsim.datamodules.Cases", Cases, raising=False)
    config = _config(steps=1) | {"data": {"class_path": "lipsim.datamodules.Cases"}}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    Path("config.yaml").write_text(yaml.safe_dump(config))


def _evaluate_case(case: str, folder: str, *more: str) -> None:
    evaluate(_args(folder, f"--data.case={case}", *more))


def _rows(path: str) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _cut_short(monkeypatch: pytest.MonkeyPatch, after: int, *args: str) -> None:
    """An evaluation that fails after some batches of each process."""
    step = ExportedMetric.test_step

    def fails(self: ExportedMetric, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == after:
            raise InterruptedError
        return step(self, batch, batch_idx, dataloader_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ExportedMetric, "test_step", fails)
        with pytest.raises(InterruptedError):
            _evaluate_case(*args)


@pytest.mark.parametrize(
    ("case", "indices"),
    [
        ("subset", [4, 6, 1, 0, 2]),
        ("concat", [*range(7), *range(6)]),
        ("sampler", [1, 2, 5]),
        ("batch_sampler", [0, 1, 2, 5, 6]),
        ("drop", [*range(6)]),
    ],
)
def test_every_triplet_is_reported_once(
    case: str, indices: list[int], cases: None, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    _evaluate_case(case, "whole")
    assert sorted(computed) == sorted(indices)
    rows = _rows("whole/radii.csv")
    assert [row["index"] for row in rows] == indices
    assert ("position" in rows[0]) == (case in ("subset", "concat"))
    if "position" in rows[0]:
        assert [row["position"] for row in rows] == list(range(len(indices)))
    section = read_results(Path("whole/results.json"))
    assert section["certified"]["sets"]["a"]["num_triplets"] == len(indices)
    size = {"subset": 5, "concat": 13}.get(case, 7)
    assert section["evaluation"]["triplets"] == {"a": {"evaluated": len(indices), "in_set": size}}
    _cut_short(monkeypatch, 1, case, "cut")
    computed.clear()
    _evaluate_case(case, "cut")
    assert sorted(computed) == sorted(_without_first_batch(case, indices))
    for name in ("results.json", "radii.csv"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def _without_first_batch(case: str, indices: list[int]) -> list[int]:
    """Indices of what is left after one batch."""
    return {"sampler": [2], "batch_sampler": [6, 0]}.get(case, indices[2:])


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")  # as meant
def test_an_empty_set_beside_a_full_one(cases: None) -> None:
    _evaluate_case("empty", "run")
    section = read_results(Path("run/results.json"))
    assert list(section["certified"]["sets"]) == ["b"]
    assert section["certified"]["sets"]["b"]["num_triplets"] == 6 == len(_rows("run/radii.csv"))
    assert section["evaluation"]["triplets"]["a"] == {"evaluated": 0, "in_set": 0}


def test_sets_that_are_concatenated_score_as_each_alone(cases: None) -> None:
    for case in ("concat", "first", "other"):
        _evaluate_case(case, case)
    together, *apart = (_rows(f"{case}/radii.csv") for case in ("concat", "first", "other"))
    assert len(together) == 13
    for row, alone in zip(together, [*apart[0], *apart[1]], strict=True):
        row.pop("position")
        assert row == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_names_of_sets(cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    _evaluate_case("dict", "dict")  # the keys
    assert list(read_results(Path("dict/results.json"))["certified"]["sets"]) == ["x", "y"]
    for case, name in (("names", "a"), ("parts", "a_b")):
        with pytest.raises(SystemExit):
            main(_args("run", f"--data.case={case}"))
        assert f"several evaluation sets are called {name}, and results are kept by name" in capsys.readouterr().err


def test_masks_are_over_positions(cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    _evaluate_case("mask", "mask")
    rows = _rows("mask/radii.csv")
    assert [row["index"] for row in rows if row["a_low"]] == [1, 0, 2]
    assert read_results(Path("mask/results.json"))["certified"]["sets"]["a_low"]["num_triplets"] == 3
    for case, message in (
        ("masks", "expected a bool mask of a_low over the 5 positions of the data set that a is served from, got (7,)"),
        ("typo", "test_groups names parts of b; the sets are a"),
    ):
        with pytest.raises(SystemExit):
            main(_args("run", f"--data.case={case}"))
        assert message in capsys.readouterr().err


def test_what_was_begun_in_another_way_is_not_continued(
    cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _cut_short(monkeypatch, 1, "first", "run")
    for more, message in (
        ("--trainer.precision=bf16-mixed", "differs in precision;"),
        ("--trainer.precision=64-true", "leave it at 32-true"),
        ("--max_triplets=4", "differs in max_triplets, data;"),
        ("--trainer.limit_test_batches=2", "differs in limit_test_batches, data;"),
        ("--data.case=subset", "differs in data;"),
    ):
        with pytest.raises(SystemExit):
            main(_args("run", "--data.case=first", more))
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1
    _evaluate_case("first", "run")
    assert len(_rows("run/radii.csv")) == 7


def test_a_size_for_a_quick_run(cases: None) -> None:
    _evaluate_case("first", "run", "--data.size=20", "--max_triplets=9", "--trainer.limit_test_batches=4")
    indices = [row["index"] for row in _rows("run/radii.csv")]
    assert len(indices) == 8 and indices == sorted(indices) and indices != list(range(8))
    results = read_results(Path("run/results.json"))
    assert results["evaluation"]["triplets"] == {"a": {"evaluated": 8, "in_set": 20}}
    assert results["evaluation"]["sample_seed"] == 0
    with pytest.raises(ValueError, match="nothing to evaluate: limit_test_batches is 0"):
        _evaluate_case("first", "run", "--trainer.limit_test_batches=0")


def test_old_pictures_go(cases: None) -> None:
    config = _config(steps=1) | {"data": {"class_path": "lipsim.datamodules.Cases"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    _evaluate_case("dict", "run")
    written = {"attacked-x.png", "attacked-y.png", "gallery-x.png", "gallery-y.png"}
    assert {path.name for path in Path("run/plots").iterdir()} == written
    config["trainer"]["callbacks"][1]["init_args"]["num_examples"] = 1
    config["data"] = {"class_path": "lipsim.datamodules.Cases", "init_args": {"case": "first"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("run/adversarial").joinpath("notes.txt").write_text("of the user")
    Path("run/results.json").unlink()  # as after an evaluation that was never finished
    evaluate(_args("run", "--trainer.callbacks=lipsim.callbacks.CertifyRadii"))
    assert not Path("run/plots").exists()
    assert [path.name for path in Path("run/adversarial").iterdir()] == ["notes.txt"]
    assert [path.name for path in Path("run").glob("*.csv")] == ["radii.csv"]
    for count, left in ((2, {"000000", "000001"}), (1, {"000000"}), (0, set())):
        config["trainer"]["callbacks"][1]["init_args"]["num_examples"] = count
        Path("config.yaml").write_text(yaml.safe_dump(config))
        evaluate(_args("run"))
        assert {path.name[:6] for path in Path("run/adversarial/a").glob("*.png")} == left
        assert Path("run/plots/attacked-a.png").exists() == (count > 0)
    twice = {"class_path": "lipsim.callbacks.CertifyRadii"}
    config["trainer"]["callbacks"].append(twice)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="several CertifyRadii write to run, and each would replace"):
        evaluate(_args("run"))
    twice["init_args"] = {"directory": "second"}  # type: ignore[assignment]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    evaluate(_args("run"))
    assert len(_rows("run/second/radii.csv")) == 7


def test_own_loaders_on_two_processes(cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Own samplers, a limit, and a set of one triplet, of which the second process has none."""
    _command_line_of("Cases", tmp_path, monkeypatch)
    given = ["--data.case=several", "--trainer.limit_test_batches=3"]
    evaluate(_args("one", *given))
    two = _args("two", *given, "--trainer.devices=2", "--trainer.strategy=ddp")
    run = subprocess.run([*SCRIPT, *two], env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    one, both = (read_results(Path(folder, "results.json")) for folder in ("one", "two"))
    assert one["evaluation"] == both["evaluation"]
    assert {name: count["evaluated"] for name, count in one["evaluation"]["triplets"].items()} == {
        "a": 6,
        "b": 1,
        "c": 5,
    }
    for name in "abc":
        for x, y in zip(_rows(f"one/radii-{name}.csv"), _rows(f"two/radii-{name}.csv"), strict=True):
            assert x == pytest.approx(y, rel=1e-5, abs=1e-6)


def test_batches_keep_their_composition() -> None:
    data = BuiltinData(num_test=5, image_size=16, batch_size=2)
    data.setup("test")
    loader = remaining(data.test_dataloader()[0], {0, 1, 2})
    batches = list(loader)
    assert isinstance(batches[0], Finished)
    assert [batch.index.tolist() for batch in batches[1:]] == [[2, 3], [4]]
    whole = collate_triplets([data.test_sets["builtin"][0]])
    assert torch.equal(read_batch(loader, [0]).reference, whole.reference)
