"""Evaluation of a stage counts every triplet once, whatever loaders the user gives."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset

from lipsim.callbacks import CertifyRadii
from lipsim.data import BuiltinTriplets, Triplet, collate_triplets
from lipsim.evaluation.scores import agrees
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning


@pytest.fixture(scope="module")
def sets() -> tuple[BuiltinTriplets, BuiltinTriplets]:
    torch.set_num_threads(1)
    return BuiltinTriplets("val", 7, image_size=16), BuiltinTriplets("val", 6, image_size=16, seed=5)


def _trainer(root: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=root, accelerator="cpu", devices=1, **{**quiet, **options})


def _loader(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 4, "collate_fn": collate_triplets, **options})


def _validate(root: Path, loaders: Any, **options: Any) -> tuple[dict[str, int], dict[str, float], FineTuning]:
    """Triplets that were certified by set, what was logged, and the stage."""
    torch.manual_seed(0)
    stage, radii = FineTuning(OrthogonalProjection(16, 8)), CertifyRadii(error_sample=4)
    trainer = _trainer(root, callbacks=[radii], **options)
    trainer.validate(stage, loaders, verbose=False)
    counts = {name: scores["num_triplets"] for name, scores in radii.results["sets"].items()}
    return counts, {key: float(value) for key, value in trainer.callback_metrics.items()}, stage


def test_concatenated_sets_are_scored_whole(sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path) -> None:
    whole = ConcatDataset(list(sets))
    counts, logged, stage = _validate(tmp_path, _loader(whole))
    assert counts == {"set0": 13}
    batch: Triplet = collate_triplets([whole[i] for i in range(13)])
    with torch.no_grad():
        agree = agrees(stage.metric.margin(*batch.embed(stage.metric.embed)), batch.right_vote)
    assert logged["val/set0/majority_score"] == pytest.approx(float(agree.sum() / (batch.right_vote != 0.5).sum()))
    counts, _, _ = _validate(tmp_path, {"a": _loader(Subset(whole, [12, 3, 9])), "b": _loader(sets[0])})
    assert counts == {"a": 3, "b": 7}
    assert _validate(tmp_path, _loader(whole), limit_val_batches=2)[0] == {"set0": 8}


def test_loaders_that_do_not_tell_their_order(sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path) -> None:
    for options in ({"sampler": [5, 1, 2]}, {"batch_sampler": [[5], [1, 2]], "batch_size": 1}):
        assert _validate(tmp_path, _loader(sets[0], **options))[0] == {"set0": 3}
    with pytest.raises(
        ValueError, match=r"only \d+ of 13 triplets of set0 have an index of their own; serve the set in"
    ):
        _validate(tmp_path, _loader(ConcatDataset(list(sets)), sampler=list(range(13))))


def test_positions_on_several_processes(
    sets: tuple[BuiltinTriplets, BuiltinTriplets], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 of 2: what the sampler repeats at its end has the position of what it repeats; others are refused."""
    shared = _loader(sets[0], sampler=DistributedSampler(sets[0], 2, 1, shuffle=False))
    trainer = SimpleNamespace(world_size=2, testing=True, datamodule=None, test_dataloaders=shared)
    monkeypatch.setattr(FineTuning, "trainer", property(lambda _: trainer))
    stage, (batch,) = FineTuning(OrthogonalProjection(16, 8)), shared
    assert stage.positions(batch, 0).tolist() == [1, 3, 5, 0]
    trainer.test_dataloaders = _loader(sets[0], sampler=[1, 3])
    with pytest.raises(
        ValueError, match="nobody knows which triplets the sampler of set0 repeats on several processes"
    ):
        stage.positions(next(iter(trainer.test_dataloaders)), 0)


def test_triplets_that_a_collate_fn_drops_are_missed(
    sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path
) -> None:
    loader = _loader(sets[0], collate_fn=lambda batch: collate_triplets(batch[:3]))
    stage = FineTuning(OrthogonalProjection(16, 8))
    with pytest.raises(ValueError, match="expected 4 triplets in batch 0 of set0, its collate_fn returned 3"):
        _trainer(tmp_path).validate(stage, loader, verbose=False)


def test_parts_need_positions(sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path) -> None:
    class Parts(L.LightningDataModule):
        val_names = ("a",)

        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.val_groups = {"a": {"first": torch.arange(13) < 2}}
            self.options = options

        def val_dataloader(self) -> DataLoader[Any]:
            return _loader(ConcatDataset(list(sets)), **self.options)

    counts, logged, _ = _validate(tmp_path, Parts())
    assert counts == {"a": 13, "a_first": 2} and math.isfinite(logged["val/a_first/vote_score"])
    with pytest.raises(ValueError, match="a_first needs to know the positions of its triplets; serve a in order"):
        _validate(tmp_path, Parts(sampler=[0, 1]))


def test_validation_after_training_is_of_its_own_loaders(
    sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path
) -> None:
    stage, radii = FineTuning(OrthogonalProjection(16, 8)), CertifyRadii(error_sample=4)
    trainer = _trainer(tmp_path, callbacks=[radii], max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=1)
    trainer.fit(stage, _loader(sets[0]), _loader(sets[0]))
    assert radii.results["sets"]["set0"]["num_triplets"] == 7
    trainer.validate(stage, _loader(Subset(sets[1], [5, 4])), verbose=False)
    assert radii.results["sets"]["set0"]["num_triplets"] == 2


def test_weights_in_float64_are_refused_in_one_line(
    sets: tuple[BuiltinTriplets, BuiltinTriplets], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="leave it at 32-true"):
        _validate(tmp_path, _loader(sets[0]), precision="64-true")
