"""Data modules that serve eight bits train and score to the last digit as those that serve floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import lipsim
from lipsim.data import FolderImages, ImagePack, Triplet, pack_images
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.loading import data_fingerprint
from lipsim.datamodules import BappsData, ImageFolderData, NightsData, PhotoData, TableData, TripletData
from lipsim.metric import PerceptualMetric, save
from lipsim.students import OrthogonalShiftNetwork
from lipsim.training import Distillation

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}


def _student() -> OrthogonalShiftNetwork:
    torch.manual_seed(0)
    return OrthogonalShiftNetwork(16, 12, grid=4, widths=(16,), depths=(1,))


@pytest.mark.parametrize("kind", [NightsData, BappsData, TableData])
def test_a_batch_of_triplets_has_a_quarter_of_the_bytes(kind: Callable[..., TripletData], request: Any) -> None:
    root = request.getfixturevalue(kind.__name__.removesuffix("Data").lower())
    folder = root.parent if kind is TableData else root
    pack_images(folder, folder.parent / "pack", 16, num_workers=0)
    modules = []
    for eight_bit in (False, True):
        data = kind(root, image_size=16, num_workers=0, batch_size=4, pack=folder.parent / "pack", eight_bit=eight_bit)
        data.setup("test")
        modules.append(data)
    for plain, small in zip(*(module.test_dataloader() for module in modules), strict=True):
        assert data_fingerprint(plain) == data_fingerprint(small)
        for batch, stored in zip(plain, small, strict=True):
            assert isinstance(batch, Triplet) and isinstance(stored, Triplet)
            floats = modules[1].on_after_batch_transfer(stored, 0)
            for images, bits, back in zip(batch.images(), stored.images(), floats.images(), strict=True):
                assert bits.dtype == torch.uint8 and 4 * bits.nbytes == images.nbytes and torch.equal(back, images)


def test_scores_and_radii_are_the_same(nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pack_images(nights, Path("pack"), 16, num_workers=0)
    metric = PerceptualMetric(_student(), 16)
    found = []
    for eight_bit in (False, True):
        data = NightsData(nights, 16, num_workers=0, batch_size=4, pack=Path("pack"), eight_bit=eight_bit)
        found.append(lipsim.evaluate(metric, data, eps=[0.01], directory=f"run{eight_bit}", **QUIET))
    assert found[0]["certified"] == found[1]["certified"]
    assert Path("runTrue/radii.csv").read_bytes() == Path("runFalse/radii.csv").read_bytes()


def _photographs(root: Path) -> ImageFolderData:
    """A folder in which one image has more than eight bits."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(root / part / f"{i}.png")
    Image.fromarray(rng.integers(0, 65536, (18, 20), dtype=np.uint16)).save(root / "train" / "8.png")
    return ImageFolderData(root, image_size=16, batch_size=3, num_workers=0)


def test_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = _photographs(tmp_path / "images").root
    save(PerceptualMetric(_student(), 16), "teacher.safetensors")
    kinds, weights = [], []
    for eight_bit in (False, True):
        data = ImageFolderData(root, image_size=16, batch_size=3, num_workers=0, eight_bit=eight_bit)
        stage = Distillation(Path("teacher.safetensors"), _student())
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False)
        trainer.fit(stage, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in stage.parameters()]))
        kinds.append({batch.dtype for batch in data.train_dataloader()})
    assert kinds == [{torch.float32}, {torch.float32, torch.uint8}]
    assert torch.equal(*weights)


def test_training_batches_are_transformed_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = _photographs(tmp_path / "images").root
    seen: list[list[Tensor]] = []
    plain = FolderImages(root / "val", 16)

    class Sees(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen[-1].append(batch.clone())
            return self.layer(batch.mean().view(1)).sum()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert torch.equal(batch, torch.stack([plain[3 * batch_idx + i] for i in range(len(batch))]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for eight_bit in (False, True):
        seen.append([])
        transforms = [v2.RandomResizedCrop(16, scale=(0.3, 0.9))]
        data = ImageFolderData(
            root, image_size=16, batch_size=3, num_workers=0, eight_bit=eight_bit, device_transforms=transforms
        )
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, enable_model_summary=False)
        trainer.fit(Sees(), data)
    assert len(seen[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    files = FolderImages(root / "train", 16)
    assert not any(torch.equal(image, files[i]) for image in torch.cat(seen[0]) for i in range(len(files)))


def test_what_cannot_be_together(photo_cache: Path, photos: Path) -> None:
    data = ImageFolderData(photos, image_size=22, num_workers=0, device_transforms=[v2.RandomHorizontalFlip()])
    with pytest.raises(ValueError, match=r"leave one of model\.cache and data\.device_transforms out"):
        data.use_embeddings(EmbeddingCache(photo_cache))
    with pytest.raises(ValueError, match=r"leave eight_bit out of data\.human"):
        PhotoData(photos, image_size=16, human=NightsData(image_size=16, eight_bit=True))
    for ignored in ({"on_error": "skip"}, {"device_transforms": [v2.RandomHorizontalFlip()]}):
        with pytest.raises(ValueError, match=r"leave device_transforms and on_error out of data\.human"):
            PhotoData(photos, image_size=16, human=NightsData(image_size=16, **ignored))


def test_a_pack_serves_its_bytes(photos: Path, tmp_path: Path) -> None:
    pack_images(photos, tmp_path / "pack", 16, frame="crop", num_workers=0)
    pack = ImagePack(tmp_path / "pack")
    data = ImageFolderData(tmp_path / "pack", image_size=16, num_workers=0, views=("plain",), eight_bit=True)
    data.setup("fit")
    assert data.train_images is not None
    image = data.train_images[0]
    assert isinstance(image, Tensor) and image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), pack.pixels(pack.row("train/class0/0.png")))
