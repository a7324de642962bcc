"""The job scripts under an imitation of SLURM: what they start, what survives, and whole runs of them (slow)."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim.cli.main import main

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
JOBS = sorted(SCRIPTS.glob("*.sbatch"))
FAKE = Path(__file__).with_name("fake_slurm.py")
SMALL = "--nodes=1 --ntasks-per-node={} --gpus-per-node=0 --cpus-per-task=1"
DATA = "--data.num_train 64 --data.num_val 12 --data.num_test 12 --data.batch_size 8"
LINEAR = "--config configs/quickstart/linear.yaml --trainer.accelerator cpu --trainer.max_epochs 1 "
LINEAR += f"--trainer.log_every_n_steps 1 {DATA}"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sbatch, srun and scontrol on the path; logs of jobs go there."""
    home = tmp_path / "slurm"
    (home / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        command = home / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {FAKE} {name} "$@"\n')
        command.chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "PYTEST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return home


@pytest.fixture
def recorded(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of Python: writes down how it was called, a file a call, and does what ``STUB`` says."""
    stub = slurm / "python"
    stub.write_text(
        "#!/bin/bash\nset=${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}-${SLURM_PROCID}\n"
        f'{{ printf "%s\\n" "$@"; env | grep -E "^(SLURM|OMP)_" >&2; }} >{slurm}/call-$set-$RANDOM 2>{slurm}/env-$set\n'
        'eval "${STUB:-}"\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stub))
    return slurm


def submit(options: str, script: str, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", *options.split(), f"scripts/slurm/{script}.sbatch", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def calls(home: Path, job: str = "*") -> list[list[str]]:
    files = sorted(home.glob(f"call-{job}-*"), key=lambda path: path.stat().st_mtime_ns)
    return [path.read_text().splitlines() for path in files]


def report(*args: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", *args])
    assert end.value.code == 0


def logs(home: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(home.glob("*.out")))


# --- the scripts


@pytest.mark.parametrize("script", [*JOBS, *sorted(SCRIPTS.glob("*.sh"))], ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(["shellcheck", "-x", "-P", ".", *JOBS, *SCRIPTS.glob("*.sh")], cwd=ROOT, capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_jobs_end_in_time_and_begin_again(script: Path) -> None:
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert {"requeue", "time", "job-name", "nodes", "cpus-per-task"} <= set(options)
    assert options["open-mode"] == "append"  # what was said before the job went back into the queue stays
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # and not --gpus-per-task, see docs/clusters.md
    trains = "fit " in text
    assert re.fullmatch(r"SIGUSR1@\d+" if trains else r"B:SIGUSR1@\d+", options["signal"])
    assert ("%A_%a" in options["output"]) == ("array" in options)
    assert not re.search(r"account|partition", text)  # those are in site.sh


# --- what they start


def test_one_node_and_several(recorded: Path) -> None:
    assert submit(SMALL.format(2), "train", "--config", "a b.yaml").returncode == 0
    (first, second) = calls(recorded, "1001")
    expected = ["scripts/train.py", "fit", "--config", "a b.yaml", "--trainer.devices", "2", "--trainer.num_nodes", "1"]
    assert first == second == [*expected, "--ckpt_path", "last"]
    environment = (recorded / "env-1001-0-1").read_text()
    assert "SLURM_PROCID=1" in environment and "OMP_NUM_THREADS=1" in environment
    given = "--nodes=2 --ntasks-per-node=3 --gpus-per-node=3 --cpus-per-task=4"
    assert submit(given, "train_nodes", "--config", "c").returncode == 0
    started = calls(recorded, "1002")
    assert len(started) == 6 and started[0][4:8] == ["--trainer.devices", "3", "--trainer.num_nodes", "2"]
    fifth = (recorded / "env-1002-0-4").read_text()
    assert "SLURM_NODEID=1" in fifth and "SLURM_LOCALID=1" in fifth and "OMP_NUM_THREADS=1" in fifth


def test_seeds_and_sweeps(recorded: Path, tmp_path: Path) -> None:
    assert submit(f"--array=3-4 {SMALL.format(1)}", "seeds", "runs/s", "--config", "c").returncode == 0
    assert [call[1] for call in calls(recorded)] == ["fit", "test", "fit", "test"]
    for job, seed in (("1001", "3"), ("1002", "4")):
        for call in calls(recorded, job):
            options = f"--config c --seed_everything {seed} --trainer.default_root_dir runs/s/seed-{seed}"
            assert " ".join(call[2:]).startswith(options) and call[-2:] == ["--ckpt_path", "last"]
    table = tmp_path / "table.txt"
    table.write_text("# name options\n\nslow --model.lr 0.1\n  fast   --model.lr 1 --model.x y\n")
    done = submit(f"--array=2 {SMALL.format(1)}", "sweep", str(table), "runs/t", "--config", "c")
    assert done.returncode == 0
    assert (
        calls(recorded, "1003")[1][2:10]
        == "--config c --model.lr 1 --model.x y --trainer.default_root_dir runs/t/fast".split()
    )
    assert submit(f"--array=3 {SMALL.format(1)}", "sweep", str(table), "runs/t").returncode == 2
    assert f"expected a line 1 to 2 of {table}, got 3; give sbatch --array=1-2" in logs(recorded)


def test_a_certificate_is_of_a_training_that_ended(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "exit 1")
    assert submit(f"--array=0 {SMALL.format(1)}", "seeds", "runs/s", "--config", "c").returncode == 1
    assert [call[1] for call in calls(recorded)] == ["fit"]


TEST = """case "$*" in
*" test "*) if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
    trap "exit 75" USR1; sleep "$TESTING"; echo testing; sleep 200 & wait;;
*) sleep "$TRAINING";;
esac"""


# The script counts whole seconds, of which a busy machine takes one for nothing.
@pytest.mark.parametrize(
    ("training", "testing", "back"), [("0", "2", False), pytest.param("3", "0", True, marks=pytest.mark.slow)]
)
def test_a_certificate_that_the_end_of_the_time_cuts_short(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, training: str, testing: str, back: bool
) -> None:
    """It begins anew where training took most of the time; where it had the time to itself, the job fails."""
    monkeypatch.setenv("FAKE_SLURM_SIGNAL_ON", "testing")
    monkeypatch.setenv("STUB", TEST)
    monkeypatch.setenv("TRAINING", training)
    monkeypatch.setenv("TESTING", testing)
    status = submit(f"--array=0 {SMALL.format(1)}", "seeds", "runs/s", "--config", "c").returncode
    assert status == (0 if back else 75)
    assert [call[1] for call in calls(recorded)] == ["fit", "test"] * (2 if back else 1)
    assert ("the test takes longer than the job may" in logs(recorded)) == (not back)


def test_a_task_that_fails_ends_the_others(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "if [ $SLURM_PROCID = 1 ]; then exit 3; fi; sleep 200")
    assert submit(SMALL.format(2), "train", "--config", "c", timeout=90).returncode != 0


def test_evaluations_go_back_into_the_queue_before_their_time_is_over(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_SLURM_SIGNAL_ON", "working")
    monkeypatch.setenv("STUB", "if [ -z ${SLURM_RESTART_COUNT:-} ]; then echo working; sleep 200; else echo again; fi")
    for script, args in (("evaluate", []), ("cache_teacher", [])):
        assert submit(SMALL.format(2), script, "--x", "y", *args, timeout=90).returncode == 0
    assert logs(recorded).count("again") == 4
    assert calls(recorded, "1001-1") == 2 * [
        ["scripts/evaluate.py", "--x", "y", "--trainer.devices", "2", "--trainer.num_nodes", "1"]
    ]
    assert calls(recorded, "1002-1")[0][3:] == ["--devices", "2", "--num-nodes", "1"]
    table = tmp_path / "table.txt"
    table.write_text("a --checkpoint a.safetensors\n")
    # One of an array alone: by the number of the array all others would begin again.
    assert submit(f"--array=1 {SMALL.format(1)}", "evaluations", str(table), "runs/t", timeout=90).returncode == 0
    assert logs(recorded).count("again") == 5
    monkeypatch.setenv("STUB", "exit 4")  # a failure is one, and nothing begins again
    assert submit(f"--array=1 {SMALL.format(1)}", "evaluations", str(table), "runs/t", "--z").returncode == 4
    (call,) = calls(recorded, "1004")
    assert call[:6] == "scripts/evaluate.py --z --checkpoint a.safetensors --trainer.default_root_dir runs/t/a".split()


def test_what_is_the_site_s_own_counts_before_the_scripts(slurm: Path) -> None:
    text = (SCRIPTS / "site.sh").read_text()
    assert "# export SBATCH_ACCOUNT=" in text and "# export SBATCH_PARTITION=" in text
    assert ': "${PYTHON:=.venv/bin/python}"' in text


# --- whole runs


@pytest.mark.slow  # two processes of three to ten seconds, several times
def test_training_on_two_tasks_and_on_two_nodes(slurm: Path, tmp_path: Path) -> None:
    args = [*LINEAR.split(), "--trainer.default_root_dir"]
    assert submit(SMALL.format(2), "train", *args, str(tmp_path / "one"), timeout=1200).returncode == 0, logs(slurm)
    nodes = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
    assert submit(nodes, "train_nodes", *args, str(tmp_path / "two"), timeout=1200).returncode == 0, logs(slurm)
    for name in ("one", "two"):
        folder = tmp_path / name
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["processes"] == 2
        assert (folder / "linear.safetensors").is_file() and (folder / "checkpoints" / "last.ckpt").is_file()
    logged = [(tmp_path / name / "metrics.csv").read_text() for name in ("one", "two")]
    assert logged[0] == logged[1] and len(logged[0].splitlines()) > 1


@pytest.mark.slow  # six processes, one after the other
def test_seeds_end_in_a_report(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    done = submit(f"--array=0-1 {SMALL.format(1)}", "seeds", str(runs), *LINEAR.split(), timeout=1200)
    assert done.returncode == 0, logs(slurm)
    output = ["--output", str(tmp_path / "report")]
    report(f"linear={runs}/seed-*", "--seeds", *output)
    assert "±" in (tmp_path / "report" / "report.md").read_text()
    table = tmp_path / "metrics.txt"
    table.write_text("".join(f"seed-{i} --checkpoint {runs}/seed-{i}/linear.safetensors\n" for i in range(2)))
    evaluation = "--config configs/evaluate/builtin.yaml --trainer.accelerator cpu --data.num_test 8".split()
    evaluation += ["--trainer.callbacks", "lipsim.callbacks.CertifyRadii"]
    tests = tmp_path / "tests"
    done = submit(f"--array=1-2 {SMALL.format(1)}", "evaluations", str(table), str(tests), *evaluation, timeout=1200)
    assert done.returncode == 0, logs(slurm)
    report(f"{tests}/*", *output)
    assert "seed-1" in capsys.readouterr().out


@pytest.mark.slow  # as many processes
def test_a_sweep_a_cache_and_an_evaluation(slurm: Path, tmp_path: Path) -> None:
    table, runs = tmp_path / "sweep.txt", tmp_path / "runs"
    table.write_text("low --model.optimizer.init_args.lr 0.0001\nhigh --model.optimizer.init_args.lr 0.01\n")
    done = submit(f"--array=2 {SMALL.format(1)}", "sweep", str(table), str(runs), *LINEAR.split(), timeout=1200)
    assert done.returncode == 0, logs(slurm)
    assert [path.name for path in runs.iterdir()] == ["high"] and (runs / "high" / "results.json").is_file()
    images = tmp_path / "images" / "train" / "a"
    images.mkdir(parents=True)
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    cache = ["--teacher", "quickstart", "--images", str(tmp_path / "images"), "--output", str(tmp_path / "cache")]
    small = ["--short-side", "64", "--num-workers", "0", "--shard-size", "2", "--accelerator", "cpu"]
    done = submit(SMALL.format(2), "cache_teacher", *cache, *small, timeout=1200)
    assert done.returncode == 0 and "6 images" in logs(slurm), logs(slurm)
    evaluation = "--config configs/evaluate/builtin.yaml --checkpoint quickstart --trainer.accelerator cpu".split()
    evaluation += ["--trainer.callbacks", "lipsim.callbacks.CertifyRadii", "--data.num_test", "9"]
    folders = [str(tmp_path / name) for name in ("two", "one")]
    for tasks, folder in zip((2, 1), folders, strict=True):
        given = [*evaluation, "--trainer.default_root_dir", folder]
        assert submit(SMALL.format(tasks), "evaluate", *given, timeout=1200).returncode == 0, logs(slurm)
    two, one = (json.loads((Path(folder) / "results.json").read_text())["certified"]["sets"] for folder in folders)
    for score in ("num_triplets", "majority", "certified", "joint"):
        assert two["builtin"][score] == one["builtin"][score]


@pytest.mark.slow  # three times two processes
def test_training_is_requeued_before_its_time_is_over(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reaches every process of both tasks in the middle of training; the job comes back and goes on."""
    monkeypatch.setenv("FAKE_SLURM_SIGNAL_ON", "fit: epoch")
    run = tmp_path / "run"
    options = [*LINEAR.split(), "--trainer.max_epochs", "40", "--trainer.check_val_every_n_epoch", "40"]
    done = submit(SMALL.format(2), "train", *options, "--trainer.default_root_dir", str(run), timeout=1200)
    said = logs(slurm)
    assert done.returncode == 0, said
    assert said.count("stopping on SIGUSR1 after step") == 1 and "job 1001 is back in the queue of SLURM" in said
    assert f"Restored all states from the checkpoint at {run}/checkpoints/last.ckpt" in said
    assert not list(run.rglob("hpc_ckpt*")) and not (run / "previous").exists()
    rows = [row for file in run.glob("metrics*.csv") for row in csv.DictReader(file.read_text().splitlines())]
    steps = [row["step"] for row in rows if row["train/loss"]]
    assert sorted(map(int, steps)) == list(range(40 * 4))
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 160 and (run / "linear.safetensors").is_file()
    monkeypatch.delenv("FAKE_SLURM_SIGNAL_ON")  # and of one that nobody stopped, the same weights
    whole = [*options, "--trainer.default_root_dir", str(tmp_path / "whole")]
    assert submit(SMALL.format(2), "train", *whole, timeout=1200).returncode == 0
    expected = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(last["state_dict"][name], value)
