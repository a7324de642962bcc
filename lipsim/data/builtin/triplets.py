"""The built-in triplet set: procedural scenes and photographs, judged by simulated voters. Nothing is downloaded.

A reference is a dead leaves scene or a crop of a photograph with known parameters. Left and right are the reference
with one or two of its factors moved, one of them further than the other. Besides, every candidate is displaced, and
most scenes have leaves rearranged, which changes nearly every pixel and which people overlook. The voters prefer the
smaller move, with a noise that grows as the moves get alike, as in any paired comparison (Bradley and Terry 1952).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.data.builtin.factors import move, move_size, sample_values
from lipsim.data.builtin.photographs import (
    PHOTOGRAPH_FACTORS,
    PHOTOGRAPHS,
    PhotographParameters,
    load_photograph,
    render_photograph,
)
from lipsim.data.builtin.scenes import SCENE_FACTORS, SceneParameters, render_scene
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Split, Triplet
from lipsim.utils.errors import LipsimError

MIN_IMAGE_SIZE = 16
# Odd, so that no vote is tied, and every majority is defined.
NUM_JUDGES = 7

_MAX_NEAR_MOVE = 2.0  # steps, of the candidate that is moved less
_EXTRA_MOVE = (1.0, 4.0)  # how many steps more the other one is moved
_VOTE_SLOPE = 0.7  # log odds per step of difference; the majority then agrees with the true moves in 93 % of triplets
_REARRANGED_SHARE = 0.7  # of the candidates of scenes
_REARRANGING_STEPS = 0.5  # what a full rearrangement of the leaves counts
_MAX_SHIFT = 0.25  # of the image side; half as much for photographs
_MIN_CONTRAST = 0.08  # standard deviation of the grey levels of a photograph's crop
_RENDER_CHUNK = 32  # triplets per task of a rendering process

Parameters = SceneParameters | PhotographParameters


@dataclass(frozen=True)
class TripletRecipe:
    """Everything that a built-in triplet is made from.

    Attributes:
        reference: parameters of the reference image.
        left: parameters of the left candidate.
        right: parameters of the right candidate.
        left_move: size of the left candidate's move in steps (see ``lipsim.data.builtin.factors``).
        right_move: size of the right candidate's move.
        right_vote: fraction of the judges who chose right, a multiple of 1 / ``NUM_JUDGES``.
    """

    reference: Parameters
    left: Parameters
    right: Parameters
    left_move: float
    right_move: float
    right_vote: float


def sample_recipe(split: Split, index: int, *, photograph_share: float = 0.25, seed: int = 0) -> TripletRecipe:
    """The recipe of one triplet: a function of its arguments only.

    Args:
        split: "train", "val" or "test".
        index: position in the split, from 0.
        photograph_share: probability that the triplet shows a photograph, not a scene.
        seed: seed of the whole set.
    """
    rng = np.random.default_rng((seed, get_args(Split).index(split), index))
    reference: Parameters
    if rng.random() < photograph_share:
        reference = _sample_photograph(split, rng)
    else:
        squareness, layout_seed = rng.random(), _sample_seed(rng)
        values: dict[str, Any] = dict(sample_values(SCENE_FACTORS, rng))
        reference = SceneParameters(squareness=squareness, layout_seed=layout_seed, **values)
    near = rng.uniform(0, _MAX_NEAR_MOVE)
    sizes = rng.permutation([near, near + rng.uniform(*_EXTRA_MOVE)])
    (left, left_move), (right, right_move) = (_sample_candidate(reference, size, rng) for size in sizes)
    prefers_right = 1 / (1 + math.exp(-_VOTE_SLOPE * (left_move - right_move)))
    right_vote = rng.binomial(NUM_JUDGES, prefers_right) / NUM_JUDGES
    return TripletRecipe(reference, left, right, left_move, right_move, right_vote)


def render_recipe(recipe: TripletRecipe, image_size: int) -> np.ndarray:
    """Reference, left and right of a recipe, ``(3, 3, H, W)`` uint8."""
    images = [
        render_scene(p, image_size) if isinstance(p, SceneParameters) else render_photograph(p, image_size)
        for p in (recipe.reference, recipe.left, recipe.right)
    ]
    return np.rint(np.stack(images).transpose(0, 3, 1, 2) * 255).astype(np.uint8)


def _sample_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**62))


def _sample_photograph(split: Split, rng: np.random.Generator) -> PhotographParameters:
    """A crop that shows something: the sky of some photographs is empty."""
    name = PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))]
    photograph = load_photograph(name)
    height, width = photograph.shape[:2]
    values = sample_values(PHOTOGRAPH_FACTORS, rng)
    for _ in range(20):
        half_x, half_y = (values["scale"] * min(height, width) / side / 2 for side in (width, height))
        x, y = rng.uniform(half_x, 1 - half_x), rng.uniform(half_y, 1 - half_y)
        rows = slice(int((y - half_y) * height), int((y + half_y) * height), 8)
        columns = slice(int((x - half_x) * width), int((x + half_x) * width), 8)
        if photograph[rows, columns].mean(axis=2).std() > _MIN_CONTRAST:
            break
    return PhotographParameters(photograph=name, centre_x=x, centre_y=y, **values, seed=_sample_seed(rng))


def _sample_candidate(reference: Parameters, size: float, rng: np.random.Generator) -> tuple[Parameters, float]:
    """The reference moved and disturbed, and the size of the move in steps."""
    num_moved = int(rng.integers(1, 3))
    shift_x, shift_y = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT, 2)
    if isinstance(reference, PhotographParameters):
        photograph = move(reference, PHOTOGRAPH_FACTORS, size, rng, num_moved=num_moved)
        distance = move_size(reference, photograph, PHOTOGRAPH_FACTORS)
        return replace(photograph, shift_x=shift_x / 2, shift_y=shift_y / 2, seed=_sample_seed(rng)), distance
    rearranged = rng.uniform(0.3, 1) if rng.random() < _REARRANGED_SHARE else 0.0
    scene = move(reference, SCENE_FACTORS, size, rng, num_moved=num_moved)
    distance = math.hypot(move_size(reference, scene, SCENE_FACTORS), _REARRANGING_STEPS * rearranged)
    rearrangement = _sample_seed(rng)
    return replace(
        scene, rearranged=rearranged, rearrangement_seed=rearrangement, shift_x=shift_x, shift_y=shift_y
    ), distance


class BuiltinTriplets(Dataset[Triplet]):
    """Triplets of procedural scenes and photographs with simulated votes.

    A triplet depends on ``(seed, split, index, photograph_share, image_size)`` only. Scenes and photographs of the
    splits are disjoint. The images are rendered once per process and kept as uint8, 9 H W bytes a triplet.

    Args:
        split: "train", "val" or "test".
        num_triplets: how many; a shorter set is the beginning of a longer one.
        image_size: side of the images in pixels, at least 16.
        photograph_share: expected fraction of the triplets that show photographs, in [0, 1].
        seed: another seed is another set of scenes, crops, moves and votes; at least 0.
        num_workers: processes that render; 0 renders in this one. The result is the same.
        progress: called with the number of triplets just rendered, for a progress bar.

    Attributes:
        images: ``(N, 3, 3, H, W)`` uint8: reference, left, right. Shared between equal sets: do not write to it.
        right_vote: ``(N,)`` float32, see :class:`Triplet`; never 0.5, since the number of judges is odd.
        moves: ``(N, 2)`` float32, the true sizes of the left and right move, for an oracle.
        is_photograph: ``(N,)`` bool.
        preprocess: None: the images are drawn at their size, in eight bits, and nothing is resized.
        groups: none.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        split: Split,
        num_triplets: int,
        *,
        image_size: int = 64,
        photograph_share: float = 0.25,
        seed: int = 0,
        num_workers: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if split not in PHOTOGRAPHS:
            raise LipsimError(f"expected a split among {', '.join(PHOTOGRAPHS)}, got {split!r}")
        if num_triplets < 1:
            raise LipsimError(f"expected num_triplets of at least 1, got {num_triplets}")
        if image_size < MIN_IMAGE_SIZE:
            raise LipsimError(f"expected an image_size of at least {MIN_IMAGE_SIZE} pixels, got {image_size}")
        if not 0 <= photograph_share <= 1:
            raise LipsimError(f"expected a photograph_share in [0, 1], got {photograph_share}")
        if seed < 0:
            raise LipsimError(f"expected a seed of at least 0, got {seed}")
        if num_workers < 0:
            raise LipsimError(f"expected num_workers of at least 0, got {num_workers}")
        self.split = split
        recipes = _Recipes(split, num_triplets, image_size, photograph_share, seed)
        rendered = _cached(recipes)
        rendered.complete(num_workers, progress)
        self.images = rendered.images
        self.right_vote = rendered.right_vote
        self.moves = rendered.moves
        self.is_photograph = rendered.is_photograph
        self.preprocess: Preprocess | None = None
        self.groups: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.right_vote)

    def manifest(self) -> list[str]:
        """No lines: the images say it all."""
        return []

    def __getitem__(self, index: int) -> Triplet:
        """One triplet: images ``(3, H, W)`` float32 in [0, 1], scalar vote and index."""
        index = range(len(self))[index]  # IndexError past the end, and negative indices count from it
        reference, left, right = self.images[index].float() / 255
        return Triplet(reference, left, right, self.right_vote[index], torch.tensor(index))


@dataclass(frozen=True)
class _Recipes(Dataset[tuple[Tensor, Tensor]]):
    """The chunks of a set to render, as a data set, so that a ``DataLoader`` can spread them over processes.

    Its fields name the set completely, so it is its key in the cache as well.
    """

    split: Split
    num_triplets: int
    image_size: int
    photograph_share: float
    seed: int

    def __len__(self) -> int:
        return math.ceil(self.num_triplets / _RENDER_CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Images ``(n, 3, 3, H, W)`` uint8 and a table ``(n, 4)`` of right vote, both moves, and whether photograph."""
        if not 0 <= chunk < len(self):
            raise IndexError(chunk)
        images, rows = [], []
        for index in range(chunk * _RENDER_CHUNK, min((chunk + 1) * _RENDER_CHUNK, self.num_triplets)):
            recipe = sample_recipe(self.split, index, photograph_share=self.photograph_share, seed=self.seed)
            images.append(render_recipe(recipe, self.image_size))
            is_photograph = isinstance(recipe.reference, PhotographParameters)
            rows.append((recipe.right_vote, recipe.left_move, recipe.right_move, float(is_photograph)))
        return torch.from_numpy(np.stack(images)), torch.tensor(rows, dtype=torch.float32)


class _Rendered:
    """The images of a set, rendered on first demand."""

    def __init__(self, recipes: _Recipes) -> None:
        self.recipes = recipes
        self.is_complete = False
        size = recipes.image_size
        self.images = torch.empty(recipes.num_triplets, 3, 3, size, size, dtype=torch.uint8)
        self.table = torch.empty(recipes.num_triplets, 4, dtype=torch.float32)

    def complete(self, num_workers: int, progress: Callable[[int], None] | None) -> None:
        """Render what is missing; an interrupted call starts again."""
        if self.is_complete:
            return
        start = 0
        # With its own generator, since a loader draws from torch's and what is cached must not change a training.
        loader = DataLoader(self.recipes, batch_size=None, num_workers=num_workers, generator=torch.Generator())
        for images, table in loader:
            stop = start + len(images)
            self.images[start:stop], self.table[start:stop] = images, table
            start = stop
            if progress is not None:
                progress(len(images))
        self.is_complete = True

    @property
    def right_vote(self) -> Tensor:
        return self.table[:, 0]

    @property
    def moves(self) -> Tensor:
        return self.table[:, 1:3]

    @property
    def is_photograph(self) -> Tensor:
        return self.table[:, 3].bool()


@functools.lru_cache(maxsize=8)  # train, val and test of a stage or two; the stages of a run share them
def _cached(recipes: _Recipes) -> _Rendered:
    return _Rendered(recipes)
