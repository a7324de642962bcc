"""The hooks that callbacks work with: a metric scored on triplets in validation and test."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before Lightning, which imports matplotlib

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lipsim.data import Triplet
from lipsim.data.check import check_images, check_votes
from lipsim.data.contracts import DataFacts, Parts, facts_of
from lipsim.data.labelled import LabelledBatch
from lipsim.data.loading import check_count, num_samples, planned_batches, served_batches, served_resizes
from lipsim.data.transforms import Preprocess
from lipsim.evaluation.batches import EvaluatedBatch, EvaluatedImages, Evaluation, Features
from lipsim.evaluation.scores import TwoAFCScore
from lipsim.layers import freeze, unfreeze
from lipsim.metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


class EvaluationModule(L.LightningModule):
    """A metric that is scored on triplets; nothing here trains it.

    Validation and test embed each triplet in full precision and hand an :class:`EvaluatedBatch` on; the callbacks
    certify and attack from there.

    Args:
        metric: the metric.
    """

    def __init__(self, metric: PerceptualMetric) -> None:
        super().__init__()
        if torch.get_default_dtype() == torch.float64:
            metric.encoder.float()  # data are float32 whatever the default; other precisions are the trainer's
        self.metric = metric
        # No modules: their names, those of sets, may be any text.
        self.scores: dict[str, dict[str, TwoAFCScore]] = {}
        # By loader: positions seen in this evaluation, and the loader with what it serves.
        self._seen: dict[int, list[int]] = {}
        self._batches: dict[int, tuple[Any, list[list[int]] | None]] = {}
        self._begins: list[Callable[[], None]] = []

    def setup(self, stage: str) -> None:
        """In training, expect images as the data module resizes them: what a metric is trained on is what it is for.

        An evaluation refuses others, when it starts: until then a checkpoint may come, which says what it is for.

        Raises:
            ValueError: weights in float64, which the float32 images do not go with.
        """
        if self.trainer.precision == "64-true":
            raise LipsimError(
                "images are float32, and --trainer.precision=64-true would have float64 weights; leave it at 32-true "
                "(certificates are computed in float64 in any case)"
            )
        preprocess = self._facts().preprocess
        if stage == "fit" and preprocess is not None and preprocess.way != self.metric.preprocess.way:
            rank_zero_info(f"the metric expects images resized by {preprocess.way!r} from now on, as these data are")
            self.metric.preprocess = Preprocess(self.metric.image_size, preprocess.resize, preprocess.framing)

    def check_resizes(self, metric: PerceptualMetric, name: str = "the metric") -> None:
        """Refuse sets whose images are resized in another way than a metric expects.

        Raises:
            ValueError: some are; the message names the set.
        """
        preprocess = self._facts().preprocess
        for set_name, loader in zip(self.set_names(), evaluation_loaders(self.trainer), strict=True):
            given = served_resizes(loader) or (set() if preprocess is None else {preprocess.way})
            check_resize(metric, name, given, set_name)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_images(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_images(batch)

    def on_validation_start(self) -> None:
        self._start_evaluation()

    def on_validation_epoch_start(self) -> None:
        freeze(self.metric)
        begins, self._begins = self._begins, []
        for begin in begins:
            begin()

    def on_test_start(self) -> None:
        self._start_evaluation()
        freeze(self.metric)

    def before_validation(self, begin: Callable[[], None]) -> None:
        """Have something done before the first batch of the validation that starts, with the weights that it is of.

        Callbacks, in any order, may put others in their place at the start of its epoch, as Lightning's WeightAveraging
        does, and put them back at its end.
        """
        self._begins.append(begin)

    def embed_checked(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` of images that were checked with their batch."""
        return self.metric.embed(x, check_range=False)

    def embed_labelled(self, batch: LabelledBatch) -> Evaluation:
        """Images with labels, for a callback that searches; they have no score here."""
        with full_precision():
            return {"evaluated": EvaluatedImages(self.embed_checked(batch.images))}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Score a batch of triplets, ``{"evaluated": …}``, or embed images with labels; None for other batches."""
        return self._embed_and_evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Score a batch of triplets, ``{"evaluated": …}``, or embed images with labels; None for other batches."""
        return self._embed_and_evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_end(self) -> None:
        unfreeze(self.metric)

    def on_test_end(self) -> None:
        unfreeze(self.metric)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def set_name(self, dataloader_idx: int) -> str:
        """Name of the evaluation set that a data loader serves."""
        return self.set_names()[dataloader_idx]

    def set_names(self) -> list[str]:
        """Names of the evaluation sets, in the order of their loaders.

        Raises:
            ValueError: two sets, or a set and a part of another, have one name.
        """
        stage = "test" if self.trainer.testing else "val"
        return evaluation_names(self._facts(), stage, _loaders(self.trainer))

    def groups(self, name: str) -> Parts:
        """Parts of an evaluation set that are scored apart as well: name in the results → mask over the set's samples.

        The name is that of the set and that of the part, as in ``nights_imagenet``. A mask has an entry for each
        position of the loader's data set.
        """
        return {f"{name}_{group}": mask for group, mask in self._facts().groups.get(name, {}).items()}

    def positions(self, batch: Triplet, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """What tells the triplets of a batch from all others of their set, ``(N,)`` int64: positions in its data set.

        A loader whose own sampler decides what it serves does not tell; there the index stands for the position, on one
        process.

        Raises:
            ValueError: a ``collate_fn`` has dropped triplets, or nobody knows the positions and there are several
                processes, whose samplers repeat some.
        """
        batches = self._served(dataloader_idx)
        if batches is None:
            if self.trainer.world_size > 1:
                raise LipsimError(
                    f"nobody knows which triplets the sampler of {self.set_name(dataloader_idx)} repeats on several "
                    "processes; serve the set in order (shuffle=False, no sampler), or evaluate on one process"
                )
            return batch.index
        expected = batches[batch_idx]
        if len(expected) != len(batch):
            raise LipsimError(
                f"expected {len(expected)} triplets in batch {batch_idx} of {self.set_name(dataloader_idx)}, its "
                f"collate_fn returned {len(batch)}; leave unwanted triplets out of the data set "
                "(torch.utils.data.Subset)"
            )
        return torch.tensor(expected, dtype=torch.int64, device=batch.index.device)

    def expected_positions(self, dataloader_idx: int) -> frozenset[int] | None:
        """Positions that this process, or all together, must serve of a set; None where nobody knows."""
        batches = self._served(dataloader_idx)
        planned = planned_batches(evaluation_loaders(self.trainer)[dataloader_idx])
        if planned is not None:
            return planned.expected
        if batches is None:
            return None
        trainer = self.trainer
        if trainer.sanity_checking:
            limits = trainer.num_sanity_val_batches
        else:
            limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        count = min(len(batches), limits[dataloader_idx])
        return frozenset(position for batch in batches[: int(count)] for position in batch)

    def _served(self, dataloader_idx: int) -> list[list[int]] | None:
        loader = evaluation_loaders(self.trainer)[dataloader_idx]
        found, batches = self._batches.get(dataloader_idx, (None, None))
        if found is not loader:
            batches = served_batches(loader)
            self._batches[dataloader_idx] = loader, batches
        return batches

    @property
    def _data(self) -> object:
        """The data module, None where loaders were given."""
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _facts(self) -> DataFacts:
        return facts_of(self._data, "test" if self.trainer.testing else "val")

    def _start_evaluation(self) -> None:
        self.check_resizes(self.metric)
        self.scores.clear()
        self._seen, self._batches = {}, {}
        self._check_groups()

    def _check_groups(self) -> None:
        """Refuse masks that do not say of each position whether it belongs to a part.

        Raises:
            ValueError: masks of another length or type, of no set, or of a set whose loader has no positions.
        """
        names = self.set_names()
        stage = "test" if self.trainer.testing else "val"
        groups = self._facts().groups
        unknown = [name for name in groups if name not in names and groups[name]]
        if unknown:
            raise LipsimError(f"{stage}_groups names parts of {', '.join(unknown)}; the sets are {', '.join(names)}")
        for i, (name, loader) in enumerate(zip(names, evaluation_loaders(self.trainer), strict=True)):
            for part, mask in self.groups(name).items():
                if self._served(i) is None:
                    raise LipsimError(
                        f"{part} needs to know the positions of its triplets; serve {name} in order (shuffle=False, no "
                        "sampler)"
                    )
                size = num_samples(loader)
                if mask.dtype != torch.bool or mask.shape != (size,):
                    raise LipsimError(
                        f"expected a bool mask of {part} over the {size} positions of the data set that {name} is "
                        f"served from, got {tuple(mask.shape)} {mask.dtype}"
                    )

    def _embed_and_evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Evaluation | None:
        if isinstance(batch, LabelledBatch):
            return self.embed_labelled(batch)
        if not isinstance(batch, Triplet):  # a folder of images, in distillation
            return None
        with full_precision():
            features = batch.embed(self.embed_checked)
        return self._evaluate(batch, features, batch_idx, dataloader_idx)

    def _evaluate(self, batch: Triplet, features: Features, batch_idx: int, dataloader_idx: int) -> Evaluation:
        """Score a batch of triplets by its features ``(z, z0, z1)``.

        Raises:
            ValueError: votes that are NaN or outside [0, 1].
        """
        check_votes(batch)
        evaluated = EvaluatedBatch.of(self.metric, batch, features)
        margin = evaluated.margin
        name, positions = self.set_name(dataloader_idx), self.positions(batch, batch_idx, dataloader_idx)
        self._seen.setdefault(dataloader_idx, []).extend(positions.tolist())
        self._score(name, margin, batch.right_vote, positions)
        for group, mask in self.groups(name).items():
            # Also without a row: processes must not disagree on which scores there are.
            rows = mask[positions.cpu()].to(margin.device)
            self._score(group, margin[rows], batch.right_vote[rows], positions[rows])
        return {"evaluated": evaluated}

    def _score(self, name: str, margin: Tensor, right_vote: Tensor, positions: Tensor) -> None:
        if name not in self.scores:
            self.scores[name] = {kind: TwoAFCScore(kind).to(self.device) for kind in ("majority", "vote")}
        for score in self.scores[name].values():
            score.update(margin, right_vote, positions)

    def _log_scores(self, stage: str) -> None:
        for i, seen in self._seen.items():
            check_count(self.set_name(i), seen, self.expected_positions(i))
        parts = {part for name in self.scores for part in self.groups(name)}
        for name, scores in self.scores.items():
            for kind, score in scores.items():
                # torchmetrics gathers inside compute(); the mean over processes is one of equal numbers.
                self.log(
                    f"{stage}/{name}/{kind}_score",
                    score.compute().float(),
                    prog_bar=kind == "majority" and name not in parts,
                    sync_dist=True,
                )
        self.scores.clear()


def weights_are_finite(module: nn.Module) -> bool:
    """Whether no parameter and no buffer is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*module.parameters(), *module.buffers()))


def check_resize(metric: PerceptualMetric, name: str, given: Set[str], source: str) -> None:
    """Refuse images that are resized in another way than a metric expects.

    Args:
        metric: the metric.
        name: what the message calls it.
        given: how they are resized, :attr:`lipsim.data.Preprocess.way`; empty where nobody says, or nothing is.
        source: what serves them.

    Raises:
        ValueError: they are.
    """
    expected, resize = metric.preprocess.way, metric.preprocess.resize
    if given - {expected}:
        framed = all(way.startswith(resize) for way in given)
        remedy = f"pass --data.resize={resize}"
        if framed:
            own, theirs = _framing_of({expected}), _framing_of(given)
            remedy = f"pass --data.framing={own}, or load the metric with framing={theirs!r}"
        raise LipsimError(
            f"expected images resized by {expected!r}, which {name} is for, got {source} with images resized by "
            f"{' and '.join(map(repr, sorted(given)))}; {remedy}"
        )


def check_size(metric: PerceptualMetric, size: int) -> None:
    """Refuse images of another size than a metric takes, where the data say theirs: nothing has been read by then.

    Args:
        metric: the metric.
        size: side of the images in pixels.

    Raises:
        ValueError: it is another.
    """
    if size != metric.image_size:
        expected = f"{metric.image_size} × {metric.image_size}"
        raise LipsimError(
            f"expected images of {expected} pixels, which the metric takes, got data of {size} × {size}; pass "
            f"--data.image_size={metric.image_size}"
        )


def _framing_of(ways: Set[str]) -> str:
    """The framing of images whose :attr:`lipsim.data.Preprocess.way` this is."""
    return sorted(ways)[0].partition(", ")[2] or "stretch"


def evaluation_loaders(trainer: L.Trainer) -> list[DataLoader[Any]]:
    """The data loaders of the evaluation that is running."""
    loaders: list[DataLoader[Any]] = tree_flatten(_loaders(trainer))[0]
    return loaders


def _loaders(trainer: L.Trainer) -> Any:
    """What the hook of the evaluation that is running returned: loaders, or a dictionary of them."""
    if trainer.testing:
        return trainer.test_dataloaders
    # trainer.val_dataloaders would still be those of an earlier fit.
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return None if loop._combined_loader is None else loop._combined_loader.iterables


def evaluation_names(facts: DataFacts, stage: str, loaders: Any) -> list[str]:
    """Names of evaluation sets in the order of their loaders: ``test_names`` or ``val_names`` of the data, or the keys.

    Args:
        facts: what the data module says.
        stage: "test" or "val".
        loaders: what its hook returned.

    Raises:
        ValueError: two sets, or a set and a part of another, have one name, or a name would lead out of the folder of
            the results, in which it is part of the names of files, or into another folder there.
    """
    count = len(tree_flatten(loaders)[0])
    names = (facts.names or list(loaders if isinstance(loaders, Mapping) else []))[:count]
    names += [f"set{i}" for i in range(len(names), count)]
    every = [*names, *(f"{name}_{group}" for name in dict.fromkeys(names) for group in facts.groups.get(name, {}))]
    repeated = sorted({name for name in every if every.count(name) > 1})
    if repeated:
        raise LipsimError(
            f"several evaluation sets are called {', '.join(repeated)}, and results are kept by name; give each its "
            f"own in {stage}_names of the data module"
        )
    for name in every:
        if Path(name).is_absolute() or "\0" in name or ".." in name.replace("\\", "/").split("/"):
            raise LipsimError(f"{name!r} is no name of an evaluation set: results are written to files of that name")
    if slashed := [name for name in names if "/" in name or "\\" in name]:
        raise LipsimError(
            f"{slashed[0]!r} is no name of an evaluation set: results are written to files of that name, which no "
            "slash can be part of"
        )
    return names
