"""The command line as its users run it: configs, errors, resuming, two processes, the quickstart in small."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lipsim
from lipsim import PerceptualMetric, students, teachers
from lipsim.cli.evaluate import evaluate
from lipsim.cli.main import main as lipsim_main
from lipsim.cli.quickstart import quickstart
from lipsim.cli.stage import StageParser, train
from lipsim.cli.train import main
from lipsim.data.sets.material import IMAGES, NUM_IMAGES
from lipsim.metric import save
from lipsim.results import read_results
from lipsim.training.checkpoints import check_checkpoint
from lipsim.utils.terminal import one_line

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "evaluate")
SMALL = ["--trainer.accelerator=cpu", "--data.num_train=32", "--data.num_val=16", "--data.num_test=16"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
EVALUATIONS = sorted((ROOT / "configs" / "evaluate").glob("*.yaml"))
SLOW_CONFIGS = ("imagenet/*.yaml", "*_128.yaml", "photos/teacher.yaml")
LINEAR = ROOT / "configs" / "quickstart" / "linear.yaml"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """A folder in the layout of the Material repository: coloured tiles, votes for the nearer colour."""
    root = tmp_path / "material"
    (root / IMAGES).mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (NUM_IMAGES, 3))
    for i, colour in enumerate(colours):
        tile = np.broadcast_to(colour, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(tile).save(root / IMAGES / f"material-{i:03d}.jpg")
    answers, agreement = [], []
    for _ in range(4000):
        ref, a, b = rng.choice(NUM_IMAGES, 3, replace=False)
        near = np.linalg.norm(colours[ref] - colours[a]) < np.linalg.norm(colours[ref] - colours[b])
        answers.append([int(ref), *((int(a), int(b)) if near else (int(b), int(a)))])
        agreement.append([int(rng.integers(3, 6)), int(rng.integers(0, 3))])
    content = {"answers": answers, "agreement": agreement, "answers_diff": answers, "agreement_diff": agreement}
    (root / "data" / "answers_processed_train.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """An image folder of two classes, smaller and larger than the crop."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, size in enumerate((200, 230, 250)):
            folder = tmp_path / "imagenet" / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, 240, 3), dtype=np.uint8)).save(folder / f"{number}.JPEG")
    return tmp_path / "imagenet"


def _encoder(config: Path, role: str, **options: Any) -> torch.nn.Module:
    """The untrained encoder that a config would train, with other options where they are given."""
    choice = yaml.safe_load(config.read_text())["model"]["init_args"][role]
    return getattr(teachers if role == "teacher" else students, choice["class_path"].split(".")[-1])(
        **{**choice["init_args"], **options}
    )


def _stand_ins(room: str = "quickstart") -> None:
    """Untrained files where a room of configs expects those of earlier stages."""
    folder, run = ROOT / "configs" / room, Path("runs") / room
    encoder = _encoder(folder / "distill.yaml", "student", **NARROW)
    vit = _encoder(folder / "teacher.yaml", "teacher")
    size = vit.image_size
    save(PerceptualMetric(vit, size, anchor=0.0, lipschitz=float("inf")), run / "teacher/teacher.safetensors")
    save(PerceptualMetric(encoder, size, lipschitz=1.0), run / "distilled/distilled.safetensors")
    for name in ("linear/linear", room):
        save(PerceptualMetric(students.OrthogonalProjection(size, 8), size), run / f"{name}.safetensors")


def _stand_ins_of_photos() -> None:
    """Untrained files of both sizes where the configs of photographs expect those of earlier stages."""
    for stem, run in (("distill", "photos"), ("distill_128", "photos_128")):
        encoder = _encoder(ROOT / "configs" / "photos" / f"{stem}.yaml", "student")
        metric = PerceptualMetric(encoder, encoder.image_size, lipschitz=1.0)
        save(metric, Path("runs") / run / "distilled/distilled.safetensors")
    save(PerceptualMetric(students.OrthogonalProjection(64, 8), 64), "runs/photos/linear/linear.safetensors")


# A student of the same layers as the default one.
NARROW = {"widths": [16, 16, 32], "depths": [1, 1, 1]}
# What makes a test of the real configs small: the made-up data, batches, and width or depth of the students.
OPTIONS = {
    "photos": ["--data.batch_size=3", "--data.num_workers=0"],
    "quickstart": SMALL,
    "material": ["--data.val_triplets=100"],
    "nights": ["--data.batch_size=2", "--data.num_workers=0"],
    "bapps": ["--data.batch_size=2", "--data.num_workers=0", "--data.val_triplets=4"],
    "table": ["--data.batch_size=2", "--data.num_workers=0"],
    "imagenet": [
        *("--data.batch_size=3", "--data.num_workers=0", "--data.triplets.num_workers=0"),
        *("--data.triplets.batch_size=2", "--model.student.depth=1", "--model.student.linear_depth=1"),
        *("--model.student.channels=6", "--model.student.linear_width=16"),
    ],
}
PHOTOS_DISTILL = [
    *("--model.principal_axes=4", "--model.student.out_features=4", "--data.triplets.batch_size=4"),
    *("--data.triplets.num_val=4", "--data.triplets.num_test=4"),
]
PHOTOS_TRIPLETS = ["--data.num_train=8", "--data.num_val=4", "--data.num_test=4"]
SHARED = {"num_batches": 2, "num_images": 6, "per_class": 2, "num_triplets": 32, "num_distorted": 2}
PHOTOS_SHARED = [*PHOTOS_TRIPLETS, f"--data.shared={json.dumps(SHARED)}"]
RANDOM_BRANCH = '--model.teacher.branches=[{"model": "timm/resnet18", "weights": "random", "layers": [1]}]'
# Teachers of some configs in small, with random weights in place of files.
OPTIONS_OF = {
    "material/teacher_adversarial": [
        *("--model.adversary.steps=1", "--data.batch_size=4", "--trainer.val_check_interval=null"),
        RANDOM_BRANCH,
    ],
    "photos/teacher": [*PHOTOS_TRIPLETS, RANDOM_BRANCH],
    "photos/teacher_adversarial": [*PHOTOS_TRIPLETS, "--model.adversary.steps=1", RANDOM_BRANCH],
    **{f"photos/{name}": PHOTOS_DISTILL for name in ("distill", "distill_128")},
    **{f"photos/{name}": PHOTOS_SHARED for name in ("finetune", "finetune_128", "linear", "wide")},
    **{
        f"{room}/distill": [f"--model.student.{name}={value}" for name, value in NARROW.items()]
        for room in ("quickstart", "nights")
    },
    "nights/dreamsim": [
        *("--model.teacher.weights=random", "--trainer.precision=32-true"),
        '--model.teacher.options={"embed_dim": 24, "depth": 2, "num_heads": 2, "projection": 12}',
    ],
}


def _with_short_attacks(config: Path) -> str:
    """A copy of a config with attacks of one step, few pictures, and few images to find errors on."""
    content = yaml.safe_load(config.read_text())
    for callback in content["trainer"]["callbacks"]:
        if callback["class_path"].endswith((".AttackRobustness", ".TripletGallery", ".CertifyRetrieval")):
            callback.setdefault("init_args", {})["steps"] = 1
        if callback["class_path"].endswith(".AttackRobustness"):
            callback["init_args"] |= {"queries": 2, "num_examples": 1}
        if callback["class_path"].endswith(".TripletGallery"):
            callback["init_args"]["num_triplets"] = 1
        if callback["class_path"].endswith(".NullSpaceRobustness"):
            callback.setdefault("init_args", {})["max_triplets"] = 6  # the same ones on any number of processes
        if callback["class_path"].endswith((".CertifyRadii", ".CertifyRetrieval")):
            callback.setdefault("init_args", {})["error_sample"] = 4
    copy = Path(config.name)
    copy.write_text(yaml.safe_dump(content))
    return str(copy)


@pytest.mark.parametrize(
    "config",
    # The largest student of all takes a quarter of a minute; the others differ from one that runs by numbers alone.
    [pytest.param(c, marks=pytest.mark.slow) if any(map(c.match, SLOW_CONFIGS)) else c for c in CONFIGS],
    ids=[f"{config.parent.name}/{config.stem}" for config in CONFIGS],
)
def test_every_config_runs(config: Path, request: pytest.FixtureRequest) -> None:
    room = config.parent.name
    if config.stem == "dreamsim":
        pytest.importorskip("peft", reason="comes with the extra lipsim[tune]")
    if room == "photos":
        _stand_ins_of_photos()
    else:
        _stand_ins("quickstart" if room in ("quickstart", "material", "table") else "nights")
    options = [*OPTIONS[room], *OPTIONS_OF.get(f"{room}/{config.stem}", [])]
    if room != "quickstart":
        options.append(f"--data.{'file' if room == 'table' else 'root'}={request.getfixturevalue(room)}")
    if room == "photos":
        cached = "model" if "distill" in config.stem else "data"
        options.append(f"--{cached}.cache={request.getfixturevalue('photo_cache')}")
        if cached == "model":
            options.append(f"--data.triplets.root={request.getfixturevalue('photos')}")
        if config.stem == "finetune":
            options += [
                *("--data.human=MaterialData", f"--data.human.root={request.getfixturevalue('material')}"),
                *("--data.human.image_size=64", "--data.human.val_triplets=50", "--data.human.batch_size=8"),
            ]
    if room == "imagenet":
        options.append(f"--data.triplets.root={request.getfixturevalue('nights')}")
    for subcommand in ("fit", "test"):
        short = _with_short_attacks(config)
        cli = train([subcommand, "--config", short, "--trainer.fast_dev_run=true", *options, *QUIET])
        assert cli.trainer.state.finished
        scores = {name for name in cli.trainer.callback_metrics if name.endswith("majority_score")}
        stage, expected = "test" if subcommand == "test" else "val", set()
        for name, parts in getattr(cli.datamodule, f"{stage}_groups").items():
            expected |= {f"{stage}/{part}/majority_score" for part in (name, *(f"{name}_{part}" for part in parts))}
        assert scores == expected - {"val/images/majority_score"}


@pytest.mark.parametrize("config", EVALUATIONS, ids=lambda path: path.stem)
def test_every_evaluation_runs(config: Path, request: pytest.FixtureRequest) -> None:
    save(PerceptualMetric(students.OrthogonalProjection(64, 8), 64), "metric.safetensors")
    options = {
        "builtin": ["--data.num_test=4"],
        "material": ["--data.val_triplets=20", "--data.batch_size=8"],
        "nights": ["--data.image_size=64", "--data.batch_size=2", "--data.num_workers=0"],
        "bapps": ["--data.image_size=64", "--data.batch_size=2", "--data.num_workers=0"],
        "photos": ["--data.num_test=4"],
        "table": ["--data.batch_size=2", "--data.num_workers=0"],
        "search": ["--data.batch_size=2", "--data.num_workers=0", "--trainer.callbacks.ks=[1,3]"],
    }[config.stem]
    if config.stem != "builtin":
        where = "file" if config.stem == "table" else "root"
        images = "photos" if config.stem == "search" else config.stem
        options.append(f"--data.{where}={request.getfixturevalue(images)}")
    short = _with_short_attacks(config)
    args = ["--config", short, "--checkpoint=metric.safetensors", "--trainer.accelerator=cpu", *options, *QUIET]
    cli = evaluate([*args, "--trainer.limit_test_batches=1"])
    results = read_results(Path(cli.trainer.default_root_dir) / "results.json")
    section = "retrieval" if config.stem == "search" else "certified"
    assert set(cli.datamodule.test_names) <= set(results[section]["sets"])


def test_every_config_says_what_it_costs() -> None:
    for config in [*CONFIGS, *EVALUATIONS]:
        header = [line for line in config.read_text().splitlines() if line.startswith("#")]
        script = "evaluate" if config in EVALUATIONS else "train"
        assert any(f"python scripts/{script}.py" in line for line in header), config
        assert any("second" in line or "minute" in line or "hour" in line for line in header), config


def test_the_resolved_config_can_be_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    train(["--config", str(LINEAR), "--trainer.max_epochs=1", "--model.loss.target=2.5", *SMALL, *QUIET])
    run = Path("runs/quickstart/linear")
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["loss"]["init_args"]["target"] == 2.5
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] and environment["processes"] == 1
    checkpoint = run / "checkpoints" / "last.ckpt"
    train(["--config", str(run / "config.yaml"), "--trainer.max_epochs=2", "--ckpt_path", str(checkpoint)])
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    assert "Majority score in %" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_scripts_are_subcommands_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lipsim_main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and f"lipsim {command} --config configs/" in shown and f"{command}.py" not in shown
    with pytest.raises(SystemExit) as stop:
        lipsim_main(["--help"])
    assert stop.value.code == 0 and f"\n    {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        lipsim_main([command, "--config", "nowhere.yaml"])
    assert stop.value.code == 1 and "nowhere.yaml" in capsys.readouterr().err
    if command == "train":
        lipsim_main(["train", "--config", str(LINEAR), "--trainer.fast_dev_run=true", *SMALL, *QUIET])


def test_training_without_options_is_the_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("lipsim.cli.train.quickstart", lambda: called.append("quickstart"))
    lipsim_main(["train"])
    main([])
    assert called == ["quickstart", "quickstart"]


def test_print_config_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train(["--config", str(LINEAR), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"] == "lipsim.training.FineTuning"
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nowhere.yaml"], "no config nowhere.yaml; those that come with lipsim are bapps/finetune, "),
        (["--config=quickstart/linear", "--trainer.max_epoch_count=3"], "max_epoch_count"),
        (["-c", "configs/quickstart/linear.yaml", "--model.loss.targt=3"], "'targt' is not "),
        (["--config", '{"trainer": {"max_epoch_count": 3}}'], "max_epoch_count"),
        (["--config", str(LINEAR), "--data.batch_size=0"], "batch_size of at least 1"),
        (["--config", str(LINEAR), "--data.image_size=32", *SMALL], "expected images of shape (N, 3, 64, 64)"),
        (["--config", str(LINEAR), "--ckpt_path=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (
            ["--config", str(LINEAR.parent / "distill.yaml")],
            "no metric file runs/quickstart/teacher/teacher.safetensors",
        ),
        (["--config", str(ROOT / "configs/material/finetune.yaml")], "mlagunas/material-appearance-similarity"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, *QUIET])
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "2"}, "SLURM_PROCID is not set; start with srun, or set SLURM_JOB_NAME=interactive"),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
            "SLURM_NTASKS_PER_NODE is not set; give srun or sbatch --ntasks-per-node",
        ),
    ],
)
def test_half_a_slurm_environment(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(LINEAR), *SMALL, *QUIET])
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert message in line


def test_an_interactive_slurm_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    cli = train(["--config", str(LINEAR), *SMALL, *QUIET, "--trainer.fast_dev_run=true"])
    assert cli.trainer.world_size == 1 and cli.trainer.global_step == 1  # not two, as of SLURM_NTASKS


def test_usage_that_is_wrong_has_the_status_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--nonsense"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "nonsense" in error and error.startswith("error:") and error.count("\n") == 1


def test_unknown_keys_in_a_config_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(LINEAR.read_text() + "\nlearning_rate: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(["--config", "bad.yaml"])
    assert stop.value.code == 1 and "learning_rate" in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("lipsim.cli.train.train", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["--config", "x"])


def test_messages_keep_their_reason_only() -> None:
    assert one_line("plain\n  message") == "plain message"
    tree = 'Parser key "model":\n  Does not validate against x\n  - Parser key "loss":\n    Option \'x\' is unknown'
    assert one_line(tree) == "model.loss: Option 'x' is unknown"


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncate", "truncated or no checkpoint"), ("text", "truncated or no checkpoint"), ("other", "another")],
)
def test_checkpoints_that_cannot_be_resumed(damage: str, message: str) -> None:
    module = torch.nn.Linear(3, 4)
    path = Path("a.ckpt")
    state = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.0"}
    torch.save(state, path)
    check_checkpoint(path, module)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "text":
        path.write_text("hello")
    with pytest.raises(ValueError, match=message):
        check_checkpoint(path, torch.nn.Linear(5, 4) if damage == "other" else module)


def test_checkpoints_run_no_code() -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, ("harm",)

    torch.save({"state_dict": {}, "harm": Harm()}, "harm.ckpt")
    with pytest.raises(ValueError, match="needs more than tensors"):
        check_checkpoint(Path("harm.ckpt"), torch.nn.Linear(1, 1))
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: next((root / IMAGES).glob("*")).write_bytes(b"\xff\xd8\xff"), "cannot read the image"),
        (lambda root: next((root / IMAGES).glob("*")).unlink(), "expected 100 images"),
        (lambda root: (root / "data/answers_processed_train.json").write_text("{}"), "published layout"),
        (lambda root: (root / "data/answers_processed_train.json").write_text("{"), "published layout"),
    ],
)
def test_damaged_data_is_refused(material: Path, damage, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(material)
    with pytest.raises(SystemExit):
        main(["--config", str(ROOT / "configs/material/finetune.yaml"), f"--data.root={material}", *QUIET])
    assert message in capsys.readouterr().err


@pytest.mark.slow  # starts processes; an evaluation on two of them is among the others
def test_two_processes_give_the_results_of_one() -> None:
    """15 triplets on two processes: the sampler repeats one, the results must not."""
    _stand_ins()
    config = _with_short_attacks(LINEAR.parent / "finetune.yaml")
    sizes = ["--data.num_train=16", "--data.num_val=15", "--data.num_test=15", "--data.batch_size=4"]
    found = []
    for devices in (1, 2):
        strategy = ["--trainer.devices", str(devices), *(["--trainer.strategy", "ddp"] if devices > 1 else [])]
        given = ["test", "--config", config, *sizes, *QUIET, *strategy, "--trainer.accelerator=cpu"]
        if devices == 1:
            train(given)
        else:
            command = [sys.executable, str(ROOT / "scripts/train.py"), *given]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
            assert run.returncode == 0, run.stderr[-3000:]
        folder = Path("runs/quickstart")
        tables = []
        for name in ("radii.csv", "attacks.csv"):
            with open(folder / name, newline="") as file:
                tables.append(list(csv.DictReader(file)))
        found.append((read_results(folder / "results.json"), *tables))
    (one, radii_one, attacks_one), (two, radii_two, attacks_two) = found
    for section in ("certified", "attacked", "null_space"):
        _assert_same(one[section], two[section])
    assert [row["index"] for row in radii_two] == [str(i) for i in range(15)]
    for a, b in zip(radii_one, radii_two, strict=True):
        _assert_same({k: float(v) for k, v in a.items()}, {k: float(v) for k, v in b.items()})
    broken = [[row["metric/broken_at"] for row in attacks] for attacks in (attacks_one, attacks_two)]
    assert broken[0] == broken[1] and len(broken[0]) == 15


def _assert_same(a, b) -> None:
    """Equal structures, counts and scores exactly, other numbers to a relative 1e-5."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-9)
    else:
        assert a == b


def test_the_quickstart_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.num_train=32", "--data.num_val=8", "--data.num_test=4", "--data.batch_size=16"]
    results = quickstart(["--trainer.max_epochs=1", "--trainer.accelerator=cpu", *small, *QUIET])
    folder = Path("runs/quickstart")
    for name in ("results.json", "radii.csv", "attacks.csv", "report.md", "quickstart.safetensors"):
        assert (folder / name).is_file(), name
    for name in ("scores.png", "teacher-and-student.png", "gallery.png", "attacked-builtin.png"):
        assert (folder / "plots" / name).stat().st_size > 5000, name
    for stage in ("teacher", "linear", "distilled", "."):
        assert (folder / stage / "config.yaml").is_file() and (folder / stage / "checkpoints" / "last.ckpt").is_file()
    scores = results["attacked"]["sets"]["builtin"]
    for metric in ("metric", "teacher", "linear"):
        left = [scores["metrics"][metric]["natural"], *scores["metrics"][metric]["attacked"].values()]
        assert left == sorted(left, reverse=True)
    assert scores["violations"] == 0
    assert set(results["baselines"]["sets"]["builtin"]["metrics"]) == {"pixel l2", "SSIM", "MS-SSIM"}
    printed = capsys.readouterr().out
    assert "published radius" in printed and "Null space of the student's first operator" in printed
    metric = lipsim.load(folder / "quickstart.safetensors")
    assert metric.lipschitz == results["certified"]["lipschitz"]
    assert metric.feature_error == results["certified"]["feature_error"]


class FloatsFirst:
    """What Lightning's trainer looks like where typing remembers the other order."""

    def __init__(
        self, limit_test_batches: float | int | None = None, limit_val_batches: float | int | None = None
    ) -> None:
        self.limit = limit_test_batches


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_a_limit_of_one_batch_is_not_all_of_them(given: str, expected: float | None) -> None:
    parser = StageParser()
    parser.add_class_arguments(FloatsFirst, "trainer")
    limit = parser.parse_args([f"--trainer.limit_test_batches={given}"]).trainer.limit_test_batches
    assert limit == expected and type(limit) is type(expected)
