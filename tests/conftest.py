"""Shared fixtures: reproducible random features and images, small enough for CPU."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lipsim.data import Triplet
from lipsim.data.embeddings.cache import CacheDescription, write_shard
from lipsim.data.sets.bapps import SUBSETS
from lipsim.utils import progress

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
# Lightning 2.6 makes calls that jsonargparse 4 deprecates; see the bound in pyproject.toml.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# A busy machine takes two seconds for anything, and an error is to be one line: tests of progress set their own time.
progress._FIRST = 3600.0
# No deadlines: the first call of a torch function on a busy machine takes as long as it takes.
hypothesis.settings.register_profile("lipsim", deadline=None)
hypothesis.settings.load_profile("lipsim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage is measured on the first case of each test: to trace them all takes a quarter of the time of a run."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in seen:
            item.add_marker(pytest.mark.no_cover)
        seen.add(test)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor]:
    """Reference, left and right, ``(64, 6)`` float64, of norms from well below to well above 1."""
    scale = torch.logspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    z, z0, z1 = (scale * torch.randn(64, 6, dtype=torch.float64) for _ in range(3))
    return z, z0, z1


@pytest.fixture
def triplets() -> Triplet:
    """Twelve random 16-pixel triplets with votes, two of them tied."""
    votes = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.5, 0.4, 0.6, 1.0, 0.0, 0.5, 0.9, 0.1])
    images = [torch.rand(12, 3, 16, 16) for _ in range(3)]
    return Triplet(*images, votes, torch.arange(12))


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """A folder in the layout of NIGHTS, columns in another order: grey tiles, of which the nearer grey won.

    Twelve rows a split, every third with too few votes; two of three references of ImageNet. As in the original, one
    ``right_path`` names the ``_0.png`` file.
    """
    root, rng = tmp_path / "nights", np.random.default_rng(0)
    lines = ["right_vote,left_vote,id,prompt,votes,split,is_imagenet,right_path,left_path,ref_path"]
    for number in range(36):
        folder, name = f"{number // 10:03d}", f"{number % 10:03d}"
        right, reversed_names = int(rng.integers(2)), int(number == 4)
        paths = [f"ref/{folder}/{name}.png", *(f"distort/{folder}/{name}_{k ^ reversed_names}.png" for k in (0, 1))]
        grey, near, far = 60 + number, 70 + number, 160 + number
        for path, level in zip(paths, (grey, *((far, near) if right else (near, far))), strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(level - 9, level + 9, (48, 48, 3), dtype=np.uint8)).save(root / path)
        split, votes = ("train", "val", "test")[number // 12], 5 if number % 3 == 1 else 6 + number % 5
        row = [right, 1 - right, number, '"a word, and more"', votes, split, number % 4 != 0, *paths[::-1]]
        lines.append(",".join(map(str, row)))
    (root / "data.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """A folder in the layout of Material: 100 noise images of 20 pixels and 6,000 answers, every tenth a tie."""
    root, rng = tmp_path / "material", np.random.default_rng(0)
    images = root / "data" / "havran1_ennis_298x298_LDR"
    images.mkdir(parents=True)
    for number in range(100):
        noise = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{number:03d}.jpg")
    answers = [rng.permutation(100)[:3].tolist() for _ in range(6000)]
    agreement = [[4, 1] if i % 10 else [2, 2] for i in range(6000)]
    untied = [i for i in range(6000) if i % 10]
    content = {
        "answers": answers,
        "agreement": agreement,
        "answers_diff": [answers[i] for i in untied],
        "agreement_diff": [agreement[i] for i in untied],
    }
    for part in ("train", "test"):
        (root / "data" / f"answers_processed_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def bapps(tmp_path: Path) -> Path:
    """A folder in the layout of BAPPS 2AFC: six noisy patches a subset, judgements as fractions of five."""
    root, rng = tmp_path / "bapps", np.random.default_rng(0)
    for part, subsets in SUBSETS.items():
        for subset in subsets:
            folder = root / "2afc" / part / subset
            for kind in ("ref", "p0", "p1", "judge"):
                (folder / kind).mkdir(parents=True)
            for number in range(6):
                for kind in ("ref", "p0", "p1"):
                    patch = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                    Image.fromarray(patch).save(folder / kind / f"{number:06d}.png")
                vote = np.float64(0.5 if number == 5 else rng.integers(6) / 5)
                np.save(folder / "judge" / f"{number:06d}.npy", vote if number % 2 else vote[None])
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder of three classes: noisy tiles of a colour each, wider than high; 12 to train on, 9 held out."""
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for number, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
            folder = root / part / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                tile = rng.normal(colour, 30, (22, 26, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(tile).save(folder / f"{i}.png")
    return root


@pytest.fixture
def photo_cache(photos: Path, tmp_path: Path) -> Path:
    """A cache of random embeddings, five features and both views, of the images of ``photos`` and their squares."""
    folder, files = tmp_path / "photo_cache", sorted(photos.glob("*/*/*.png"))
    CacheDescription("f" * 64, "Vit", 5, 32, 32, ("plain", "flip"), "float32", "float32").write(folder)
    names = [str(file.relative_to(photos)).encode() for file in files]
    digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    embeddings = np.random.default_rng(0).normal(size=(len(files), 2, 5)).astype(np.float32)
    write_shard(folder, 0, names, np.frombuffer(digests, np.uint8).reshape(-1, 32), embeddings)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of 36 triplets over grey tiles, twelve in each split, two groups: the nearer grey has more votes."""
    root, rng = tmp_path / "study", np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    lines = ["group,reference,right_votes,left_votes,left,right,split,comment"]
    for number in range(36):
        right = int(rng.integers(2))
        levels = {"ref": 60 + number, "near": 75 + number, "far": 160 + number}
        for name, level in levels.items():
            tile = rng.integers(level - 9, level + 9, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(tile).save(root / f"images/{number}-{name}.png")
        sides = ("far", "near") if right else ("near", "far")
        paths = [f"images/{number}-{name}.png" for name in ("ref", *sides)]
        votes = (4, 1) if right else (0, 5)
        split = ("train", "val", "test")[number // 12]
        row = [("noise", "blur")[number % 2], paths[0], *votes, *paths[1:], split, "a word"]
        lines.append(",".join(map(str, row)))
    (root / "triplets.csv").write_text("\n".join(lines) + "\n")
    return root / "triplets.csv"
