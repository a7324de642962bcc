"""scripts/evaluate.py as its users run it: bad input is one line, and its record runs again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from evaluations import CERTIFY, COUNT, ROOT, args, as_one_of_ours, config, prepare, write_config

from lipsim import PerceptualMetric, students, teachers
from lipsim.cli.evaluate import evaluate, main
from lipsim.cli.main import main as lipsim_main
from lipsim.data import Triplet
from lipsim.datamodules import BuiltinData
from lipsim.metric import load, save
from lipsim.metric.files import resolve
from lipsim.results import read_results
from lipsim.training import FineTuning
from lipsim.utils.files import file_sha256


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)


def test_checkpoints_of_training_are_evaluated_too() -> None:
    metric = PerceptualMetric(students.OrthogonalProjection(16, 8), 16)
    stage = FineTuning(init_from=save(metric, "start.safetensors"))
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=2, enable_progress_bar=False, limit_val_batches=0)
    trainer.fit(stage, BuiltinData(num_train=8, num_val=2, image_size=16, batch_size=4))
    trainer.save_checkpoint("last.ckpt")
    evaluate(args("ckpt", CERTIFY, "--checkpoint=last.ckpt"))
    evaluate(args("file", CERTIFY, f"--checkpoint={save(stage.metric, 'last.safetensors')}"))
    found, expected = (read_results(Path(folder, "results.json"))["certified"] for folder in ("ckpt", "file"))
    assert found == expected
    torch.save({"state_dict": {}}, "other.ckpt")
    with pytest.raises(ValueError, match="does not say how to rebuild a metric"):
        load("other.ckpt")


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
    as_one_of_ours(BadData, monkeypatch)
    content = config(steps=1) | {"data": {"class_path": "lipsim.datamodules.BadData", "init_args": {"fault": fault}}}
    write_config(content)
    with pytest.raises(SystemExit) as stop:
        main(args("run"))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 1 and len(errors) == 1 and message in errors[0]


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    vit = teachers.SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    save(PerceptualMetric(vit, 16, lipschitz=float("inf")), "teacher.safetensors")
    for more, message in (
        (["--checkpoint=teacher.safetensors"], "no Lipschitz bound is known for SmallViT"),
        (["--checkpoint=nothing.safetensors"], "no metric file nothing.safetensors"),
        ([CERTIFY, "--trainer.callbacks.eps=[0.1,-0.2]"], "expected a finite budget eps ≥ 0, got -0.2"),
        (["--trainer.callbacks=null"], "nothing to evaluate"),
        ([CERTIFY, "--trainer.callbacks.eps=[0.5,0.1]"], "eps in ascending order, each once, got [0.5, 0.1]"),
        (["--data.image_size=24"], "got data of 24 × 24; pass --data.image_size=16"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args("run", *more))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stop.value.code and len(errors) == 1 and message in errors[0], more


def test_images_resized_in_another_way_are_refused(nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = config() | {"data": {"class_path": "lipsim.datamodules.NightsData"}}
    write_config(content)
    given = [f"--data.root={nights}", "--data.image_size=16", "--data.num_workers=0"]
    with pytest.raises(SystemExit):
        main(args("run", *given, "--data.resize=pil"))
    assert (
        "expected images resized by 'float', which the metric is for, got data with images resized by 'pil'"
        in capsys.readouterr().err
    )


def test_budgets_and_curve() -> None:
    certify = [CERTIFY, "--trainer.callbacks.eps=[0.1,0.5]"]
    evaluate(args("run", *certify))
    certified = read_results(Path("run/results.json"))["certified"]
    assert certified["eps"] == [0.1, 0.5]
    curve = certified["sets"]["builtin"]["curve"]
    assert curve["eps"][-1] == pytest.approx(0.75) and curve["certified"] == sorted(curve["certified"], reverse=True)


class Parts(BuiltinData):
    @property
    def test_groups(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"builtin": {"early": torch.arange(COUNT) < 4, "none": torch.zeros(COUNT, dtype=torch.bool)}}


def test_parts_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_ours(Parts, monkeypatch)
    content = config(steps=1)
    content["data"] = {**content["data"], "class_path": "lipsim.datamodules.Parts"}
    write_config(content)
    evaluate(args("run"))
    for section in ("certified", "attacked"):
        sets = read_results(Path("run/results.json"))[section]["sets"]
        assert {name: scores["num_triplets"] for name, scores in sets.items()} == {"builtin": COUNT, "builtin_early": 4}
    with open("run/radii.csv", newline="") as file:
        assert [row["builtin_early"] for row in csv.DictReader(file)] == ["1"] * 4 + ["0"] * (COUNT - 4)


def test_the_record_of_a_run_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((ROOT / "configs/evaluate/builtin.yaml").read_text())
    for callback in content["trainer"]["callbacks"]:
        if callback["class_path"].endswith(".AttackRobustness"):
            callback["init_args"] |= {"steps": 2, "queries": 4}
    builtin = Path("short.yaml")
    builtin.write_text(yaml.safe_dump(content))
    small = ["--data.num_test=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    cli = evaluate(["--config", str(builtin), "--checkpoint", "quickstart", *small])
    folder = Path(cli.trainer.default_root_dir)
    first = (folder / "results.json").read_bytes()
    results = json.loads(first)
    assert set(results) == {"schema", "certified", "attacked", "versions", "evaluation"}
    assert results["evaluation"]["checkpoint_sha256"] == file_sha256(resolve("quickstart"))
    lipsim_main(["evaluate", "--config", str(folder / "config.yaml")])
    assert f"are in {folder}; lipsim report {folder} shows them" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == first
