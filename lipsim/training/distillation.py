"""Distillation of a teacher's embedding into a 1-Lipschitz student (Ghazanfari et al. 2024, §4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lipsim.data import SharedTriplet, Triplet
from lipsim.data.augment import ColorJitter
from lipsim.data.check import images_of
from lipsim.data.contracts import facts_of
from lipsim.data.embeddings.axes import principal_axes as fit_axes
from lipsim.data.embeddings.cache import EmbeddingCache, ServesEmbeddings
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.data.loading import num_samples, tells_positions
from lipsim.data.order import IMAGES
from lipsim.data.skipping import NothingRead
from lipsim.evaluation.batches import Evaluation
from lipsim.evaluation.module import evaluation_loaders
from lipsim.metric import PerceptualMetric, load
from lipsim.training.acceleration import Acceleration
from lipsim.training.base import OptimizerFactory, Stage
from lipsim.training.global_batch import RateScaling, gathered, shared
from lipsim.training.losses import DistillationLoss, ScaleFree, pairwise_distances
from lipsim.training.schedules import Schedule, WarmupCosine
from lipsim.training.start import student_metric
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import subkeys


class Distillation(Stage):
    """Teach a student the teacher's embedding of the clean image, from the clean and from a colour-jittered view.

    Learns from any images: batches of triplets (all their images), of an image folder, or plain tensors. Besides the
    2AFC scores, validation logs the mean cosine similarity of both embeddings and the correlation of all distances
    within a batch.

    The teacher's embeddings may come from a cache (``lipsim cache-teacher``) of the images of a folder: the teacher
    is not run then, and triplets are scored but not compared with it.

    Args:
        teacher: exported metric whose encoder is the teacher; with a cache only to check that it is the one.
        student: 1-Lipschitz encoder with as many features as the teacher.
        init_from: exported metric to start from instead.
        anchor: constant coordinate of the student's metric; None: that of ``init_from``, 1 of a student.
        loss: scale-free (default), or the paper's :class:`lipsim.training.RMSE`.
        jitter: whether the student also sees the jittered view.
        optimizer: default Adam with the paper's β and no weight decay.
        schedule: default the paper's warm-up and cosine.
        acceleration: how training runs the encoder; see :class:`lipsim.training.Acceleration`.
        rate_scaling: of the learning rate by the global batch; default none.
        cache: folder of the teacher's embeddings of the images of the data module.
        principal_axes: how many features of the teacher the student follows, its projection onto as many of the
            principal axes of the cache (:func:`lipsim.data.embeddings.axes.principal_axes`); None: all as they are.

    Raises:
        FileNotFoundError: no such teacher, metric or cache.
        ValueError: neither a teacher nor a cache, a cache of another teacher, principal axes without a cache, or a
            teacher, without one, of images of another size.
    """

    axes: Tensor | None

    def __init__(
        self,
        teacher: Path | None = None,
        student: nn.Module | None = None,
        init_from: Path | None = None,
        anchor: float | None = None,
        loss: DistillationLoss | None = None,
        jitter: bool = True,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.5, 0.9)),
        schedule: Schedule | None = None,
        acceleration: Acceleration | None = None,
        rate_scaling: RateScaling | None = None,
        cache: Path | None = None,
        principal_axes: int | None = None,
    ) -> None:
        super().__init__(
            student_metric(student, init_from, anchor),
            optimizer,
            schedule or WarmupCosine(),
            acceleration,
            rate_scaling,
        )
        if teacher is None and cache is None:
            raise LipsimError(
                "expected a teacher, a cache of its embeddings, or both; name model.teacher or model.cache"
            )
        loaded = None if teacher is None else load(teacher)
        self.cache = None if cache is None else EmbeddingCache(cache)
        self.teacher_anchor = 0.0 if self.cache is None else self.cache.description.anchor
        if loaded is not None:
            self.teacher_anchor = loaded.anchor
        if self.cache is not None and loaded is not None and teacher is not None:
            self.cache.check_teacher(loaded.encoder, teacher)
            loaded = None  # the cache has its embeddings
        if principal_axes is not None and self.cache is None:
            raise LipsimError(
                "principal axes are those of a cache of the teacher's embeddings; name model.cache as well"
            )
        if loaded is not None and loaded.image_size != self.metric.image_size:
            raise LipsimError(
                f"the teacher takes images of {loaded.image_size} pixels and the student of {self.metric.image_size}; "
                "give the student the teacher's image_size, or follow a cache of its embeddings (lipsim "
                "cache-teacher), which may be of images of another size"
            )
        # A buffer: a resumed training follows the same target.
        fitted = None if self.cache is None or principal_axes is None else fit_axes(self.cache, principal_axes)
        self.register_buffer("axes", fitted)
        # In a tuple, so that neither checkpoints nor the optimizer see the teacher's weights.
        self._teacher = () if loaded is None else (loaded,)
        self.loss = loss or ScaleFree()
        self.view = ColorJitter() if jitter else None

    @property
    def teacher(self) -> PerceptualMetric | None:
        """The frozen teacher's metric, on the device of the student; None where a cache stands for it."""
        return self._teacher[0].to(self.device) if self._teacher else None

    def setup(self, stage: str) -> None:
        """Have the data module serve the embeddings of the cache, or none.

        Raises:
            ValueError: it cannot, or the cache does not match it.
        """
        super().setup(stage)
        data, teacher = self.trainer.datamodule, self.teacher  # type: ignore[attr-defined]
        # Images of a folder are cropped, in the same way for any teacher.
        preprocess = None if isinstance(data, ServesEmbeddings) else facts_of(data, "val").preprocess
        if preprocess is not None and teacher is not None and teacher.preprocess.way != preprocess.way:
            rank_zero_info(
                f"the teacher expects images resized by {teacher.preprocess.way!r}, student and teacher see them "
                f"resized by {preprocess.way!r}; pass --data.resize={teacher.preprocess.resize} to have both so"
            )
        if stage not in ("fit", "validate"):
            return
        if isinstance(data, ServesEmbeddings):
            data.use_embeddings(self.cache)
        elif self.cache is not None:
            raise LipsimError(
                f"{type(data).__name__} has no files that a cache could be of; choose ImageFolderData, or name a "
                "teacher without model.cache"
            )

    def target(self, batch: Any) -> Tensor | None:
        """The teacher's embedding of the images of a batch, ``(M, D)``; None where nobody knows it.

        Where there are principal axes, its coordinates along them.
        """
        if isinstance(batch, EmbeddedImages):
            return batch.embedding if self.axes is None else self._along_axes(batch.embedding)
        with torch.no_grad():
            return None if self.teacher is None else self.teacher.embed(images_of(batch))

    def _along_axes(self, embedding: Tensor) -> Tensor:
        # As data are, also under autocast: in half precision near-duplicates have hardly any distances.
        assert self.axes is not None
        with full_precision():
            return embedding @ self.axes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Mean loss over the clean and the jittered view."""
        if isinstance(batch, NothingRead):
            return self.nothing_learned()
        images, target = images_of(batch), self.target(batch)
        assert target is not None
        views = [images] if self.view is None else [images, self.view(images, self._image_keys(batch, len(images)))]
        own = self.embed(torch.cat(views))
        # Either may be what is not finite.
        self._own_loss = own.detach().sum() + target.detach().float().sum()
        *features, target = gathered(*own.chunk(len(views)), target)
        loss = shared(torch.stack([self._compared(z, target) for z in features]).mean())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def _compared(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss of features ``(N, D)``; one of a user's own is told of an anchor where the teacher has one."""
        options = {"teacher_anchor": self.teacher_anchor} if self.teacher_anchor else {}
        return self.loss(features, target, self.metric.anchor, **options)

    def _image_keys(self, batch: Any, count: int) -> Tensor:
        """Keys of what is drawn for the images of a batch: an image of a triplet has its own."""
        if isinstance(batch, SharedTriplet):
            return self.row_keys(count)
        if isinstance(batch, Triplet):
            keys = self.sample_keys(len(batch))
            return torch.cat([subkeys(subkeys(keys, IMAGES), part) for part in range(3)])
        return self.sample_keys(count)

    def loss_of_no_rows(self, features: Tensor) -> Tensor:
        """As of :class:`Stage`: the loss over the images of the other processes."""
        if self.cache is None:
            given = self.target(self.blank_image())
            assert given is not None
            target = given[:0]
        else:
            # In the precision of data, whatever that of the features: the processes exchange both.
            none = self.blank_image().new_zeros(0, self.cache.description.features)
            target = none if self.axes is None else self._along_axes(none)
        views = 1 if self.view is None else 2
        *every, target = gathered(*[features] * views, target)
        if not len(target):
            return features.sum()
        return shared(torch.stack([self._compared(z, target) for z in every]).mean())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Compare student and teacher; score the student where the batch has triplets."""
        images = images_of(batch)
        with full_precision():
            student, target = self.embed_checked(images), self.target(batch)
        name = f"val/{self.set_name(dataloader_idx)}"
        values: dict[str, tuple[Tensor, int]] = {}
        if target is not None and len(images) > 2:  # the last images of a folder may make one pair, or none
            correlation = distance_correlation(student, target, self.metric.anchor, self.teacher_anchor)
            values["distance_correlation"] = correlation, len(images)
        if target is not None and student.shape == target.shape:
            new = self._unrepeated(batch, len(images), batch_idx, dataloader_idx).to(student)
            cosines = F.cosine_similarity(student, target) * new
            values["cosine_similarity"] = cosines.sum() / new.sum().clamp(min=1), int(new.sum())
        for key, (value, number) in values.items():
            self.log(f"{name}/{key}", value, sync_dist=True, batch_size=number, add_dataloader_idx=False)
        if not isinstance(batch, Triplet):
            return None
        return self._evaluate(batch, batch.arrange(student), batch_idx, dataloader_idx)

    def _unrepeated(self, batch: Any, num_images: int, batch_idx: int, dataloader_idx: int) -> Tensor:
        """Which images of a batch are not there to fill it, ``(num_images,)`` of 0 and 1."""
        loader, rank = evaluation_loaders(self.trainer)[dataloader_idx], self.global_rank
        if not isinstance(batch, Triplet):
            return unrepeated(num_images, batch_idx, loader, rank, self.trainer.world_size)
        new = unrepeated(len(batch), batch_idx, loader, rank, self.trainer.world_size) > 0
        places = torch.stack(batch.arrange(torch.arange(num_images)))
        return torch.zeros(num_images).index_fill(0, places[:, new].flatten(), 1.0)


def unrepeated(count: int, batch_idx: int, loader: DataLoader[Any], rank: int, world_size: int) -> Tensor:
    """Which of a batch a distributed sampler has not put there to fill the last one, ``(count,)`` of 0 and 1.

    Such a sampler gives process ``rank`` every ``world_size``-th place of an order that begins again at its end.

    Raises:
        ValueError: on several processes, a loader that does not tell what it serves.
    """
    if world_size == 1:
        return torch.ones(count)
    if not tells_positions(loader):
        raise LipsimError(
            "nobody knows which images the validation sampler repeats on several processes; serve them in order "
            "(shuffle=False, no sampler), or validate on one process"
        )
    assert loader.batch_size is not None
    place = (batch_idx * loader.batch_size + torch.arange(count)) * world_size + rank
    own: Tensor = place < num_samples(loader)
    return own.float()


def distance_correlation(student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
    """Pearson correlation of both metrics' pairwise distances within a batch; other batches give other values."""
    pair = torch.stack([pairwise_distances(student, anchor), pairwise_distances(teacher, teacher_anchor)])
    return torch.corrcoef(pair)[0, 1]
