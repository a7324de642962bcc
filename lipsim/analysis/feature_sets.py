"""Training sets that hold the features which one model uses, and no others (Ilyas et al. 2019), as image folders.

"robust" (D_R) and "nonrobust" (D_NR) images have the features of the original in a model, and start from another image;
the two differ in the model alone. "random" (D_rand) and "deterministic" (D_det) images are adversarial examples under
the label of the class that they were moved to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from lipsim.analysis.feature_maps import FeatureMap
from lipsim.analysis.feature_matching import FeatureObjective, LikelihoodObjective, ascend_by_equal_steps
from lipsim.analysis.models import Model
from lipsim.attacks.objectives import logits_of
from lipsim.attacks.projections import sample_norm
from lipsim.certificates.numbers import check_count
from lipsim.data.bit_depth import open_image
from lipsim.data.sets.labelled_folder import LabelledFolder, to_8bit
from lipsim.data.transforms import Preprocess
from lipsim.layers import freeze
from lipsim.layers.fingerprint import structure
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_leftovers, sha256, state_fingerprint, write_file, write_json
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import sample_normal, sample_uniform
from lipsim.utils.terminal import one_line

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Kind = Literal["robust", "nonrobust", "random", "deterministic"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MANIFEST = "manifest.json"
_KEY = "lipsim"  # of the text in a PNG file that says what was done
_STREAMS = 3  # of random numbers of one seed: starting images, noise, classes


@dataclass(frozen=True)
class FeatureSetRecipe:
    """How the images of a feature set are made.

    Attributes:
        kind: "robust" or "nonrobust": the features of an image from another start; "random" or "deterministic":
            towards a class, drawn uniformly from all, or the one after the image's own.
        start: where features are matched from: another image of the folder ("image"), or gray with noise of standard
            deviation 0.05 ("noise").
        steps: gradient steps; None: the published 1,000 for features and 100 towards a class.
        step_size: ℓ2 length of each.
        eps: ℓ2 budget towards a class.
        shorten: match features by steps that do not go too far, see :func:`ascend_by_equal_steps`; not published.
        batch_size: images at once. It belongs to the recipe because the last digits of a network depend on it.
        seed: of starts and classes, which depend on it and the number of the image alone.

    Raises:
        ValueError: one of them is out of range.
    """

    kind: Kind
    start: Literal["image", "noise"] = "image"
    steps: int | None = None
    step_size: float = 0.1
    eps: float = 0.5
    shorten: bool = False
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.start not in ("image", "noise"):
            raise LipsimError(
                f"expected a kind of {', '.join(KINDS)} and a start image or noise, got {self.kind!r}, {self.start!r}"
            )
        if self.steps is None:
            object.__setattr__(self, "steps", 1000 if self.matches_features else 100)
        check_count("steps", self.num_steps)
        check_count("batch_size", self.batch_size)
        if not (self.step_size > 0 and self.eps > 0):
            raise LipsimError(f"expected a positive step_size and eps, got {self.step_size} and {self.eps}")

    @property
    def matches_features(self) -> bool:
        """Whether images get the features of others; else they move towards a class."""
        return self.kind in ("robust", "nonrobust")

    @property
    def num_steps(self) -> int:
        """The steps, the default in place of None."""
        assert self.steps is not None
        return self.steps


@dataclass(frozen=True)
class FeatureSet:
    """A feature set that is written, and how closely its images have what they should.

    Attributes:
        folder: of the images, ``{class}/{number}-{name}.png``.
        kind: of it.
        images: how many.
        written: how many of them by this call, on all processes.
        means: over the images. For features: the distance ``‖g(x) − g(original)‖/‖g(original)‖`` of the start
            ("before"), of what was found ("after"), and of that in 8 bits ("stored"). Towards a class: the share that
            the classifier answers right before ("right"), that it gives the class afterwards ("after") and in 8 bits
            ("stored"), and the mean ℓ2 length of the change as stored ("norm").
        rank: of the process; the others return no means.
    """

    folder: Path
    kind: Kind
    images: int
    written: int
    means: dict[str, float]
    rank: int = 0


def make_feature_set(
    images: str | Path,
    output: str | Path,
    model: Model,
    recipe: FeatureSetRecipe,
    *,
    layer: str | None = None,
    fabric: Fabric | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> FeatureSet:
    """Write ``{output}/{kind}/{class}/{number}-{name}.png``, or what is missing of it.

    The files are PNG of 8 bits, which torchvision's ``ImageFolder`` reads; a text in each says what it was made from.
    Killed, the same call continues, on any number of processes, and ends with the same bytes on the same kind of
    machine: batches are the same whoever works on them, and one of which any file is missing is made again.

    Args:
        images: folder ``{images}/{class}/…/{image}``.
        output: folder of the feature sets.
        model: whose features they are; towards a class, a classifier whose logits are the classes, sorted by name.
        recipe: what to make.
        layer: whose features are matched, see :class:`lipsim.analysis.feature_maps.FeatureMap`.
        fabric: launched processes, each of which calls this (:func:`lipsim.evaluation.processes.processes`); None: this
            one alone, on the CPU.
        say: hears how far it is.

    Raises:
        FileNotFoundError: no images.
        ValueError: the folder has a set of another recipe, model or images; images, layers or logits do not fit.
        ProcessFailed: something was wrong in one of several processes.
    """
    rank, size = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    maker, folder, manifest = _prepare(images, output, model, recipe, layer, fabric)
    source = maker.source
    if fabric is not None:
        fabric.barrier()  # all have looked before one writes
    if rank == 0:
        write_json(folder / MANIFEST, manifest)
        for name in source.classes:
            remove_leftovers(folder / name)
    if fabric is not None:
        fabric.barrier()
    files = [folder / name for name in maker.outputs]
    batches = [range(i, min(i + recipe.batch_size, len(source))) for i in range(0, len(source), recipe.batch_size)]
    missing = [batch for batch in batches[rank::size] if not all(files[i].is_file() for i in batch)]
    written, failure = 0, None
    try:
        for count, batch in enumerate(missing):
            start = f"batch {count + 1} of {len(missing)}"
            with full_precision():
                made, notes = maker.make(batch, lambda step, s=start: say(f"{s}, step {step} of {recipe.num_steps}"))  # type: ignore[misc]
            for i, image, note in zip(batch, made, notes, strict=True):
                if not files[i].is_file():
                    _write_png(files[i], image, note)
                    written += 1
    except (OSError, ValueError) as error:
        if size == 1:
            raise
        print(f"error: {one_line(str(error))} (the other processes finish)", file=sys.stderr, flush=True)
        failure = error
    if fabric is not None:
        from lipsim.evaluation.processes import total  # Lightning, which one process does without

        written = total(fabric, written, failure)
    return FeatureSet(folder, recipe.kind, len(files), written, _means(files) if rank == 0 else {}, rank)


def check_feature_set(
    images: str | Path,
    output: str | Path,
    model: Model,
    recipe: FeatureSetRecipe,
    *,
    layer: str | None = None,
    fabric: Fabric | None = None,
) -> None:
    """Refuse what :func:`make_feature_set` would refuse of the same arguments before it makes anything."""
    _prepare(images, output, model, recipe, layer, fabric)


def _prepare(
    images: str | Path,
    output: str | Path,
    model: Model,
    recipe: FeatureSetRecipe,
    layer: str | None,
    fabric: Fabric | None,
) -> tuple[_Maker, Path, dict[str, Any]]:
    """What makes the images, the folder of the set, and its manifest."""
    device = torch.device("cpu") if fabric is None else fabric.device
    if model.framing != "stretch":
        raise LipsimError(
            f"feature sets are made of stretched images, got {model.name} with the framing {model.framing!r}"
        )
    source = LabelledFolder(images, Preprocess(model.image_size, model.resize))
    folder = user_path(output) / recipe.kind
    freeze(model.module.to(device).requires_grad_(False))
    with full_precision():
        maker = _Maker(source, model, recipe, layer, device)
        manifest = _manifest(source, model, recipe, maker.layer)
        _check_manifest(folder, manifest)
    return maker, folder, manifest


class _Maker:
    """Makes the images of a feature set, batch by batch."""

    def __init__(
        self, source: LabelledFolder, model: Model, recipe: FeatureSetRecipe, layer: str | None, device: torch.device
    ) -> None:
        self.source, self.model, self.recipe, self.device = source, model, recipe, device
        self.labels = source.labels
        self.layer = ""
        everything = range(len(source))
        gray = torch.full((1, 3, model.image_size, model.image_size), 0.5, device=device)
        if recipe.matches_features:
            self.features = FeatureMap(model, layer)
            with torch.no_grad(), taking_images(model.name, gray):
                self.features(gray)  # refuses what gives no features, before anything is written
            self.layer = self.features.layer
            if recipe.start == "image":
                self.starts = _others(recipe.seed, everything)
        else:
            if layer is not None:
                raise LipsimError(f"layer {layer!r} has no part in a set of the kind {recipe.kind}; leave it out")
            self._check_classes(gray)
            self.labels = _targets(recipe, source.labels, len(source.classes))
            if never := sorted(set(range(len(source.classes))) - set(self.labels.tolist())):
                raise LipsimError(
                    f"no image is moved to the class {source.classes[never[0]]}, so that its folder would be missing; "
                    "take more images or another seed"
                )
        digits = len(str(len(source) - 1))
        self.outputs = [
            Path(source.classes[int(label)], f"{i:0{digits}d}-{Path(str(name)).stem}.png")
            for i, (name, label) in enumerate(zip(source.names, self.labels, strict=True))
        ]

    def make(self, numbers: Sequence[int], say: Callable[[int], None]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images ``(N, 3, S, S)`` uint8 in the place of those of some numbers, and a note on each."""
        x = self.source.load(numbers).to(self.device)
        notes = [
            {"kind": self.recipe.kind, "source": str(self.source.names[i]), "label": self._class(self.labels[i])}
            for i in numbers
        ]
        made, values = (self._match if self.recipe.matches_features else self._move)(x, numbers, say)
        for column, value in values.items():
            for note, number in zip(notes, value, strict=True):
                note[column] = number
        return made.cpu(), notes

    def _match(self, x: Tensor, numbers: Sequence[int], say: Callable[[int], None]) -> tuple[Tensor, dict[str, Any]]:
        recipe = self.recipe
        with torch.no_grad():
            goal = self.features(x)
        if recipe.start == "image":
            others = [self.starts[i] for i in numbers]
            start = self.source.load(others).to(x)
            origin = [str(self.source.names[i]) for i in others]
        else:
            noise = sample_normal(x, seed=_stream(recipe.seed, 1), index=list(numbers))
            start = (0.5 + noise / 20).clamp(0, 1)
            origin = ["noise"] * len(x)
        objective = FeatureObjective(self.features, goal)
        found = ascend_by_equal_steps(
            objective, start, steps=recipe.num_steps, step_size=recipe.step_size, shorten=recipe.shorten, say=say
        )
        stored = to_8bit(found)
        scale = torch.linalg.vector_norm(goal, dim=1).clamp(min=torch.finfo(goal.dtype).tiny)
        with torch.no_grad():
            distances = {
                name: (-objective(images) / scale).tolist()
                for name, images in (("before", start), ("after", found), ("stored", stored.to(x) / 255))
            }
        return stored, {"start": origin, **distances}

    def _move(self, x: Tensor, numbers: Sequence[int], say: Callable[[int], None]) -> tuple[Tensor, dict[str, Any]]:
        recipe, rows = self.recipe, list(numbers)
        own, target = self.source.labels[rows].to(x.device), self.labels[rows].to(x.device)
        objective = LikelihoodObjective(self.model.module, target)
        found = ascend_by_equal_steps(
            objective, x, steps=recipe.num_steps, step_size=recipe.step_size, eps=recipe.eps, say=say
        )
        stored = to_8bit(found)
        with torch.no_grad():
            before, after, kept = (
                logits_of(self.model.module, images).argmax(1) for images in (x, found, stored.to(x) / 255)
            )
        return stored, {
            "class": [self._class(label) for label in own],
            "right": before.eq(own).tolist(),
            "after": after.eq(target).tolist(),
            "stored": kept.eq(target).tolist(),
            "norm": sample_norm(stored.to(x) / 255 - x).tolist(),
        }

    def _class(self, label: Tensor) -> str:
        return self.source.classes[int(label)]

    def _check_classes(self, x: Tensor) -> None:
        classes = len(self.source.classes)
        with torch.no_grad(), taking_images(self.model.name, x):
            logits = logits_of(self.model.module, x)
        if logits.shape[1] != classes:
            raise LipsimError(
                f"expected a classifier of the {classes} classes in {self.source.folder}, sorted by name; "
                f"{self.model.name} has {logits.shape[1]} logits"
            )


def _stream(seed: int, stream: int) -> int:
    return seed * _STREAMS + stream


def _others(seed: int, numbers: Sequence[int]) -> list[int]:
    """Another number of the same range for each, uniform."""
    if len(numbers) < 2:
        raise LipsimError("expected at least two images to start from another one; start from noise")
    draws = sample_uniform(torch.empty(len(numbers), 1, dtype=torch.float64), seed=_stream(seed, 0), index=numbers)
    drawn = [int(draw * (len(numbers) - 1)) for draw in draws.flatten().tolist()]
    return [other + (other >= i) for i, other in zip(numbers, drawn, strict=True)]


def _targets(recipe: FeatureSetRecipe, labels: Tensor, classes: int) -> Tensor:
    """The class that each image moves to: uniform among all, its own as well, or the one after its own."""
    if recipe.kind == "deterministic":
        return (labels + 1) % classes
    draws = sample_uniform(torch.empty(len(labels), 1), seed=_stream(recipe.seed, 2), index=range(len(labels)))
    return (draws.flatten() * classes).long()


def _write_png(path: Path, image: Tensor, note: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text(_KEY, json.dumps(note))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_file(path, lambda temporary: picture.save(temporary, pnginfo=text))


def read_note(path: Path) -> dict[str, Any]:
    """What the text in an image of a feature set says: what it was made from, and how closely.

    Raises:
        ValueError: the file is no such image.
    """
    try:
        with open_image(path.read_bytes()) as image:
            note: dict[str, Any] = json.loads(getattr(image, "text", {})[_KEY])
    except (OSError, KeyError, ValueError) as error:
        raise LipsimError(f"{path} is no image of a feature set ({error}); remove it to have it made again") from error
    return note


def _means(files: Sequence[Path]) -> dict[str, float]:
    notes = [read_note(file) for file in files]
    columns = [key for key, value in notes[0].items() if isinstance(value, float | bool)]
    return {key: float(np.mean([note[key] for note in notes])) for key in columns}


def _manifest(source: LabelledFolder, model: Model, recipe: FeatureSetRecipe, layer: str) -> dict[str, Any]:
    return {
        **asdict(recipe),
        "layer": layer,
        "weights": state_fingerprint(_state(model.module)),
        "structure": sha256(structure(model.module)),
        "image_size": model.image_size,
        "resize": model.resize,
        "images": len(source),
        "files": source.fingerprint(),
        "classes": source.classes,
    }


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, also those that no checkpoint has, such as a normalisation."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse to add to what was made otherwise."""
    path = folder / MANIFEST
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise LipsimError(f"{folder} has files and no {MANIFEST}; choose another output")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LipsimError(f"cannot read {path} ({error}); choose another output") from error
    before.setdefault("structure", manifest["structure"])  # an earlier version wrote none
    differing = [name for name in manifest if before.get(name) != manifest[name]]
    if differing:
        said = "; ".join(f"{name} was {before.get(name)!s:.60} and is {manifest[name]!s:.60}" for name in differing)
        raise LipsimError(f"{folder} was made with other options ({said}); give those, or another output")
