"""What a failed download, a crash or a stranger leaves in the place of a checkpoint: one line, through the commands."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lipsim import PerceptualMetric
from lipsim.cli import evaluate
from lipsim.cli.main import main as lipsim_main
from lipsim.cli.train import main
from lipsim.metric import load, save
from lipsim.students import OrthogonalProjection

ROOT = Path(__file__).parents[2]
LINEAR = ROOT / "configs" / "quickstart" / "linear.yaml"
SMALL = ["--trainer.accelerator=cpu", "--data.num_train=8", "--data.num_val=8", "--data.num_test=8"]


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def _truncated(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.rand(500, 500)}}, path)
    path.write_bytes(path.read_bytes()[:-700_000])


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "harm": _Harm()}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncated, "truncated"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>404</html>"), "a web page and no weights"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "pointer": (lambda path: path.write_text(POINTER), "run git lfs pull"),
    "class": (lambda path: torch.save({"state_dict": {}, "harm": _Harm()}, path), "needs more than tensors"),
    "plain pickle": (_pickled, "needs more than tensors"),
    "list": (lambda path: torch.save([1, 2], path), "expected a mapping"),
    "weights alone": (lambda path: torch.save({"state_dict": {}}, path), "no checkpoint of a stage"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "truncated"),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _error(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert not Path("harm").exists()
    return line


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_of_a_stage(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = DAMAGE[damage]
    make(Path("bad.ckpt"))
    for subcommand in ("fit", "validate", "test") if damage == "class" else ("fit",):
        args = [subcommand, "--config", str(LINEAR), "--ckpt_path=bad.ckpt", *SMALL]
        line = _error(capsys, lambda args=args: main(args))  # type: ignore[misc]
        assert "bad.ckpt" in line and message in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["bad.ckpt", "bad.safetensors"])
def test_the_file_of_a_metric(damage: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[damage][0](Path(name))
    assert name in _error(capsys, lambda: lipsim_main(["audit", name]))


@pytest.mark.parametrize("damage", ["truncated", "pointer"])
def test_the_file_of_a_metric_in_every_command(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = DAMAGE[damage]
    make(Path("bad.ckpt"))
    configs = ROOT / "configs"
    others = json.dumps({"class_path": "lipsim.callbacks.AttackRobustness", "init_args": {"others": {"x": "bad.ckpt"}}})
    for call in (
        lambda: evaluate.main(["--config", str(configs / "evaluate/builtin.yaml"), "--checkpoint=bad.ckpt"]),
        lambda: main(["--config", str(configs / "quickstart/distill.yaml"), "--model.teacher=bad.ckpt", *SMALL]),
        lambda: main(["--config", str(LINEAR), "--model.student=null", "--model.init_from=bad.ckpt", *SMALL]),
        lambda: main(["--config", str(LINEAR), f"--trainer.callbacks+={others}", *SMALL]),
    ):
        line = _error(capsys, call)
        assert "bad.ckpt" in line and message in line


def test_parts_of_a_checkpoint_are_checked_before_anything_moves(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(LINEAR), *SMALL, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
    file = Path("runs/quickstart/linear/checkpoints/last.ckpt")
    good = torch.load(file, weights_only=True)
    before = sorted(Path("runs").rglob("*"))
    moments = good["optimizer_states"][0]["state"]
    odd = {0: {**moments[0], "exp_avg": torch.zeros(2)}} if moments else {0: {"exp_avg": torch.zeros(2)}}
    optimizer = [{**good["optimizer_states"][0], "state": odd}]
    for changed, message in (
        ({"callbacks": 5}, "its callbacks is a int"),
        ({"loops": {}}, "it does not say where its fit_loop was"),
        ({"pytorch-lightning_version": None}, "its pytorch-lightning_version is a NoneType"),
        ({"optimizer_states": optimizer}, "exp_avg of parameter 0 has shape"),
    ):
        torch.save({**good, **changed}, "bad.ckpt")
        line = _error(capsys, lambda: main(["--config", str(LINEAR), "--ckpt_path=bad.ckpt", *SMALL]))
        assert "bad.ckpt" in line and message in line
        assert sorted(Path("runs").rglob("*")) == before
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    Path("flip.ckpt").write_bytes(content)
    line = _error(capsys, lambda: main(["test", "--config", str(LINEAR), "--ckpt_path=flip.ckpt", *SMALL]))
    assert "flip.ckpt" in line and "is not what was written" in line


def test_weights_alone_do_not_resume(capsys: pytest.CaptureFixture[str]) -> None:
    versions = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 3}
    torch.save({"state_dict": {}, **versions}, "weights.ckpt")
    line = _error(capsys, lambda: main(["--config", str(LINEAR), "--ckpt_path=weights.ckpt", *SMALL]))
    assert "has weights alone, and training cannot be continued from it" in line


def test_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    metric = PerceptualMetric(OrthogonalProjection(16, 4), 16)
    save(metric, "~/folder/metric.safetensors")
    assert (tmp_path / "folder/metric.safetensors").is_file()
    assert load("~/folder/metric.safetensors").lipschitz == pytest.approx(1)
