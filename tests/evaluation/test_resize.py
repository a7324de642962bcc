"""How the images of an evaluation are resized: as the metric expects, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from lipsim import PerceptualMetric
from lipsim.callbacks import AttackRobustness, CertifyRadii
from lipsim.cli.evaluate import evaluate
from lipsim.data import NightsTriplets, Preprocess, Triplet, collate_triplets
from lipsim.data.contracts import groups_of, resizes_of
from lipsim.datamodules import BuiltinData, NightsData, TableData
from lipsim.metric import TiledMetric, load, save
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning

SIZE = 16


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _file(resize: str) -> str:
    return str(save(PerceptualMetric(OrthogonalProjection(SIZE, 8), SIZE, resize=resize), f"{resize}.safetensors"))


def _trainer(**options: Any) -> L.Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    return L.Trainer(enable_model_summary=False, enable_checkpointing=False, **options)


def _evaluate(data: str, root: Path, checkpoint: str, *more: str) -> None:
    kind = {"nights": "NightsData", "bapps": "BappsData", "material": "MaterialData"}[data]
    own = {"material": ["--data.val_triplets=200"]}.get(data, ["--data.num_workers=0"])
    trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={data}"]
    given = [f"--data=lipsim.datamodules.{kind}", f"--data.root={root}", f"--data.image_size={SIZE}", *own]
    evaluate(
        [*trainer, "--trainer.callbacks=lipsim.callbacks.CertifyRadii", *given, f"--checkpoint={checkpoint}", *more]
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Triplet]:
    """The batches that a certification sees."""
    batches: list[Triplet] = []
    original = CertifyRadii.see

    def see(self: CertifyRadii, trainer: Any, module: Any, features: Any, batch: Triplet, name: str) -> Any:
        batches.append(batch)
        return original(self, trainer, module, features, batch, name)

    monkeypatch.setattr(CertifyRadii, "see", see)
    return batches


@pytest.mark.parametrize("data", ["nights", "bapps", "material"])
def test_an_exported_metric_sees_images_as_it_says(
    data: str, seen: list[Triplet], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = request.getfixturevalue(data), _file("pil")
    _evaluate(data, root, file, "--max_triplets=4")
    images = torch.cat([torch.cat(batch.images()) for batch in seen])
    assert torch.equal((images * 255).round() / 255, images)  # a resize in 8 bits leaves eight bits
    results = json.loads(Path(data, "results.json").read_text())
    assert results["certified"]["resize"] == results["evaluation"]["resize"] == "pil"
    before = Path(data, "results.json").read_bytes()
    with pytest.raises(ValueError, match="expected images resized by 'pil', which the metric is for, got data with"):
        _evaluate(data, root, file, "--data.resize=float")
    assert Path(data, "results.json").read_bytes() == before
    seen.clear()
    _evaluate(data, root, _file("float"), "--max_triplets=4")
    images = torch.cat([torch.cat(batch.images()) for batch in seen])
    assert not torch.equal((images * 255).round() / 255, images)


def test_a_metric_is_what_it_was_trained_on_and_stays_it(nights: Path) -> None:
    def data(resize: str | None) -> NightsData:
        return NightsData(nights, image_size=SIZE, resize=resize, batch_size=4, num_workers=0)

    stage, trainer = FineTuning(OrthogonalProjection(SIZE, 8)), _trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(stage, data("pil"))
    trainer.save_checkpoint("stage.ckpt")
    assert stage.metric.preprocess.resize == load("stage.ckpt").preprocess.resize == "pil"
    _trainer().test(stage, data("pil"), verbose=False)
    with pytest.raises(ValueError, match="resized by 'pil', which the metric is for, got nights with images"):
        _trainer().test(stage, data("float"), verbose=False)
    _trainer().test(stage, BuiltinData(num_test=2, image_size=SIZE), verbose=False)  # nothing is resized
    assert stage.metric.preprocess.resize == "pil"
    # A checkpoint tells what its weights are for.
    fresh = FineTuning(OrthogonalProjection(SIZE, 8))
    _trainer().test(fresh, data("pil"), ckpt_path="stage.ckpt", weights_only=True, verbose=False)
    assert fresh.metric.preprocess.resize == "pil"
    fresh = FineTuning(OrthogonalProjection(SIZE, 8))
    with pytest.raises(ValueError, match="resized by 'pil', which the metric is for, got nights with images"):
        _trainer().test(fresh, data("float"), ckpt_path="stage.ckpt", weights_only=True, verbose=False)


def test_a_stage_starts_with_images_as_its_metric_expects(nights: Path) -> None:
    stage = FineTuning(init_from=Path(_file("pil")))
    data = NightsData(nights, image_size=SIZE, resize="pil", num_workers=0)
    _trainer().test(stage, data, verbose=False)
    trainer = _trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(stage, BuiltinData(num_train=4, num_val=2, image_size=SIZE, batch_size=4))
    assert stage.metric.preprocess.resize == "pil"


def test_sets_behind_loaders_of_ones_own_are_looked_at(nights: Path) -> None:
    triplets = Subset(NightsTriplets(nights, "test", Preprocess(SIZE, "pil")), [0, 1, 2])
    loader = DataLoader(triplets, 2, collate_fn=collate_triplets)
    with pytest.raises(ValueError, match="got set0 with images resized by 'pil'"):
        _trainer().test(FineTuning(OrthogonalProjection(SIZE, 8)), loader, verbose=False)


def test_metrics_to_compare_with_see_the_same_images(nights: Path) -> None:
    attack = AttackRobustness(eps=[0.1], steps=1, others={"published": Path(_file("pil"))})
    data = NightsData(nights, image_size=SIZE, resize="float", num_workers=0)
    with pytest.raises(ValueError, match="resized by 'pil', which published is for, got nights"):
        _trainer(callbacks=[attack]).test(FineTuning(OrthogonalProjection(SIZE, 8)), data, verbose=False)


@pytest.mark.parametrize("framing", ["pad", "tiles"])
def test_a_table_is_framed_as_the_metric_expects(
    framing: str, tmp_path: Path, seen: list[Triplet], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of images of any shape: an evaluation follows the file of a metric, and says so."""
    names = [f"{name}.png" for name in ("reference", "left", "right")]
    for number, name in enumerate(names):
        colours = torch.randint(0, 256, (10 + number, 24, 3), dtype=torch.uint8)
        Image.fromarray(colours.numpy()).save(tmp_path / name)
    Path("study.csv").write_text(f"reference,left,right,right_vote\n{','.join(names)},1\n")
    metric = PerceptualMetric(OrthogonalProjection(SIZE, 8), SIZE, framing="stretch" if framing == "tiles" else framing)
    metric = TiledMetric(metric, 2) if framing == "tiles" else metric
    file, side = str(save(metric.eval(), "framed.safetensors")), metric.image_size
    given = ["--data=lipsim.datamodules.TableData", "--data.file=study.csv", "--data.test_fraction=1"]
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
    certify = ["--trainer.callbacks=lipsim.callbacks.CertifyRadii", f"--data.image_size={side}"]
    evaluate([*given, *options, *certify, "--trainer.default_root_dir=out", f"--checkpoint={file}"])
    expected = torch.stack([metric.preprocess(tmp_path / name) for name in names])
    assert torch.equal(torch.cat(seen[0].images()), expected)
    results = json.loads(Path("out", "results.json").read_text())
    assert results["certified"]["resize"] == ("float, pad" if framing == "pad" else "float, tiles 2 × 2")
    if framing == "pad":
        other = TableData(Path("study.csv"), SIZE, framing="center-crop", num_workers=0, test_fraction=1.0)
        with pytest.raises(ValueError, match=r"data\.framing=pad, or load the metric with framing='center-crop'"):
            _trainer().test(FineTuning(init_from=Path(file)), other, verbose=False)
    else:
        with pytest.raises(ValueError, match="a metric of tiles, and stages train on whole images"):
            FineTuning(init_from=Path(file))


@pytest.mark.parametrize("data", ["builtin", "table"])
def test_another_size_is_refused_before_anything_is_read(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of files that are resized and of images that are drawn; the table that is named does not exist."""
    file = str(save(PerceptualMetric(OrthogonalProjection(SIZE, 8), SIZE).eval(), "metric.safetensors"))
    table = ["--data=lipsim.datamodules.TableData", "--data.file=missing.csv"]
    given = table if data == "table" else ["--data=lipsim.datamodules.BuiltinData"]
    options = ["--trainer.accelerator=cpu", "--trainer.callbacks=lipsim.callbacks.CertifyRadii"]
    with pytest.raises(ValueError, match=f"got data of {SIZE + 8} × {SIZE + 8}; pass --data.image_size={SIZE}$"):
        evaluate([*given, *options, f"--data.image_size={SIZE + 8}", f"--checkpoint={file}"])
    assert "rendering" not in "".join(capsys.readouterr())


class OwnSet(torch.utils.data.Dataset[Triplet]):
    """A set of somebody's own, which says how it resizes and names a part, and has no manifest."""

    def __init__(self, triplets: NightsTriplets) -> None:
        self.triplets, self.preprocess = triplets, triplets.preprocess
        self.groups = {"first": torch.arange(len(triplets)) == 0}

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> Triplet:
        return self.triplets[index]


def test_what_a_set_says_counts_without_the_rest_of_the_contract(nights: Path) -> None:
    own = OwnSet(NightsTriplets(nights, "test", Preprocess(SIZE, "pil")))
    assert resizes_of(Subset(own, [0])) == {"pil"} and list(groups_of(own)) == ["first"]
    loader = DataLoader(own, 2, collate_fn=collate_triplets)
    with pytest.raises(ValueError, match="got set0 with images resized by 'pil'"):
        _trainer().test(FineTuning(OrthogonalProjection(SIZE, 8)), loader, verbose=False)
