"""The three stages on tiny problems, their losses and schedules, resuming, and bad input."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim import PerceptualMetric, certificates
from lipsim.callbacks import AttackRobustness, CertifyRadii, NullSpaceRobustness, SaveOnException, TripletGallery
from lipsim.callbacks.sample_table import SampleTable
from lipsim.data import SharedTriplet, Triplet
from lipsim.data.augment import augmented, reflect
from lipsim.data.check import check_images
from lipsim.datamodules import NightsData
from lipsim.metric import save
from lipsim.metric.folded import folded_copy
from lipsim.results import read_results
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork
from lipsim.teachers import SmallViT
from lipsim.training import (
    RMSE,
    Distillation,
    FineTuning,
    JointRadiusHinge,
    MarginHinge,
    RadiusHinge,
    Relational,
    ScaleFree,
    TeacherTuning,
    Triangular,
    WarmupCosine,
)
from lipsim.utils.sampling import subkeys


class ToyData(L.LightningDataModule):
    """Triplets whose nearer candidate is the one of the reference's brightness."""

    test_names = val_names = ("toy",)

    def __init__(self, num: int = 64, image_size: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        level = torch.rand(num, generator=generator)
        right = torch.rand(num, generator=generator) < 0.5

        def images(shift: Tensor) -> Tensor:
            noise = 0.1 * torch.randn(num, 3, image_size, image_size, generator=generator)
            return (0.3 + 0.4 * (level + shift).view(-1, 1, 1, 1) + noise).clamp(0, 1)

        shift = 0.5 * torch.where(torch.rand(num, generator=generator) < 0.5, 1.0, -1.0)
        self.batch = Triplet(
            images(torch.zeros(num)),
            images(torch.where(right, shift, torch.zeros(num))),
            images(torch.where(right, torch.zeros(num), shift)),
            right.float(),
            torch.arange(num),
        )

    def _loader(self, shuffle: bool) -> DataLoader[Triplet]:
        def collate(rows: list[int]) -> Triplet:
            return self.batch.select(torch.tensor(rows))

        return DataLoader(range(len(self.batch)), batch_size=16, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Triplet]:
        return self._loader(True)

    def val_dataloader(self) -> DataLoader[Triplet]:
        return self._loader(False)

    test_dataloader = val_dataloader


def _trainer(root: Path, **options: object) -> L.Trainer:
    options = {"max_epochs": 12, "logger": False, "enable_checkpointing": False, "callbacks": []} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=root, accelerator="cpu", devices=1, **quiet, **options)


def _adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def _student() -> OrthogonalShiftNetwork:
    return OrthogonalShiftNetwork(16, 12, grid=4, widths=(32,), depths=(1,), linear_depth=1, linear_width=12)


def _vit() -> SmallViT:
    return SmallViT(16, patch_size=8, width=12, depth=1, heads=2)


def test_three_stages_in_turn(tmp_path: Path) -> None:
    data = ToyData()
    teacher = TeacherTuning(_vit(), augment=False, optimizer=_adam, loss=MarginHinge(0.2))
    trainer = _trainer(tmp_path, max_epochs=25)
    trainer.fit(teacher, data)
    assert trainer.callback_metrics["val/toy/majority_score"] > 0.9
    file = save(teacher.metric, tmp_path / "teacher.safetensors")

    untrained = Distillation(file, _student())
    assert untrained.teacher.encoder(data.batch.left).shape == (64, 12)
    trainer.validate(untrained, data, verbose=False)
    before = dict(trainer.callback_metrics)
    distillation = Distillation(file, _student(), optimizer=_adam, schedule=WarmupCosine(5))
    trainer = _trainer(tmp_path, max_epochs=25)
    trainer.fit(distillation, data)
    after = trainer.callback_metrics
    assert after["val/toy/cosine_similarity"] > before["val/toy/cosine_similarity"] + 0.2
    assert after["val/toy/distance_correlation"] > before["val/toy/distance_correlation"]
    assert not any("teacher" in name for name in distillation.state_dict())
    file = save(distillation.metric, tmp_path / "distilled.safetensors")

    tuning = FineTuning(init_from=file, optimizer=_adam, loss=RadiusHinge(2.0))
    assert tuning.metric.encoder.training and all(p.requires_grad for p in tuning.parameters())
    callbacks = [
        CertifyRadii(),
        AttackRobustness(steps=5, queries=5, others={"teacher": tmp_path / "teacher.safetensors"}),
        NullSpaceRobustness(max_triplets=8, others={"teacher": tmp_path / "teacher.safetensors"}),
        TripletGallery(1),
    ]
    trainer = _trainer(tmp_path, callbacks=callbacks)
    trainer.fit(tuning, data)
    assert trainer.callback_metrics["val/toy/certified_1"] > 0.8
    trainer.test(tuning, data, verbose=False)
    _check_test_files(tmp_path, tuning, data)


def test_folded_weights_are_not_trained(tmp_path: Path) -> None:
    """Nothing would keep them 1-Lipschitz; losses take the bound for 1 all along."""
    metric = PerceptualMetric(_student(), 16)
    file = save(folded_copy(metric), tmp_path / "folded.safetensors")
    for stage in (FineTuning, partial(Distillation, file)):
        with pytest.raises(ValueError, match=r"weights of .*folded\.safetensors are folded.*that was folded"):
            stage(init_from=file)
    assert FineTuning(init_from=save(metric, tmp_path / "own.safetensors")).metric.lipschitz < 1 + 1e-5


def test_the_anchor_goes_with_the_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a file, and in an evaluation of a checkpoint; in training the configuration wins, and says so."""
    file = save(PerceptualMetric(_student(), 16, anchor=4.0), tmp_path / "m.safetensors")
    teacher = save(PerceptualMetric(_vit(), 16, anchor=0.0, lipschitz=math.inf), tmp_path / "teacher.safetensors")
    tuning = FineTuning(init_from=file, optimizer=_adam)
    assert tuning.metric.anchor == Distillation(teacher, init_from=file).metric.anchor == 4.0
    assert FineTuning(init_from=file, anchor=2.0).metric.anchor == 2.0
    again = Distillation(file, init_from=file, loss=Relational(), jitter=False)  # its own teacher
    images = torch.rand(8, 3, 16, 16)
    assert again._compared(again.embed(images), again.target(images)) < 1e-4
    assert FineTuning(_student()).metric.anchor == Distillation(teacher, _student()).metric.anchor == 1.0

    data = ToyData()
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(tuning, data)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    fresh = FineTuning(_student(), optimizer=_adam)
    _trainer(tmp_path).test(fresh, data, ckpt_path=tmp_path / "c.ckpt", verbose=False, weights_only=True)
    assert fresh.metric.anchor == 4.0
    resumed = FineTuning(_student(), optimizer=_adam)
    with caplog.at_level("INFO"):
        _trainer(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert resumed.metric.anchor == 1.0 and "resuming with the anchor 1; before it was 4" in caplog.text


def _check_test_files(root: Path, tuning: FineTuning, data: ToyData) -> None:
    results = read_results(root / "results.json")
    certified, attacked = results["certified"], results["attacked"]["sets"]["toy"]
    scores = certified["sets"]["toy"]
    assert 1 <= certified["lipschitz"] <= 1 + 1e-5 and 0 < certified["feature_error"] < 1e-4
    assert scores["num_triplets"] == 64 and scores["num_tied_votes"] == 0
    with open(root / "radii.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(64))
    # Again by hand, in float64.
    metric = tuning.metric.double().eval()
    z, z0, z1 = (f.double() for f in data.batch.to(torch.float64).embed(metric.embed))
    options = {"lipschitz": certified["lipschitz"], "feature_error": 2 * certified["feature_error"]}
    radius = certificates.reference_radius(z, z0, z1, lipschitz=certified["lipschitz"])
    with_slack = certificates.reference_radius(z, z0, z1, **options)
    found = torch.tensor([float(row["radius"]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, with_slack.detach(), rtol=1e-4, atol=1e-4)
    assert (found <= radius).all()
    right = data.batch.right_vote > 0.5
    agree = (metric.margin(z, z0, z1) > 0) != right
    for label, eps in (("36/255", 36 / 255), ("1", 1.0)):
        assert scores["certified"][label] == pytest.approx(float((agree & (found > eps)).double().mean()))
        assert scores["certified"][label] <= attacked["metrics"]["metric"]["attacked"][label] <= scores["majority"]
    assert scores["published"]["1"] == 0  # capped below 1
    assert attacked["violations"] == 0
    null_space = results["null_space"]["sets"]["toy"]["metrics"]
    assert null_space["teacher"]["moves"]["exact"] > 0.9
    assert null_space["metric"]["moves"]["exact"] > 0.5
    for found in null_space.values():
        for what, direction in ((w, d) for w in ("same", "answer") for d in ("random", "semantic")):
            assert 0 < found[what][direction]["mean_length"] <= found[what][direction]["largest_length"]
            assert found[what][direction]["ssim"] < 1 and found[what][direction]["lpips"] is None
    for name in ("gallery.png", "attacked-toy.png", "null-space-toy.png"):
        assert (root / "plots" / name).stat().st_size > 5000
    assert (root / "attacks.csv").is_file()


def test_radius_hinge_grows_radii_and_the_margin_hinge_is_the_papers() -> None:
    z, z0, z1 = (torch.randn(9, 5, requires_grad=True) for _ in range(3))
    votes = torch.tensor([0, 1, 0.3, 0.5, 0.9, 0.5, 0, 1, 0.2])
    lean = torch.sign(1 - 2 * votes)
    radius = certificates.signed_reference_radius(z, z0, z1)
    expected = torch.relu(2 - lean * radius)[lean != 0].mean()
    torch.testing.assert_close(RadiusHinge(2.0)(z, z0, z1, votes, 1.0), expected)
    metric = PerceptualMetric(OrthogonalProjection(16, 4), 16)
    h = metric.margin(z, z0, z1).float()
    expected = torch.relu(0.2 - lean * h)[lean != 0].mean()
    torch.testing.assert_close(MarginHinge(0.2)(z, z0, z1, votes, 1.0), expected)
    weight = (1 - 2 * votes).abs()
    expected = (weight * torch.relu(0.2 - lean * h)).sum() / weight.sum()
    torch.testing.assert_close(MarginHinge(0.2, weight_by_agreement=True)(z, z0, z1, votes, 1.0), expected)


def test_joint_hinge_and_the_ramp_of_targets() -> None:
    z, z0, z1 = (torch.randn(9, 5) for _ in range(3))
    votes = torch.tensor([0, 1, 0.3, 0.5, 0.9, 0.5, 0, 1, 0.2])
    lean = torch.sign(1 - 2 * votes)
    margin, _ = certificates.linear_margin(z, z0, z1)
    radius = torch.sign(margin) * certificates.joint_radius(z, z0, z1)
    joint = JointRadiusHinge(0.5)
    torch.testing.assert_close(joint(z, z0, z1, votes, 1.0), torch.relu(0.5 - lean * radius)[lean != 0].mean())
    ramped = RadiusHinge(2.0, ramp=0.5)
    for progress, target in ((0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (0.9, 2.0)):
        reached = ramped(z, z0, z1, votes, 1.0, progress)
        radius = lean * certificates.signed_reference_radius(z, z0, z1)
        torch.testing.assert_close(reached, torch.relu(target - radius)[lean != 0].mean())
    for arguments in ({"target": 0.0}, {"target": -1.0}, {"ramp": 1.5}):
        with pytest.raises(ValueError, match="target > 0, a ramp"):
            RadiusHinge(**arguments)


def test_stages_tell_the_loss_how_far_they_are(tmp_path: Path) -> None:
    seen = []

    class Watching(RadiusHinge):
        def __call__(self, *arguments: Any) -> Tensor:
            seen.append(arguments[-1])
            return super().__call__(*arguments)

    data = ToyData(32)
    _trainer(tmp_path, max_epochs=4).fit(FineTuning(_student(), loss=Watching()), data)
    assert seen == sorted(seen) and seen[0] == 0 and 0.5 < seen[-1] < 1


def test_scale_free_loss_ignores_the_norm_and_rmse_does_not() -> None:
    teacher = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    for scale in (1.0, 7.0):
        # The anchor bends distances for a small norm; without it the loss vanishes at every scale.
        assert ScaleFree()(scale * teacher, teacher, 0.0) < 1e-3
    assert RMSE()(teacher, teacher, 1.0) == 0
    assert RMSE()(7 * teacher, teacher, 1.0) > 1
    assert ScaleFree()(torch.randn(16, 8), teacher, 1.0) > 0.5
    with pytest.raises(ValueError, match="out_features"):
        ScaleFree()(torch.randn(16, 6), teacher, 1.0)
    assert torch.isfinite(ScaleFree(direction=0)(torch.randn(16, 6), teacher, 1.0))


def test_schedules() -> None:
    cosine = WarmupCosine(10)
    assert [cosine(s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert cosine(60, 110) == pytest.approx(0.5) and cosine(109, 110) < 1e-3
    triangle = Triangular()
    values = [triangle(s, 1000) for s in range(1000)]
    assert max(values) == pytest.approx(1, abs=0.01) and abs(values.index(max(values)) - 400) < 3
    assert triangle(800, 1000) == pytest.approx(0.05, abs=0.01) and values[-1] < 0.01 and min(values) >= 0
    with pytest.raises(ValueError, match="peak < knee"):
        Triangular(peak=0.9, knee=0.5)


def _symmetry(number: int) -> torch.Tensor:
    return torch.tensor([[bool(number & 1), bool(number & 2), bool(number & 4)]])


def test_augmentation_treats_the_three_images_alike(triplets: Triplet) -> None:
    same = Triplet(*[triplets.reference] * 3, triplets.right_vote, triplets.index)
    keys = subkeys(0, torch.arange(12))
    changed = augmented(same, keys, 0)
    assert torch.equal(changed.reference, changed.left) and torch.equal(changed.left, changed.right)
    assert not torch.equal(changed.reference, same.reference)
    torch.testing.assert_close(changed.reference.flatten(1).norm(dim=1), same.reference.flatten(1).norm(dim=1))
    shared = SharedTriplet(triplets.reference, torch.randint(12, (5, 3)), torch.rand(5), torch.arange(5))
    moved = augmented(shared, keys[:5], 1).images()[0]  # an image of several triplets moves once
    (turned,) = {t for t in range(8) if torch.equal(reflect(shared.distinct, _symmetry(t).expand(12, 3)), moved)}
    assert turned


def test_resuming_continues_and_takes_the_new_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ToyData()

    def module(lr: float) -> FineTuning:
        torch.manual_seed(0)
        return FineTuning(_student(), optimizer=lambda p: torch.optim.Adam(p, lr=lr))

    first = _trainer(tmp_path, max_epochs=2)
    first.fit(module(1e-3), data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed, changed = module(1e-3), module(5e-4)
    for stage, lr in ((resumed, 1e-3), (changed, 5e-4)):
        trainer = _trainer(tmp_path, max_epochs=3)
        with caplog.at_level("INFO"):
            trainer.fit(stage, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert trainer.global_step == 12
        optimizer = trainer.optimizers[0]
        assert optimizer.param_groups[0]["initial_lr"] == lr
        assert all(state["step"] == 12 for state in optimizer.state.values())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * Triangular()(12, 12))
    assert "resuming with initial_lr = 0.0005; the checkpoint had 0.001" in caplog.text


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "NaN or infinite"), (math.inf, "NaN or infinite"), (3.0, "divide 8-bit")]
)
def test_bad_images_are_refused_by_name(triplets: Triplet, value: float, message: str) -> None:
    check_images(triplets)
    triplets.left[7, 1, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        check_images(triplets)


def test_nan_in_a_batch_stops_training(tmp_path: Path) -> None:
    data = ToyData()
    data.batch.right[40, 0, 0, 0] = math.nan
    torch.manual_seed(1)  # the damaged triplet is not in the first batch
    module = FineTuning(_student(), optimizer=_adam)
    trainer = _trainer(tmp_path, callbacks=[SaveOnException()])
    with pytest.raises(ValueError, match="NaN or infinite"):
        trainer.fit(module, data)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    saved = torch.load(tmp_path / "checkpoints" / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step > 0
    torch.testing.assert_close(dict(saved["state_dict"]), dict(module.state_dict()))


def test_half_precision_weights_are_not_certified(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, callbacks=[CertifyRadii()], precision="bf16-true")
    with pytest.raises(ValueError, match="half precision"):
        trainer.test(FineTuning(_student()), ToyData(), verbose=False)


def test_certification_ignores_autocast(tmp_path: Path) -> None:
    module, radii = FineTuning(_student()), []
    for precision in ("32-true", "bf16-mixed"):
        trainer = _trainer(tmp_path / precision, callbacks=[CertifyRadii()], precision=precision)
        trainer.test(module, ToyData(), verbose=False)
        radii.append((tmp_path / precision / "radii.csv").read_text())
    assert radii[0] == radii[1]


def test_a_teacher_cannot_be_certified(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, callbacks=[CertifyRadii()])
    with pytest.raises(ValueError, match="no Lipschitz bound is known for SmallViT"):
        trainer.test(TeacherTuning(_vit()), ToyData(), verbose=False)


def test_repeated_samples_count_once() -> None:
    table = SampleTable()
    table.append(torch.tensor([3, 1]), {"radius": torch.tensor([0.3, 0.1])})
    table.append(torch.tensor([2, 3]), {"radius": torch.tensor([0.2, 0.3])})
    rows = table.gather()
    assert rows["index"].tolist() == [1, 2, 3]
    torch.testing.assert_close(rows["radius"], torch.tensor([0.1, 0.2, 0.3]))
    assert SampleTable().gather() == {}


def test_a_stage_needs_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either a student"):
        FineTuning()
    with pytest.raises(ValueError, match="image_size"):
        FineTuning(torch.nn.Flatten())


def test_a_metric_expects_images_as_its_training_data_were_resized(nights: Path) -> None:
    stage = FineTuning(OrthogonalProjection(16, 8))
    assert stage.metric.preprocess.resize == "float"
    trainer = L.Trainer(accelerator="cpu", logger=False, fast_dev_run=True, enable_progress_bar=False)
    trainer.fit(stage, NightsData(nights, image_size=16, resize="pil", batch_size=2, num_workers=0))
    assert stage.metric.preprocess.resize == "pil" and stage.metric.preprocess.image_size == 16
