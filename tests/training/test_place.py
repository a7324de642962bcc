"""Training goes on as if nothing had been when it is broken off anywhere, and alike on any number of processes."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluations import forked
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lipsim import LipsimError, PerceptualMetric
from lipsim.attacks.adversary import Adversary
from lipsim.callbacks import SaveOnException
from lipsim.data import Triplet, collate_triplets
from lipsim.data.order import TrainingLoader
from lipsim.datamodules.base import TripletData, as_fetched
from lipsim.layers import OrthogonalLinear
from lipsim.metric import save
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT
from lipsim.training import Distillation, FineTuning, RateScaling, TeacherTuning
from lipsim.training.base import Stage
from lipsim.training.schedules import Constant, Schedule

ROOT = Path(__file__).parents[2]
EPOCHS = 2
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # nothing is saved again


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Noise:
    """Triplets of noise, which only their data set knows."""

    preprocess, groups = None, {}  # type: ignore[var-annotated]

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.images = torch.rand(3, count, 3, 8, 8, generator=draw)
        self.votes = torch.randint(0, 6, (count,), generator=draw) / 5  # no ties

    def __len__(self) -> int:
        return len(self.votes)

    def __getitem__(self, index: int) -> Triplet:
        return Triplet(*self.images[:, index], self.votes[index], torch.tensor(index))

    def manifest(self) -> list[str]:
        return []


class NoiseData(TripletData):
    """26 triplets to train on."""

    def setup(self, stage: str) -> None:
        self.train_set, self.val_sets = Noise(26, 0), {"noise": Noise(4, 1)}


class Dropping(nn.Module):
    """An encoder with a random number generator's noise in training."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), OrthogonalLinear(192, 4))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features

    def lipschitz_bound(self) -> float:
        return 1.0


class Curve(Callback):
    """The loss of each batch and which triplets were in it, by the step of the log; fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.served: list[tuple[int, int]] = []
        self.logged: list[int] = []
        self.fail_at = fail_at

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        if number == self.fail_at:
            raise RuntimeError("broken off")
        self.losses[number] = float(loss.detach())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.served += [(trainer.current_epoch, int(i)) for i in batch.index]
        self.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _stage(encoder: nn.Module | None = None, **options: Any) -> FineTuning:
    torch.manual_seed(0)
    encoder = OrthogonalProjection(8, 4) if encoder is None else encoder
    return FineTuning(encoder, augment=True, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **options)


def _fit(
    curve: Curve,
    checkpoint: str | None = None,
    stage: Stage | None = None,
    batch_size: int = 4,
    num_workers: int = 0,
    callbacks: list[Callback] | None = None,
    save: ModelCheckpoint | None = None,
    seed: int = 0,
    data: TripletData | None = None,
    **options: Any,
) -> Tensor:
    """Train, or go on; the weights at the end."""
    stage = _stage() if stage is None else stage
    given = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    given |= {"default_root_dir": "run", "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1} | options
    if save is None and checkpoint is None:
        save = ModelCheckpoint("all", "{step}", every_n_train_steps=1, save_top_k=-1)
    given["enable_checkpointing"] = save is not None
    trainer = L.Trainer(callbacks=[*(callbacks or []), curve, *([] if save is None else [save])], **given)
    L.seed_everything(seed, verbose=False)
    data = data or NoiseData(batch_size, num_workers)
    trainer.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
    return torch.cat([parameter.detach().flatten() for parameter in stage.parameters()])


def _assert_continues(whole: Curve, part: Curve, done: int) -> None:
    """The losses, to the last digit, of every batch from number ``done`` on, and the steps that a log has for them."""
    assert part.losses == {number: loss for number, loss in whole.losses.items() if number >= done}
    assert part.served == whole.served[-len(part.served) :] and part.logged == whole.logged[done:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Tensor, str]:
    """The curve and the weights of a run that nothing disturbed, and its checkpoints by step, as a template."""
    folder = tmp_path_factory.mktemp("whole")
    curve = Curve()
    weights = _fit(curve, save=ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    return curve, weights, str(folder / "step={}.ckpt")


def test_resumed_from_any_step_the_curve_is_that_of_the_whole_run(whole: tuple[Curve, Tensor, str]) -> None:
    """26 triplets in batches of four, six steps an epoch: from the middle of one, the end of one, and in the last."""
    curve, weights, checkpoint = whole
    assert len(curve.losses) == 12 and len(set(curve.losses.values())) == 12
    assert set(Counter(curve.served).values()) == {1} and len(curve.served) == 48
    for step in (2, 6, 9):
        part = Curve()
        assert torch.equal(_fit(part, checkpoint.format(step)), weights)
        _assert_continues(curve, part, step)


def test_averaged_weights_continue_alike() -> None:
    whole, part = Curve(), Curve()
    weights = _fit(whole, callbacks=[EMAWeightAveraging(decay=0.8)])
    again = _fit(part, "all/step=4.ckpt", callbacks=[EMAWeightAveraging(decay=0.8)])
    assert torch.equal(again, weights)
    _assert_continues(whole, part, 4)


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_noise_within_the_encoder_and_loading_processes_continue_alike() -> None:
    whole, part = Curve(), Curve()
    weights = _fit(whole, stage=_stage(Dropping()), num_workers=1, val_check_interval=2)
    # Other processes than before, validation in between, and another state of torch's generators.
    again = _fit(part, "all/step=8.ckpt", _stage(Dropping()), val_check_interval=2)
    assert torch.equal(again, weights)
    _assert_continues(whole, part, 8)


@pytest.mark.parametrize("fail_at", [3, 7])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_after_an_exception_no_gradient_is_lost(accumulated: int, fail_at: int) -> None:
    """Broken off in batch 3: with two accumulated, batch 2's gradient is in no checkpoint, and it is taken again.

    So are batches 0 and 1 of the second epoch, of 6, which is broken off in batch 7 of both.
    """
    options = {"accumulate_grad_batches": accumulated}
    whole, broken, part = Curve(), Curve(fail_at=fail_at), Curve()
    weights = _fit(whole, **options)
    with pytest.raises(RuntimeError, match="broken off"):
        _fit(broken, callbacks=[SaveOnException()], **options)
    again = _fit(part, "run/checkpoints/on_exception.ckpt", **options)
    assert torch.equal(again, weights)
    _assert_continues(whole, part, fail_at - fail_at % accumulated)


class Stop(Callback):
    """Ends training after a batch, as early stopping and ``max_time`` do, and saves when all is over."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint("ended.ckpt")


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("batches", [3, 9])
@pytest.mark.parametrize("ended", ["should_stop", "max_steps"])
def test_an_epoch_that_was_broken_off_goes_on_with_its_other_samples(
    ended: str, batches: int, accumulated: int
) -> None:
    """Lightning takes it for done: the rest of it would be left out, and the schedule never end."""
    whole, begun = Curve(), Curve()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated}
    weights = _fit(whole, stage=_stage(schedule=Constant()), **options)
    steps = batches // accumulated
    limit = {"max_steps": steps} if ended == "max_steps" else {}
    stop = Stop(None if limit else batches)
    save = ModelCheckpoint("stopped", "last", save_on_train_epoch_end=True)
    _fit(begun, stage=_stage(schedule=Constant()), callbacks=[stop], save=save, **options, **limit)
    for file in ("stopped/last.ckpt", "ended.ckpt"):
        part = Curve()
        assert torch.load(file, weights_only=True)["epoch"] == (batches - 1) // 6
        assert torch.equal(_fit(part, file, _stage(schedule=Constant()), **options), weights)
        _assert_continues(whole, part, steps * accumulated)


def test_a_checkpoint_of_a_validation_within_the_epoch() -> None:
    save = ModelCheckpoint("validated", "{step}", save_on_train_epoch_end=False, save_top_k=-1)
    whole, part = Curve(), Curve()
    weights = _fit(whole, save=save, val_check_interval=2)
    assert torch.equal(_fit(part, "validated/step=10.ckpt", val_check_interval=2), weights)
    _assert_continues(whole, part, 10)


def test_batches_of_another_size_go_on_with_the_other_samples(
    whole: tuple[Curve, Tensor, str], caplog: pytest.LogCaptureFixture
) -> None:
    curve, _, checkpoint = whole
    for batch_size, options in ((3, {}), (8, {}), (2, {"accumulate_grad_batches": 2})):
        part = Curve()
        with caplog.at_level("INFO"):
            _fit(part, checkpoint.format(2), batch_size=batch_size, **options)
        before = curve.served[: 2 * 4]
        counts = Counter(before + [sample for sample in part.served if sample[0] == 0])
        assert set(counts.values()) == {1} and len(counts) == 8 + 18 - 18 % batch_size
        assert len([sample for sample in part.served if sample[0] == 1]) == 26 - 26 % batch_size
    assert caplog.text.count("the checkpoint had 4") == 2  # twice two are four
    assert "resuming with a global batch of 3; the checkpoint had 4" in caplog.text


class Shares(Callback):
    """Share of the training that is done after each batch, and the rate as a share of that of the schedule's start."""

    def __init__(self) -> None:
        self.done: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        self.done.append(pl_module.progress)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 0.01)


class Falling(Schedule):
    """The share of the steps that are left."""

    def __call__(self, step: int, total: int) -> float:
        return 1 - step / total


@pytest.mark.parametrize(("batch_size", "accumulated", "steps"), [(8, 1, 3), (3, 1, 8), (2, 2, 7)])
def test_the_schedule_goes_on_at_its_share_and_each_epoch_is_whole(
    whole: tuple[Curve, Tensor, str], batch_size: int, accumulated: int, steps: int
) -> None:
    """With larger batches the schedule would be past its end, with smaller ones its steps would be done over again."""
    curve, _, checkpoint = whole
    options: dict[str, Any] = {"batch_size": batch_size, "accumulate_grad_batches": accumulated}
    for step, done in ((2, 8), (6, 24), (8, 24 + 8)):  # the sixth is the last of its epoch
        part, shares = Curve(), Shares()
        _fit(part, checkpoint.format(step), _stage(schedule=Falling()), callbacks=[shares], **options)
        served = Counter(curve.served[:done] + part.served)
        assert set(served.values()) == {1} and len([epoch for epoch, _ in served if epoch == 1]) >= 24
        assert shares.done[-1] == 1 and shares.rates[-1] == 0
        assert shares.done[accumulated - 1] == pytest.approx(done / 48, abs=1.5 / (EPOCHS * steps))
        assert shares.rates == pytest.approx([1 - share for share in shares.done])


def test_where_the_schedule_is_outlives_a_second_resumption(whole: tuple[Curve, Tensor, str]) -> None:
    first, second, back = Shares(), Shares(), Shares()
    save = ModelCheckpoint(Path(whole[2]).parent, "eight-{step}", every_n_train_steps=1, save_top_k=-1)
    stage, seventh = _stage(schedule=Falling()), str(Path(whole[2]).with_name("eight-step=7.ckpt"))
    _fit(Curve(), whole[2].format(6), stage, batch_size=8, callbacks=[first], save=save)
    _fit(
        Curve(),
        seventh,
        _stage(schedule=Falling()),
        batch_size=8,
        callbacks=[second],
    )
    _fit(
        Curve(),
        seventh,
        _stage(schedule=Falling()),
        batch_size=4,
        callbacks=[back],
    )
    assert first.done == pytest.approx([4 / 6, 5 / 6, 1]) and second.done == first.done[1:]
    assert back.done == pytest.approx([9 / 12, 10 / 12, 11 / 12, 1])
    stopped = Shares()  # by its steps, whose schedule is over these
    _fit(Curve(), whole[2].format(4), _stage(schedule=Falling()), batch_size=8, max_steps=5, callbacks=[stopped])
    assert stopped.done == [1]
    assert stage.steps_ahead == -3
    _fit(Curve(), stage=stage, max_epochs=1)  # a stage that is trained anew is nowhere
    assert stage.steps_ahead == 0


def test_the_order_stays_that_of_the_checkpoint_with_another_seed(
    whole: tuple[Curve, Tensor, str], caplog: pytest.LogCaptureFixture
) -> None:
    curve, weights, checkpoint = whole
    part, other = Curve(), Curve()
    with caplog.at_level("INFO"):
        assert torch.equal(_fit(part, checkpoint.format(8), seed=4), weights)
    assert "the order of the data stays that of seed 0, which the checkpoint is of" in caplog.text
    _fit(other, seed=4, max_epochs=1)
    assert other.served != curve.served[:24]


def test_batch_and_rate_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    stage = _stage(rate_scaling=RateScaling(2, "sqrt"))
    with caplog.at_level("INFO"):
        _fit(Curve(), stage=stage, accumulate_grad_batches=2, max_epochs=1)
    batch = "a step: 1 process × 4 samples × 2 accumulated = 8; 3 steps in an epoch of 26 samples"
    assert f"{batch}, of which 2 are left out" in caplog.text
    rate = "learning rate: 0.01 as configured, scaled to 0.02 (sqrt, for 2 samples), 0.0125 at this step of Triangular"
    assert rate in caplog.text
    assert RateScaling(64).factor(256) == 4
    with pytest.raises(ValueError, match="expected the rule linear or sqrt and a reference batch of at least 1"):
        RateScaling(0)


class FewData(TripletData):
    """Three triplets, fewer than a batch."""

    def setup(self, stage: str) -> None:
        self.train_set, self.val_sets = Noise(3, 0), {"noise": Noise(4, 1)}


@pytest.mark.parametrize(
    ("data", "accumulated", "told", "rate"),
    [
        (FewData(4), 1, "4 samples × 1 accumulated, of which an epoch has 3", 0.03),
        (FewData(4), 2, "4 samples × 2 accumulated, of which an epoch has 3", 0.03),
        (NoiseData(4), 8, "4 samples × 8 accumulated, of which an epoch has 24", 0.24),
    ],
)
def test_a_step_has_no_more_samples_than_an_epoch(
    data: TripletData, accumulated: int, told: str, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate of 0.01 for one sample is scaled by those that there are, not by those that would fill a step."""
    stage = _stage(rate_scaling=RateScaling(1), schedule=Constant())
    with caplog.at_level("INFO"):
        _fit(Curve(), stage=stage, data=data, accumulate_grad_batches=accumulated, max_epochs=1)
    assert f"a step: 1 process × {told}" in caplog.text
    assert f"scaled to {rate:g} (linear, for 1 samples)" in caplog.text


class InBatches(Noise):
    """Its items are batches of four."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Triplet:
        return collate_triplets([super(InBatches, self).__getitem__(4 * index + row) for row in range(4)])


class BatchData(NoiseData):
    def train_dataloader(self) -> TrainingLoader:
        return self._training_loader(InBatches(12, 0), None, as_fetched)


def test_items_that_are_batches_are_called_so(caplog: pytest.LogCaptureFixture) -> None:
    """How many samples they have nobody knows, and a rate is not scaled as if they had one."""
    with caplog.at_level("INFO"):
        _fit(Curve(), data=BatchData(4), max_epochs=1)
    expected = "a step: 1 process × 1 batch × 1 accumulated; 3 steps in an epoch of 3 batches, of which 0 are left out"
    assert expected in caplog.text
    with pytest.raises(LipsimError, match="nobody knows how many samples are in a batch of the loader"):
        _fit(Curve(), stage=_stage(rate_scaling=RateScaling(4)), data=BatchData(4), max_epochs=1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_loader_of_the_users_own_trains_as_before(caplog: pytest.LogCaptureFixture) -> None:
    """Its samples have no positions: what is drawn depends on the step and the row, and again does so when resumed."""
    torch.manual_seed(0)
    stage, keys = _stage(), []

    class Spy(Curve):
        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
            keys.append((pl_module.sample_keys(4), pl_module.batch_key()))

    loader = torch.utils.data.DataLoader(Noise(8, 0), 4, collate_fn=NoiseData(4).collate)  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[Spy()],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(stage, loader)
    assert len({int(key) for rows, batch in keys for key in (*rows, batch)}) == 4 * 5
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False  # as in the middle of an epoch
    trainer.fit_loop.epoch_progress.current.processed = 1
    with caplog.at_level("INFO"):
        trainer.fit_loop.max_epochs = 3
        stage.on_train_start()
    assert "of which the checkpoint does not say what was served: some samples may be trained on twice" in caplog.text


def _teacher(**options: Any) -> TeacherTuning:
    torch.manual_seed(0)
    vit = SmallViT(8, patch_size=4, width=8, depth=1, heads=2)
    return TeacherTuning(vit, contrast=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)


def _stages() -> dict[str, tuple[Callable[[], Stage], dict[str, Any]]]:
    """Stages, each with all that is random in it, and options of their training."""
    return {
        "adversarial": (lambda: _teacher(adversary=Adversary(eps=0.3, steps=2)), {}),
        "distillation": (lambda: Distillation(Path("teacher.safetensors"), OrthogonalProjection(8, 8)), {}),
        "one uneven batch": (_stage, {"batch_size": 30}),  # 26 triplets: 13 on each of two processes, 9 on one of three
        "resumed": (_stage, {"checkpoint": "all/step=8.ckpt"}),
    }


def _train_all(processes: int, folder: Path) -> None:
    found = {}
    for name, (make, options) in _stages().items():
        curve, size = Curve(), options.get("batch_size", 4)
        spread = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
        save = None if "checkpoint" in options else ModelCheckpoint(f"{name}-{processes}")
        given = {**options, **spread, "batch_size": -(-size // processes), "save": save}
        found[name] = curve.losses, _fit(curve, stage=make(), **given)
    rank = os.environ.get("RANK", "0") if processes > 1 else "0"
    torch.save(found, folder / f"{processes}-{rank}.pt")


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_curves_and_weights_on_two_processes_are_those_of_one() -> None:
    """The same global batch, in float32; what resumes was begun by one process."""
    teacher = PerceptualMetric(SmallViT(8, patch_size=4, width=8, depth=1, heads=2), 8, anchor=0.0, lipschitz=math.inf)
    save(teacher, "teacher.safetensors")
    _fit(Curve())
    _train_all(1, Path())
    forked(2, _train_all, 2, Path())
    one, *two = (torch.load(f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, (losses, weights) in one.items():
        assert len(losses) == {"one uneven batch": 2, "resumed": 4}.get(name, 12), name
        for found, others in (ranks[name] for ranks in two):
            assert found == pytest.approx(losses, rel=1e-5), name
            torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-6, msg=name)


OPTIONS = [
    *("--config", str(ROOT / "configs/quickstart/linear.yaml"), "--trainer.accelerator=cpu"),
    *("--data.num_train=200", "--data.num_val=8", "--data.batch_size=4", "--model.student.out_features=4"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.max_epochs=3"),
]
EACH = {"dirpath": "all", "filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}
CHECKPOINTS = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": EACH}]


def _launch(processes: int, folder: str, *more: str) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    spread = ["--trainer.devices", str(processes), "--trainer.strategy=ddp", "--trainer.default_root_dir", folder]
    command = [*launcher, str(ROOT / "scripts/train.py"), *OPTIONS, *spread, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _logged(folder: str) -> dict[int, float]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


@pytest.mark.slow  # starts processes: a minute of two cores
def test_two_processes_killed_in_mid_epoch_are_resumed_by_two_and_by_one() -> None:
    """Kill −9 of the launcher and of both processes; the loss curve is that of the run that nothing disturbed."""
    assert _launch(2, "whole").wait(200) == 0
    running = _launch(2, "killed", f"--trainer.callbacks={json.dumps(CHECKPOINTS)}")
    deadline = time.monotonic() + 200
    while len(list(Path("all").glob("*.ckpt"))) < 9 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    for process in _children("killed"):
        os.kill(process, signal.SIGKILL)
    last = max(Path("all").glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    step = int(last.stem.removeprefix("step="))
    assert step % 25, "it was killed at the end of an epoch"  # 200 triplets by 2 × 4
    whole = _logged("whole")
    assert len(whole) == 75
    for processes, size in ((2, 4), (1, 8)):
        given = ["--ckpt_path", str(last), f"--data.batch_size={size}"]
        assert _launch(processes, f"resumed-{processes}", *given).wait(200) == 0
        found = _logged(f"resumed-{processes}")
        assert found == pytest.approx({number: loss for number, loss in whole.items() if number >= step}, rel=1e-5)


def _children(word: str) -> list[int]:
    """Processes of this user whose command line has a word: workers of the launcher are in sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in command and str(ROOT / "scripts/train.py").encode() in command:
            found.append(int(entry.parent.name))
    return found
