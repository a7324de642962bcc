"""The data of benchmarks/results.py: triplets over images in memory, made once and read by every process."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from lipsim.data import BuiltinTriplets, SharedTriplet, Triplet
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.data.registry import open_sets
from lipsim.data.sets.image_store import load_image_store
from lipsim.data.sets.material import MaterialTriplets
from lipsim.data.sets.photos import PhotoTriplets
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Split
from lipsim.metric import PerceptualMetric, save
from lipsim.teachers import BranchConfig, Ensemble
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest, write_safetensors
from lipsim.utils.precision import full_precision
from lipsim.utils.weights import read_safetensors


def pretrained(image_size: int, options: argparse.Namespace) -> Ensemble:
    """EfficientNet-Lite0 with ImageNet weights, on images of any size, which it enlarges."""
    branch = BranchConfig("efficientnet_lite0", "package", input_size=options.teacher_size)
    return Ensemble([branch], image_size=image_size)


@dataclass(frozen=True)
class Triplets:
    """Triplets over shared images.

    Attributes:
        images: ``(M, 3, S, S)``, uint8, or float32 in [0, 1].
        ids: ``(N, 3)`` int64, rows of them.
        right_vote: ``(N,)`` float32.
    """

    images: Tensor
    ids: Tensor
    right_vote: Tensor

    def untied(self, most: int, seed: int = 0) -> Triplets:
        """A sample of those with a majority, the same for a given seed; a smaller one is the beginning of a larger."""
        rows = (self.right_vote != 0.5).nonzero().flatten()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
        return self.select(rows[order])

    def select(self, rows: Tensor | slice) -> Triplets:
        """Some of the triplets, over the same images."""
        return Triplets(self.images, self.ids[rows], self.right_vote[rows])

    def floats(self, rows: Tensor, device: torch.device) -> Tensor:
        """Images ``(N, 3, S, S)`` in [0, 1] by number."""
        images = self.images[rows.to(self.images.device)].to(device)
        return images.float() / 255 if images.dtype == torch.uint8 else images

    def fingerprint(self) -> str:
        """SHA-256 of images, places and votes."""
        digest = Digest()
        for tensor in (self.images[self.ids.unique()], self.ids, self.right_vote):
            digest.add_tensor(tensor)
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """One data set at one size.

    Attributes:
        name: in tables.
        image_size: side of the images.
        train: to train on.
        tests: set → triplets that nobody trains on.
        features: dimension of the students' features, that of the teacher's embedding.
        target: radius that the hinges push to.
        batch: triplets a step; of Material's 2,048, each distinct image is embedded once.
        turns: whether triplets may be turned and flipped, or flipped sideways alone, or neither.
        teacher: file of the teacher; None: each seed tunes a small ViT of its own.
        plain: ``(M, D)`` embeddings of ``images`` by the teacher; empty without a file.
        flipped: the same of the images flipped sideways.
        images: ``(M, 3, S, S)``, to distil on.
        labels: ``(M,)`` int64, classes of ``images``; empty where they have none.
    """

    name: str
    image_size: int
    train: Triplets
    tests: dict[str, Triplets]
    features: int
    target: float
    batch: int
    turns: str
    teacher: Path | None
    images: Tensor
    plain: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    flipped: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def has_classes(self) -> bool:
        """Whether there are two classes or more with as many images as :meth:`shared` takes of each."""
        return int((self.labels.bincount() >= PER_CLASS).sum()) > 1

    def triplets(self, batch: int, device: torch.device) -> Callable[[], Triplet]:
        """A function that draws a batch of training triplets, on a device that holds all their images."""
        images, ids, votes = (t.to(device) for t in (self.train.images, self.train.ids, self.train.right_vote))

        def draw() -> Triplet:
            rows = torch.randint(len(ids), (batch,), device=device)
            chosen = ids[rows]
            if len(images) <= 3 * batch:  # few images, many times
                used, places = chosen.unique(return_inverse=True)
                return SharedTriplet(_floats(images[used]), places, votes[rows], rows)
            pictures = [_floats(images[column]) for column in chosen.unbind(1)]
            if self.turns == "sideways":
                flip = (torch.rand(batch, device=device) < 0.5).view(-1, 1, 1, 1)
                pictures = [torch.where(flip, x.flip(3), x) for x in pictures]
            reference, left, right = pictures
            return Triplet(reference, left, right, votes[rows], rows)

        return draw

    def shared(self, device: torch.device) -> Callable[[], Triplet]:
        """A function that draws many triplets over few photographs, each embedded once, and some over their own images.

        Four of five are of a class and another one, the others voted by the teacher. Photographs are flipped at random.
        """
        images, labels, teacher = self.images.to(device), self.labels.to(device), self.plain.to(device)
        sizes = labels.bincount()
        usable = (sizes >= PER_CLASS).nonzero().flatten()
        members = labels.argsort(stable=True)
        starts = sizes.cumsum(0) - sizes
        own = self.triplets(OWN_IMAGES, device)

        def draw() -> Triplet:
            chosen = usable[torch.randperm(len(usable), device=device)[:NUM_CLASSES]]
            order = torch.rand(len(chosen), int(sizes.max()), device=device)
            beyond = torch.arange(order.shape[1], device=device) >= sizes[chosen].unsqueeze(1)
            places = order.masked_fill(beyond, 2.0).argsort(1)[:, :PER_CLASS]
            rows = members[starts[chosen].unsqueeze(1) + places].flatten()
            ids, votes = shared_triplets(len(chosen), teacher[rows])
            x = _floats(images[rows])
            x = torch.where((torch.rand(len(x), device=device) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
            others = own()
            distinct = torch.cat([x, others.reference, others.left, others.right])
            more = len(x) + torch.arange(3 * OWN_IMAGES, device=device).view(3, -1).mT
            ids, votes = torch.cat([ids, more]), torch.cat([votes, others.right_vote])
            return SharedTriplet(distinct, ids, votes, torch.arange(len(ids), device=device))

        return draw

    def embedded(self, batch: int, device: torch.device) -> Callable[[], EmbeddedImages]:
        """A function that draws images, flipped or not, with the teacher's embeddings of them."""
        images, plain, flipped = (t.to(device) for t in (self.images, self.plain, self.flipped))

        def draw() -> EmbeddedImages:
            rows = torch.randint(len(images), (min(batch, len(images)),), device=device)
            flip, x = torch.rand(len(rows), device=device) < 0.5, _floats(images[rows])
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            return EmbeddedImages(x, torch.where(flip.unsqueeze(1), flipped[rows], plain[rows]))

        return draw


NUM_CLASSES, PER_CLASS, SHARED_TRIPLETS, OWN_IMAGES = 64, 8, 16384, 16


def shared_triplets(classes: int, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Triplets ``(N, 3)`` and votes ``(N,)`` over images that stand in order, :data:`PER_CLASS` of each class.

    Args:
        classes: how many there are.
        embeddings: ``(classes·PER_CLASS, D)`` of unit norm, the teacher's, which votes on a fifth of the triplets.
    """
    total, device = classes * PER_CLASS, embeddings.device

    def below(most: int, count: int = SHARED_TRIPLETS) -> Tensor:
        return torch.randint(most, (count,), device=device)

    reference = below(total)
    first = reference - reference % PER_CLASS
    same = first + (reference % PER_CLASS + 1 + below(PER_CLASS - 1)) % PER_CLASS
    other = (first + PER_CLASS + below(total - PER_CLASS)) % total
    left, right = (reference + 1 + below(total - 1)) % total, (reference + 1 + below(total - 1)) % total
    z, z0, z1 = (embeddings[rows] for rows in (reference, left, right))
    farther = ((z * z1).sum(1) - (z * z0).sum(1)).sign()
    voted = torch.rand(SHARED_TRIPLETS, device=device) < 0.2
    ids = torch.stack([reference, torch.where(voted, left, same), torch.where(voted, right, other)], 1)
    votes = torch.where(voted, (farther + 1) / 2, 0.0)
    swap = torch.rand(SHARED_TRIPLETS, device=device) < 0.5
    return torch.where(swap.unsqueeze(1), ids[:, [0, 2, 1]], ids), torch.where(swap, 1 - votes, votes)


class Batches(IterableDataset[EmbeddedImages | Triplet]):
    """Batches that a function makes, without end."""

    def __init__(self, make: Callable[[], EmbeddedImages | Triplet]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[EmbeddedImages | Triplet]:
        while True:
            yield self.make()


def task_names(options: argparse.Namespace) -> list[str]:
    """``builtin-64``, ``material-64``, … as the options choose."""
    sizes = {"builtin": [64], "photos": [64]}
    return [f"{data}-{size}" for data in options.data for size in options.image_size or sizes.get(data, [64, 128, 224])]


def prepare(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Write what every process reads of a task, unless it is there: images, triplets, teacher, its embeddings.

    Raises:
        ValueError: it is there, and was made with other options than those that results would be said to be of.
    """
    folder, made = options.output / "data" / name, _made_with(name, options)
    if (folder / "data.safetensors").is_file():
        before = json.loads(read_safetensors(folder / "data.safetensors")[1].get("made", "{}"))
        if differing := [f"{key} was {before[key]}" for key in before if before[key] != made.get(key)]:
            raise LipsimError(f"{folder} was made with other options ({', '.join(differing)}); give another --output")
        return
    data, size = name.rsplit("-", 1)
    tensors = _MAKE[data](int(size), options, device)
    if data != "builtin":
        encoder = pretrained(int(size), options)
        save(PerceptualMetric(encoder, int(size), anchor=0.0, lipschitz=math.inf), folder / "teacher.safetensors")
        if "plain" not in tensors:
            encoder, images = encoder.eval().to(device), tensors["images"]
            tensors |= _embeddings(encoder, images, embed(encoder, images, device), options.features, device)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    write_safetensors(folder / "data.safetensors", tensors, {"made": json.dumps(made)})


def _made_with(name: str, options: argparse.Namespace) -> dict[str, int | None]:
    """The options that the data of a task rest on."""
    used = {
        "builtin": ("train_triplets", "test_triplets"),
        "material": ("features", "teacher_size"),
        "photos": ("features", "teacher_size", "photo_triplets", "test_triplets", "images"),
    }
    return {f"--{option.replace('_', '-')}": getattr(options, option) for option in used[name.rsplit("-", 1)[0]]}


@functools.lru_cache(maxsize=2)
def load_task(name: str, output: Path, features: int) -> Task:
    """What :func:`prepare` wrote."""
    folder = output / "data" / name
    tensors, _ = read_safetensors(folder / "data.safetensors")
    data, size = name.rsplit("-", 1)
    sets = {
        key.removesuffix("/ids"): Triplets(tensors[_images(tensors, key)], value, tensors[f"{key[:-4]}/right_vote"])
        for key, value in tensors.items()
        if key.endswith("/ids")
    }
    train = sets.pop("train")
    builtin = data == "builtin"
    return Task(
        name=f"{data}, {size} px",
        image_size=int(size),
        train=train,
        tests=sets,
        features=128 if builtin else features,
        target=2.0 * int(size) / 64,
        batch=2048 if data == "material" else 64,
        turns={"builtin": "all", "photos": "sideways", "material": "none"}[data],
        teacher=None if builtin else folder / "teacher.safetensors",
        images=tensors["images"],
        plain=tensors.get("plain", torch.empty(0, 0)),
        flipped=tensors.get("flipped", torch.empty(0, 0)),
        labels=tensors.get("labels", torch.empty(0, dtype=torch.int64)),
    )


def _images(tensors: dict[str, Tensor], key: str) -> str:
    """The images of a set: its own, or those that all share."""
    own = key.replace("/ids", "/images")
    return next(name for name in (own, *([] if key == "train/ids" else ["tests/images"]), "images") if name in tensors)


def _builtin(size: int, options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """The quickstart's triplets, of the same seed; distilled on their images."""
    tensors: dict[str, Tensor] = {}
    parts: dict[Split, int] = {"train": options.train_triplets, "test": options.test_triplets}
    for part, count in parts.items():
        triplets = BuiltinTriplets(part, count, image_size=size, seed=1, num_workers=options.workers)
        tensors["images" if part == "train" else "test/images"] = triplets.images.flatten(0, 1)
        tensors[f"{part}/ids"] = torch.arange(3 * count).view(count, 3)
        tensors[f"{part}/right_vote"] = triplets.right_vote
    return tensors


def _material(size: int, options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Human votes on known materials, with an unseen one, on unseen ones alone, and official ones if they are there."""
    root = options.shared / "material-appearance-similarity"
    official = ["official"] if (root / "data" / "answers_processed_test.json").is_file() else []
    parts = {"train": "train", "triplets": "known", "materials": "unseen", "unseen": "unseen alone"}
    parts |= {part: part for part in official}
    sets = open_sets("material", list(parts), image_size=size, resize="float", root=root)
    tensors: dict[str, Tensor] = {}
    for part, name in parts.items():
        triplets = sets[part]
        assert isinstance(triplets, MaterialTriplets)
        tensors["tests/images"] = triplets.images
        tensors[f"{name}/ids"], tensors[f"{name}/right_vote"] = triplets.answers.ids, triplets.answers.right_vote
    seen = tensors["train/ids"].unique()
    # Neither the votes nor distillation show a held-out material.
    tensors["images"] = tensors["tests/images"][seen]
    tensors["train/ids"] = torch.searchsorted(seen, tensors["train/ids"])
    return tensors


def _photos(size: int, options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Photographs: another one of its class, the same one distorted, and what the teacher finds nearer."""
    teacher = pretrained(size, options).eval().to(device)
    tensors: dict[str, Tensor] = {}
    for part in ("train", "val"):
        store = load_image_store(
            options.photos / part, Preprocess(size), num_images=options.images, num_workers=options.workers
        )
        judged = embed(teacher, store.images, device)
        if part == "train":
            kinds = {"semantic": 0.5, "distortion": 0.25, "teacher": 0.25}
            triplets = PhotoTriplets(store, options.photo_triplets, kinds=kinds, embeddings=judged.cpu(), seed=1)
            tensors["images"], tensors["labels"] = store.images, store.classes()
            tensors |= _drawn("train", triplets, store.images)
            tensors |= _embeddings(teacher, store.images, judged, options.features, device)
            continue
        whole = PhotoTriplets(store, embeddings=judged.cpu(), seed=1)
        for kind in ("semantic", "distortion", "teacher"):
            tensors |= _drawn(kind, whole.only(kind, options.test_triplets), store.images)
    return tensors


def _drawn(name: str, triplets: PhotoTriplets, images: Tensor) -> dict[str, Tensor]:
    """Triplets as they are drawn, over the pictures and what distortions made of them."""
    recipes = triplets.recipes(torch.arange(len(triplets)))
    ids, votes, made = recipes.ids.clone(), recipes.right_vote.clone(), [images]
    distorted = (recipes.family >= 0).nonzero().flatten()
    for rows in distorted.split(256):
        batch = triplets.__getitems__(rows.tolist())
        first = sum(map(len, made))
        made += [(part * 255).round().to(torch.uint8) for part in (batch.left, batch.right)]
        places = torch.arange(first, first + len(rows))
        ids[rows, 1], ids[rows, 2], votes[rows] = places, places + len(rows), batch.right_vote
    used, places = ids.unique(return_inverse=True)
    return {f"{name}/images": torch.cat(made)[used], f"{name}/ids": places, f"{name}/right_vote": votes}


_MAKE: dict[str, Callable[[int, argparse.Namespace, torch.device], dict[str, Tensor]]] = {
    "builtin": _builtin,
    "material": _material,
    "photos": _photos,
}
DATA = ("builtin", "material", "photos")


@torch.no_grad()
def embed(encoder: nn.Module, images: Tensor, device: torch.device, flip: bool = False, batch: int = 128) -> Tensor:
    """Features ``(M, D)`` of images, in full precision and in batches."""
    parts = []
    with full_precision():
        for part in images.split(batch):
            x = _floats(part.to(device))
            parts.append(encoder(x.flip(3) if flip else x))
    return torch.cat(parts)


def _embeddings(
    encoder: nn.Module, images: Tensor, plain: Tensor, features: int, device: torch.device
) -> dict[str, Tensor]:
    """The teacher's embeddings of images, ``plain``, and of their mirror images, in as many features as students have.

    Coordinates along the largest singular vectors, back at unit norm: scalar products, and so cosine distances, are
    those of the teacher as nearly as so many numbers can have them.
    """
    plain = plain.double()
    flipped = embed(encoder, images, device, flip=True).double()
    if features < plain.shape[1]:
        _, vectors = torch.linalg.eigh(plain.mT @ plain + flipped.mT @ flipped)  # by rising eigenvalue
        plain, flipped = plain @ vectors[:, -features:], flipped @ vectors[:, -features:]
    found = {"plain": plain, "flipped": flipped}
    return {name: F.normalize(z, dim=1).float().cpu() for name, z in found.items()}


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_data(options: argparse.Namespace) -> None:
    """Refuse what cannot be there before anything is computed."""
    if "material" in options.data and not (options.shared / "material-appearance-similarity").is_dir():
        raise LipsimError(f"no folder material-appearance-similarity in {options.shared}; name the data by --shared")
    if "photos" in options.data and not (options.photos / "train").is_dir():
        raise LipsimError(f"no folder train in {options.photos}; name an image folder by --photos")
