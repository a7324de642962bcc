"""Distillation from an embedding cache: the teacher is not run, and a cache of something else is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lipsim import PerceptualMetric
from lipsim.callbacks import CertifyRadii
from lipsim.cli.stage import train
from lipsim.data import SharedTriplet
from lipsim.data.embeddings.axes import principal_axes
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.datamodules import BuiltinData, ImageFolderData, TableData
from lipsim.metric import load, save
from lipsim.students import OrthogonalShiftNetwork
from lipsim.teachers import SmallViT
from lipsim.training import Distillation, ScaleFree
from lipsim.training.distillation import unrepeated
from lipsim.training.teacher_cache import cache_teacher


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher, images in train/ and val/, and the teacher's embeddings of them in cache/."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "other"):
        vit = SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
        save(PerceptualMetric(vit, 16, anchor=0.0, lipschitz=float("inf")), f"{name}.safetensors")
    rng = np.random.default_rng(0)
    for i in range(24):
        file = Path("images") / ("val" if i % 4 == 3 else "train") / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    _cache("cache")


def _cache(output: str, **options: Any) -> None:
    given = {"accelerator": "cpu", "num_workers": 0, "dtype": "float32", **options}
    cache_teacher("teacher.safetensors", "images", output, **given)


def _data(**options: Any) -> ImageFolderData:
    return ImageFolderData(Path("images"), **{"image_size": 16, "batch_size": 4, "num_workers": 0, **options})


def _student(out_features: int = 12) -> OrthogonalShiftNetwork:
    torch.manual_seed(0)
    return OrthogonalShiftNetwork(16, out_features, grid=4, widths=(32,), depths=(1,), linear_depth=1, linear_width=12)


def _trainer(**options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=2, enable_checkpointing=False, **quiet, **options)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images teachers embed, batch by batch."""
    counts: list[int] = []
    forward = SmallViT.forward

    def spy(self: SmallViT, x: Tensor) -> Tensor:
        counts.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(SmallViT, "forward", spy)
    return counts


def _fit(module: Distillation, data: L.LightningDataModule) -> dict[str, float]:
    trainer = _trainer()
    L.seed_everything(3, verbose=False)
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("teacher", [None, Path("teacher.safetensors")])
def test_a_cache_gives_what_the_teacher_gives(teacher: Path | None, seen: list[int]) -> None:
    """Same views, same order, same jitter: the weights after training are the same to rounding."""
    plainly = Distillation(Path("teacher.safetensors"), _student())
    expected = _fit(plainly, _data())
    assert sum(seen) == 2 * (16 + 6)  # 16 of 18 training images an epoch, and 6 to validate on
    seen.clear()
    cached = Distillation(teacher, _student(), cache=Path("cache"))
    found = _fit(cached, _data())
    assert not seen and cached.teacher is None
    assert {"val/images/cosine_similarity", "val/images/distance_correlation"} < found.keys()
    assert found == pytest.approx(expected, rel=1e-3)
    for (name, a), b in zip(plainly.metric.named_parameters(), cached.metric.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_principal_axes_are_followed_by_a_student_of_fewer_features_and_another_size(seen: list[int]) -> None:
    _cache("squares", short_side=16, views=["plain"])
    seen.clear()
    student = OrthogonalShiftNetwork(8, 4, grid=4, widths=(32,), depths=(1,), linear_depth=1, linear_width=12)
    stage = Distillation(None, student, cache=Path("squares"), principal_axes=4)
    assert stage.axes is not None and torch.equal(stage.axes, principal_axes(EmbeddingCache("squares"), 4))
    assert torch.equal(stage.state_dict()["axes"], stage.axes)
    with pytest.raises(ValueError, match=r"CentralCrop.image_size=8, short_side=9.; set image_size and short_side"):
        _fit(stage, _data(image_size=8, short_side=9, views=("plain",)))
    found = _fit(stage, _data(image_size=8, short_side=8, views=("plain",)))
    assert not seen and -1 < found["val/images/cosine_similarity"] < 1
    embedding = torch.randn(3, 12)
    target = stage.target(EmbeddedImages(torch.rand(3, 3, 8, 8), embedding))
    assert target is not None and torch.equal(target, embedding @ stage.axes)
    with torch.autocast("cpu", torch.bfloat16):
        half = stage.target(EmbeddedImages(torch.rand(3, 3, 8, 8), embedding))
    assert half is not None and torch.equal(half, target)  # which says the dtype, too
    with pytest.raises(ValueError, match=r"name model\.cache"):
        Distillation(Path("teacher.safetensors"), student, principal_axes=4)


def test_both_views_have_the_target_of_the_clean_view(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, seen = load("teacher.safetensors"), []

    class Watching(ScaleFree):
        def __call__(self, student: Tensor, teacher: Tensor, anchor: float) -> Tensor:
            seen.append(teacher)
            return super().__call__(student, teacher, anchor)

    def watch(module: Distillation, batch: EmbeddedImages, batch_idx: int) -> None:
        assert isinstance(batch, EmbeddedImages)
        with torch.no_grad():
            torch.testing.assert_close(batch.embedding, metric.embed(batch.images), rtol=1e-4, atol=1e-5)
        seen.append(batch.embedding)

    monkeypatch.setattr(Distillation, "on_train_batch_start", watch)
    _fit(Distillation(student=_student(), cache=Path("cache"), loss=Watching()), _data(num_workers=2))
    assert len(seen) == 3 * 8
    for target, clean, jittered in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert torch.equal(target, clean) and torch.equal(target, jittered)


def test_triplets_are_scored_besides_and_embedded_once(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    embed = PerceptualMetric.embed

    def spy(self: PerceptualMetric, x: Tensor, **options: Any) -> Tensor:
        counts.append(len(x))
        return embed(self, x, **options)

    builtin = BuiltinData(num_train=8, num_val=10, num_test=8, image_size=16, batch_size=8)
    module = Distillation(student=_student(), cache=Path("cache"))
    monkeypatch.setattr(PerceptualMetric, "embed", spy)
    trainer = _trainer(callbacks=[CertifyRadii(error_sample=4)])
    trainer.validate(module, _data(triplets=builtin), verbose=False)
    metrics = trainer.callback_metrics
    assert {"val/builtin/majority_score", "val/builtin/certified_1", "val/images/cosine_similarity"} < metrics.keys()
    assert "val/builtin/cosine_similarity" not in metrics and not seen
    images = 6 + 3 * 10
    assert sum(counts) - images <= 4  # CertifyRadii measures the error of some
    counts.clear()
    trainer = _trainer()
    trainer.validate(Distillation(Path("teacher.safetensors"), _student()), builtin, verbose=False)
    assert sum(counts) == 2 * 3 * 10 and sum(seen) == 30  # student and teacher
    assert "val/builtin/cosine_similarity" in trainer.callback_metrics


@pytest.mark.parametrize("folder", [True, False])
def test_another_way_of_resizing_is_told_where_there_is_an_option(folder: bool, caplog: Any) -> None:
    """Images of a folder are cropped, and no option of their data has them as a teacher expects."""
    vit = SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    save(PerceptualMetric(vit, 16, resize="pil", lipschitz=float("inf")), "eight_bit.safetensors")
    triplet = ",".join(f"images/val/class{i % 2}/{i}.png" for i in (3, 7, 11))
    lines = ["reference,left,right,right_vote,split", *(f"{triplet},1,{part}" for part in ("train", "val", "test"))]
    Path("study.csv").write_text("\n".join(lines))
    table = TableData(Path("study.csv"), 16, batch_size=4, num_workers=0)
    module = Distillation(Path("eight_bit.safetensors"), _student())
    with caplog.at_level("INFO"):
        _trainer().validate(module, _data(triplets=table) if folder else table, verbose=False)
    assert ("pass --data.resize=pil" in caplog.text) is not folder


@pytest.mark.parametrize(("new", "counted"), [([1, 1, 1], [0, 1, 2, 3, 4, 5]), ([1, 0, 1], [0, 1, 2, 5])])
def test_shared_triplets_are_compared_image_by_image(
    new: list[float], counted: list[int], triplets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over distinct images of triplets that no sampler repeats, the scores over the triplets, from one embedding."""
    monkeypatch.setattr("lipsim.training.distillation.unrepeated", lambda *_: torch.tensor(new))
    monkeypatch.setattr("lipsim.training.distillation.evaluation_loaders", lambda trainer: [None])
    module = Distillation(Path("teacher.safetensors"), _student()).eval()
    ids = torch.tensor([[0, 1, 2], [2, 3, 4], [1, 0, 5]])
    batch = SharedTriplet(triplets.reference[:6], ids, torch.tensor([0.0, 1, 0]), torch.arange(3))
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name.split("/")[-1], value)  # type: ignore[assignment]
    module.trainer = _trainer()
    module.set_name = lambda index: "shared"  # type: ignore[method-assign]
    module.groups = lambda name: {}  # type: ignore[method-assign]
    module.positions = lambda batch, *_: batch.index  # type: ignore[method-assign]
    with torch.no_grad():
        found = module.validation_step(batch, 0)
        student = module.metric.embed(batch.distinct)
        target = load("teacher.safetensors").embed(batch.distinct)
    assert found is not None
    for part, column in zip(found["evaluated"].features, ids.unbind(1), strict=True):
        torch.testing.assert_close(part, student[column])
    cosine = (student * target).sum(1) / (student.norm(dim=1) * target.norm(dim=1))
    torch.testing.assert_close(logged["cosine_similarity"], cosine[counted].mean())


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {},
            lambda: shutil.copy("other.safetensors", "teacher.safetensors"),
            "is of another teacher .SmallViT .* than",
        ),
        ({"image_size": 8}, None, "under CentralCrop.image_size=16, short_side=None., the data has .*_size=8"),
        ({"short_side": 16}, None, "set image_size and short_side of the data alike, or make another cache"),
        ({"cache": "plain"}, lambda: _cache("plain", views=["plain"]), "plain and lacks flip; leave them out"),
        ({}, lambda: _paint("images/train/class0/4.png"), "class0/4.png is not the image whose embedding is in"),
        ({}, lambda: _paint("images/val/class1/x.png"), "1 of 7 images in images/val are not in .*val/class1/x.png"),
        ({}, lambda: shutil.rmtree("cache"), "no embedding cache at cache; lipsim cache-teacher makes one"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    options: dict[str, Any], change: Callable[[], Any] | None, message: str
) -> None:
    if change is not None:
        change()
    cache = Path(options.pop("cache", "cache"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _fit(Distillation(Path("teacher.safetensors"), _student(), cache=cache), _data(**options))


def _paint(name: str) -> None:
    Image.new("RGB", (20, 20)).save(name)


def test_data_serve_the_embeddings_of_the_stage_at_hand(seen: list[int]) -> None:
    data = _data()
    _fit(Distillation(student=_student(), cache=Path("cache")), data)
    assert not seen
    _fit(Distillation(Path("other.safetensors"), _student()), data)
    assert sum(seen) == 2 * (16 + 6)
    _fit(Distillation(student=_student(), cache=Path("cache")), data)
    assert sum(seen) == 2 * (16 + 6)


def test_a_cache_needs_files_to_look_up() -> None:
    module = Distillation(student=_student(), cache=Path("cache"))
    with pytest.raises(ValueError, match="BuiltinData has no files that a cache could be of; choose ImageFolderData"):
        _fit(module, BuiltinData(num_train=8, num_val=4, num_test=4, image_size=16))
    with pytest.raises(ValueError, match=r"name model\.teacher or model\.cache"):
        Distillation(student=_student())
    assert len(EmbeddingCache("cache")) == 24


def test_a_teacher_of_another_size_needs_a_cache() -> None:
    student = OrthogonalShiftNetwork(8, 12, grid=4, widths=(32,), depths=(1,), linear_depth=1, linear_width=12)
    with pytest.raises(ValueError, match=r"teacher takes images of 16 pixels and the student of 8; .*lipsim cache-tea"):
        Distillation(Path("teacher.safetensors"), student)
    assert Distillation(Path("teacher.safetensors"), student, cache=Path("cache")).teacher is None


def test_the_command_line_takes_a_cache_in_place_of_a_teacher() -> None:
    config = Path(__file__).parents[2] / "configs/imagenet/distill.yaml"
    student = ["--model.student=lipsim.students.OrthogonalProjection", "--model.student.image_size=16"]
    data = ["--data.root=images", "--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cache = ["--model.teacher=null", "--model.cache=cache", "--model.student.out_features=12", "--data.triplets=null"]
    small = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=true"]
    cli = train(["fit", "--config", str(config), *student, *data, *cache, *quiet, *small])
    assert cli.trainer.callback_metrics["val/images/cosine_similarity"].isfinite()


@pytest.mark.parametrize(("size", "world_size", "batch_size"), [(19, 2, 4), (7, 3, 2), (8, 4, 8), (5, 1, 2), (3, 2, 1)])
def test_images_that_a_distributed_sampler_repeats_count_once(size: int, world_size: int, batch_size: int) -> None:
    dataset, seen = TensorDataset(torch.arange(size)), []
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=False)
        loader = DataLoader(dataset, batch_size, sampler=sampler)
        for i, (batch,) in enumerate(loader):
            new = unrepeated(len(batch), i, loader, rank, world_size)
            seen += batch[new > 0].tolist()
    assert sorted(seen) == list(range(size))


def test_images_of_a_sampler_that_does_not_tell_are_refused_on_several_processes() -> None:
    dataset = TensorDataset(torch.arange(5))
    loader = DataLoader(dataset, batch_sampler=[[0, 2], [4]])
    assert unrepeated(2, 0, loader, rank=0, world_size=1).tolist() == [1, 1]
    with pytest.raises(ValueError, match="nobody knows which images the validation sampler repeats"):
        unrepeated(2, 0, loader, rank=0, world_size=2)
