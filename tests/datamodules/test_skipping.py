"""Images that are damaged or gone in the middle of training: named, or skipped, counted and named."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from evaluations import forked
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor, distributed, nn

import lipsim
from lipsim import LipsimError
from lipsim.cli.parser import one_line_errors
from lipsim.data.builtin.triplets import BuiltinTriplets
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.data.skipping import NothingRead, PartlyRead, ReadableBatch, ReadableSamples, Unread
from lipsim.data.triplet import Triplet, collate_triplets
from lipsim.datamodules import ImageFolderData, NightsData
from lipsim.datamodules.base import TripletData
from lipsim.datamodules.skipped import SkippedSamples
from lipsim.metric import save
from lipsim.students import OrthogonalProjection, TorchlipNetwork
from lipsim.teachers import SmallViT
from lipsim.training import Distillation, FineTuning, RadiusHinge, TeacherTuning

pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


class Damage(Callback):
    """Damages one image and removes another when the second epoch begins."""

    def __init__(self, *files: Path) -> None:
        self.files = files

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            for number, file in enumerate(self.files):
                file.write_bytes(file.read_bytes()[:60]) if number % 2 == 0 else file.unlink()


class Steps(Callback):
    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append((trainer.current_epoch, len(batch)))


def _train(stage: Any, data: Any, folder: Path, *callbacks: Callback, epochs: int = 2, **options: Any) -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    lipsim.train(stage, data, max_epochs=epochs, directory=folder, callbacks=callbacks, **quiet, **options)


def _references(data: TripletData, nights: Path) -> list[Path]:
    data.setup("fit")
    return [nights / row.paths[0] for row in data.train_set.rows]  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_training_stops_and_names_the_file(
    workers: int, nights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = NightsData(nights, image_size=16, batch_size=2, num_workers=workers)
    file = _references(data, nights)[3]
    with pytest.raises(SystemExit) as stop, one_line_errors():
        _train(FineTuning(OrthogonalProjection(16, 4)), data, tmp_path / "run", Damage(file))
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: cannot read the image {file} (") and line.endswith("replace the file")


def test_a_file_that_is_gone_is_named_to_python_too(nights: Path, tmp_path: Path) -> None:
    data = NightsData(nights, image_size=16, batch_size=2, num_workers=1)
    files = _references(data, nights)
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=rf"^no image file {files[0]}$"):
        _train(FineTuning(OrthogonalProjection(16, 4)), data, tmp_path / "run")


def test_skipped_triplets_are_counted_and_named(nights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two of eight: batches of four are of four or fewer, and one of nothing changes no weight."""
    data = NightsData(nights, image_size=16, batch_size=1, num_workers=1, on_error="skip")
    files, steps = _references(data, nights)[:2], Steps()
    total = len(data.train_set or ())
    _train(FineTuning(OrthogonalProjection(16, 4)), data, tmp_path / "run", Damage(*files), steps)
    assert sorted(size for epoch, size in steps.sizes if epoch == 1) == [0, 0] + [1] * (total - 2)
    assert f"skipped 2 of {total} training samples of this epoch (first: " in caplog.text
    with open(tmp_path / "run" / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["epoch"], row["sample"]) for row in rows) == [("1", "0"), ("1", "1")]
    reasons = " ".join(row["reason"] for row in rows)
    assert f"cannot read the image {files[0]}" in reasons and f"no image file {files[1]}" in reasons


def test_evaluations_never_skip(nights: Path, tmp_path: Path) -> None:
    data = NightsData(nights, image_size=16, batch_size=2, num_workers=0, on_error="skip")
    data.setup("test")
    (name,) = data.test_sets
    (nights / data.test_sets[name].rows[1].paths[1]).write_bytes(b"damaged")  # type: ignore[attr-defined]
    metric = lipsim.PerceptualMetric(OrthogonalProjection(16, 4), 16)
    with pytest.raises(LipsimError, match=r"cannot read the image .*/distort/.*replace the file"):
        lipsim.evaluate(metric, data, eps=[0.1], directory=tmp_path / "run", accelerator="cpu")


def test_images_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(6):
        for part in ("train", "val"):
            file = tmp_path / "images" / part / "a" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (number * 40, 9, 9)).save(file)
    data = ImageFolderData(tmp_path / "images", image_size=16, batch_size=6, num_workers=0, on_error="skip")
    steps, bad = Steps(), tmp_path / "images/train/a/2.png"
    save(lipsim.PerceptualMetric(OrthogonalProjection(16, 4), 16), tmp_path / "teacher.safetensors")
    stage = Distillation(tmp_path / "teacher.safetensors", OrthogonalProjection(16, 4))
    _train(stage, data, tmp_path / "run", Damage(bad), steps)
    assert steps.sizes == [(0, 6), (1, 5)] and f"(first: cannot read the image {bad}" in caplog.text


def test_a_name_that_is_not_utf_8_is_written_as_it_is(tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        fast_dev_run=False, global_rank=0, default_root_dir=str(tmp_path), current_epoch=1, global_step=7
    )
    reason = os.fsdecode(b"cannot read the image caf\xe9.png")
    SkippedSamples().add(trainer, 4, [Unread(3, reason)])  # type: ignore[arg-type]
    assert (tmp_path / "skipped.csv").read_bytes().endswith(b"1,7,3,cannot read the image caf\xe9.png\r\n")


def _triplet(index: int) -> Triplet:
    return Triplet(*(torch.rand(3, 4, 4) for _ in range(3)), torch.tensor(0.0), torch.tensor(index))


class Some:
    """Of four triplets the odd ones cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Triplet:
        if index % 2:
            raise FileNotFoundError(f"no image file {index}.png")
        if index == 9:
            raise RuntimeError("a fault of the code is no matter of files")
        return _triplet(index)


def test_a_batch_has_what_could_be_read() -> None:
    samples, collate = ReadableSamples(Some()), ReadableBatch(collate_triplets)
    assert isinstance(collate([samples[0], samples[2]]), Triplet)
    batch = collate([samples[i] for i in range(4)])
    assert isinstance(batch, PartlyRead) and batch.batch.index.tolist() == [0, 2]
    assert batch.unread == [Unread(1, "no image file 1.png"), Unread(3, "no image file 3.png")]
    nothing = collate([samples[1], samples[3]])
    assert isinstance(nothing.batch, NothingRead) and len(nothing.batch) == 0 and len(nothing.unread) == 2


def test_a_disk_that_is_gone_is_no_matter_of_a_few_files(tmp_path: Path) -> None:
    class Trainer:
        fast_dev_run, global_rank, current_epoch, global_step, default_root_dir = False, 1, 0, 7, str(tmp_path)

    counts = SkippedSamples()
    counts.add(Trainer(), 199, [Unread(i, f"no image file {i}") for i in range(30)])  # type: ignore[arg-type]
    rows = (tmp_path / "skipped-1.csv").read_text().splitlines()
    assert rows[:2] == ["epoch,step,sample,reason", "0,7,0,no image file 0"] and len(rows) == 31
    with pytest.raises(LipsimError, match=r"31 of 201 training samples could not be read \(first: no image file 0\)"):
        counts.add(Trainer(), 2, [Unread(0, "no image file 0")])  # type: ignore[arg-type]


def _step_of(stage: Any, batch: Any, count: int, *, together: bool = True) -> list[Tensor]:
    """Gradients of a step, the mean over processes, or this one's part of it."""
    stage._trainer = SimpleNamespace(
        **{"world_size": count, "global_rank": 0, "global_step": 5, "estimated_stepping_batches": 10},
        train_dataloader=None,
        fit_loop=SimpleNamespace(total_batch_idx=5),
    )
    stage.log = lambda *_, **__: None
    loss = stage.training_step(batch, 0)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    gradients = [g / count for g in torch.autograd.grad(loss, parameters)]
    if count > 1 and together:
        for gradient in gradients:
            distributed.all_reduce(gradient)
    return gradients


def _stages(folder: Path) -> list[Any]:
    torch.manual_seed(0)
    teacher = folder / "teacher.safetensors"
    distillation = Distillation(teacher, OrthogonalProjection(16, 4), jitter=False)
    tuning = TeacherTuning(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), contrast=0.5, augment=False)
    cached = Distillation(teacher, OrthogonalProjection(16, 4), jitter=False)
    cached.cache = SimpleNamespace(description=SimpleNamespace(features=4))  # type: ignore[assignment]
    return [FineTuning(OrthogonalProjection(16, 4)), distillation, cached, tuning]


def test_a_blank_image_is_no_part_of_batch_statistics() -> None:
    """Of one image of one colour they would be nonsense, and of one value a channel torch refuses to take them."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten())
    encoder.image_size = 16  # type: ignore[assignment]
    stage = TeacherTuning(encoder, batch_statistics=True)
    stage.train()
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    gradients = _step_of(stage, NothingRead(), 2, together=False)
    assert len(gradients) == 4 and not any(gradient.any() for gradient in gradients)
    assert stage.metric.encoder.training and stage.metric.encoder[1].training  # type: ignore[index]
    torch.testing.assert_close(dict(stage.named_buffers()), before)


def test_a_blank_image_reaches_every_parameter() -> None:
    """In evaluation mode torchlip's layers fold their weights, through which no gradient goes."""
    stage = FineTuning(TorchlipNetwork(16, 4, blocks=(8,), depths=(1,), widths=(8,)))
    stage.train()
    parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    gradients = _step_of(stage, NothingRead(), 2, together=False)  # raises where a parameter has none
    assert len(gradients) == len(parameters) > 2 and not any(gradient.any() for gradient in gradients)


def _batch(stage: Any) -> Triplet | EmbeddedImages:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(3, 4, 3, 16, 16, generator=draw)
    if getattr(stage, "cache", None) is not None:
        return EmbeddedImages(images[0], torch.randn(4, 4, generator=draw))
    return Triplet(*images, torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.arange(4))


class _Timed(TripletData):
    """Triplets of which one batch in three cannot be read."""

    def __init__(self) -> None:
        super().__init__(batch_size=1, num_workers=0, image_size=16, on_error="skip")

    def setup(self, stage: str) -> None:
        self.train_set = self.train_set or _Gaps()


class _Gaps(BuiltinTriplets):
    def __init__(self) -> None:
        super().__init__("val", 40, image_size=16)

    def __getitem__(self, index: int) -> Triplet:
        if index in (1, 4):
            raise FileNotFoundError(f"no image file {index}.png")
        return super().__getitem__(index)


class _Asked(Callback):
    """How often the share of the time was asked for in each batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[bool, int]] = []
        self.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((isinstance(batch, NothingRead), self.count))
        self.count = 0
        trainer.should_stop = len(self.batches) == 40


def test_every_process_asks_for_the_time_as_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is exchanged, and others would wait for ever for one that has read nothing and does not ask."""
    asked, share = _Asked(), FineTuning._share_of_time

    def count(stage: FineTuning) -> float | None:
        asked.count += 1
        return share(stage)

    monkeypatch.setattr(FineTuning, "_share_of_time", count)
    stage = FineTuning(OrthogonalProjection(16, 4), loss=RadiusHinge(target=1.0))
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"max_time": "00:01:00:00", "limit_val_batches": 0, "callbacks": [asked], **quiet}
    lipsim.train(stage, _Timed(), directory=tmp_path, **options)
    numbers = {count for _, count in asked.batches[1:]}
    assert {nothing for nothing, _ in asked.batches} == {False, True} and len(numbers) == 1 and numbers != {0}


def _one_of_two_has_nothing(folder: Path, half: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = [_step_of(stage, NothingRead() if rank else _batch(stage), 2) for stage in _stages(folder)]
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16-mixed"])
def test_a_process_without_a_batch_takes_part_in_the_step(tmp_path: Path, half: bool) -> None:
    """It waits for nobody and nobody for it, and the step is that of the samples that there are."""
    save(lipsim.PerceptualMetric(OrthogonalProjection(16, 4), 16), tmp_path / "teacher.safetensors")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = [_step_of(stage, _batch(stage), 1) for stage in _stages(tmp_path)]
    forked(2, _one_of_two_has_nothing, tmp_path, half)
    for rank in range(2):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
