"""Callbacks in validation look at the weights that are scored, also where others stand in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from safetensors.torch import load_file
from torch import Tensor, nn

import lipsim
from lipsim.callbacks import AttackRobustness, CertifyRadii, SaveOnException
from lipsim.datamodules import BuiltinData
from lipsim.students import OrthogonalProjection


class Scaled(nn.Module):
    """One weight times the pixels, which is its Lipschitz constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.image_size, self.out_features = 16, 3 * 16**2

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.flatten(1) - 0.5)

    def lipschitz_bound(self) -> float:
        return abs(float(self.weight))


class Attacked(AttackRobustness):
    """Keeps the weight that is scored with each batch, beside the one that is attacked."""

    def __init__(self) -> None:
        super().__init__(eps=[0.1, 0.5], steps=2, queries=4, validate=True)
        self.seen: list[tuple[float, float]] = []

    def see(self, trainer: L.Trainer, module: Any, *rest: Any) -> dict[str, Tensor]:
        self.seen.append((float(module.metric.encoder.weight), float(self.attacked["metric"].encoder.weight)))
        return super().see(trainer, module, *rest)


class Growing(Callback):
    """Training that is known: the weight grows by 1 in each step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.metric.encoder.weight.add_(1)


def _stage() -> lipsim.training.FineTuning:
    return lipsim.training.FineTuning(Scaled(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))


def _trainer(folder: Path, callbacks: list[Callback]) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )


def _data() -> BuiltinData:
    return BuiltinData(num_train=8, num_val=6, num_test=2, image_size=16, batch_size=4)


class Failing(Callback):
    """In the second validation: before its first batch, in it, or when it has ended."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self._fail)

    def _fail(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"]
)
def test_what_is_saved_of_a_validation_that_fails_are_both_in_their_places(hook: str, tmp_path: Path) -> None:
    callbacks = [EMAWeightAveraging(decay=0.5), Growing(), Failing(hook), SaveOnException()]
    with pytest.raises(OSError, match="the disk is gone"):
        _trainer(tmp_path, callbacks).fit(_stage(), _data())
    saved = torch.load(tmp_path / "checkpoints" / "on_exception.ckpt", weights_only=True)
    # Training has it grow from 1 by 1 in each of four steps; the average is over what came before each of the last.
    assert saved["current_model_state"]["metric.encoder.weight"] == 5
    assert saved["state_dict"]["metric.encoder.weight"] not in range(6)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_certified_and_attacked_as_they_are_scored(first: bool, tmp_path: Path) -> None:
    averaging, certify, attack = EMAWeightAveraging(decay=0.5), CertifyRadii(eps=[0.1, 0.5], error_sample=4), Attacked()
    own: list[Callback] = [Growing(), certify, attack]
    trainer = _trainer(tmp_path, [averaging, *own] if first else [*own, averaging])
    trainer.fit(_stage(), _data())
    scored = sorted({of_scores for of_scores, _ in attack.seen})
    assert len(scored) == 2 and all(weight not in range(6) for weight in scored)  # averages, one an epoch
    assert all(of_scores == of_attacks for of_scores, of_attacks in attack.seen)
    assert certify.report is not None and certify.results is not None
    assert certify.report.total == pytest.approx(scored[-1]) == certify.results["lipschitz"]
    for eps in ("0.1", "0.5"):  # no certificate is broken
        scores = trainer.callback_metrics
        assert scores[f"val/builtin/certified_{eps}"] <= scores[f"val/builtin/attacked_{eps}"]


def test_a_training_that_had_ended_exports_the_mean_again(tmp_path: Path) -> None:
    """Lightning resumes with the last weights, and never comes to put the mean in their place."""

    def train(checkpoint: str | None = None) -> lipsim.PerceptualMetric:
        return lipsim.train(
            lipsim.training.FineTuning(OrthogonalProjection(16, 4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
            _data(),
            callbacks=[EMAWeightAveraging(decay=0.5)],
            directory=tmp_path,
            checkpoint=checkpoint,
            seed=0,
            max_epochs=2,
            accelerator="cpu",
            enable_progress_bar=False,
        )

    metric, file = train(), tmp_path / "metric.safetensors"
    mean = load_file(file)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
    again = train("last")
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, mean[name]), name
        torch.testing.assert_close(again.encoder.state_dict()[name], metric.encoder.state_dict()[name])
    assert any(not torch.equal(mean[name], last[f"metric.encoder.{name}"]) for name in mean)
