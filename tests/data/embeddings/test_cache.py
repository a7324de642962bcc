"""The embedding cache on made-up shards: what it finds, what it gives back, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lipsim.data.embeddings.cache import CacheDescription, EmbeddingCache, teacher_fingerprint, write_shard
from lipsim.data.embeddings.folder import EmbeddedFolder, EmbeddedImages
from lipsim.data.sets.folder import FolderImages, list_images
from lipsim.teachers import SmallViT

NAMES = [f"train/{c}/{i}.png" for c in ("a", "b") for i in range(5)]
DESCRIPTION = CacheDescription("f" * 64, "SmallViT", 3, 8, None, ("plain", "flip"), "float16", "float32")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache in ``cache`` of ten noise images in ``images``; image i has embeddings (i, view, 0.5)."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).save(file)
    DESCRIPTION.write(tmp_path / "cache")
    for number, part in ((0, [0, 3, 9, 2]), (2, [1, 8, 7]), (1, [4, 5, 6])):  # any order, in and among shards
        _write(tmp_path, number, part)
    return tmp_path


def _write(root: Path, number: int, part: list[int]) -> None:
    embeddings = np.array([[(i, view, 0.5) for view in range(2)] for i in part], dtype=np.float16)
    digests = [hashlib.sha256((root / "images" / NAMES[i]).read_bytes()).digest() for i in part]
    sha256 = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    write_shard(root / "cache", number, [NAMES[i].encode() for i in part], sha256, embeddings)


def _images(root: Path, *views: str, image_size: int = 8, short_side: int | None = None) -> FolderImages:
    return FolderImages(root / "images" / "train", image_size, short_side=short_side, views=views or ("plain",))


def test_every_image_is_found_by_its_path(root: Path) -> None:
    cache = EmbeddingCache(root / "cache")
    assert cache.description == DESCRIPTION and len(cache) == 10
    assert [bytes(path).decode() for path in cache.paths] == sorted(NAMES)
    assert list_images(root / "images").names.tolist() == cache.paths.tolist()
    asked = np.array([b"train/b/3.png", b"train/a", b"train/a/0.png", b"val/a/0.png", b"train/b/99.png"])
    rows = cache.find(asked)
    assert rows.tolist() == [8, -1, 0, -1, -1]
    for i, row in enumerate(cache.find(np.array([name.encode() for name in NAMES]))):
        for view, name in enumerate(("plain", "flip")):
            assert cache.embedding(row, name).tolist() == [i, view, 0.5]
    with pytest.raises(FileNotFoundError, match="no embedding cache at"):
        EmbeddingCache(root / "nowhere")
    DESCRIPTION.write(root / "empty")
    with pytest.raises(FileNotFoundError, match=r"is empty; run lipsim cache-teacher again"):
        EmbeddingCache(root / "empty")


def test_loading_processes_show_an_image_with_the_embedding_of_its_view(root: Path) -> None:
    data = EmbeddedFolder(_images(root, "plain", "flip"), EmbeddingCache(root / "cache"), "train/")
    assert data[0].embedding[0] == 0  # opens a map, which must not travel to a spawned process
    travelled = pickle.loads(pickle.dumps(data.cache))
    assert not travelled._maps and travelled.embedding(3, "flip").tolist() == [3, 1, 0.5]
    plain = [_images(root)[i] for i in range(10)]
    loader = DataLoader(data, 5, num_workers=2, persistent_workers=True)
    flips = 0
    for _ in range(8):
        for number, batch in enumerate(loader):
            assert isinstance(batch, EmbeddedImages)
            for i, (image, embedding) in enumerate(zip(*batch, strict=True)):
                view, original = int(embedding[1]), plain[5 * number + i]
                assert embedding.tolist() == [5 * number + i, view, 0.5]
                assert torch.equal(image, original.flip(2) if view else original)
                flips += view
    assert 20 < flips < 60


def test_more_shards_than_may_be_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsim.data.embeddings.cache._OPEN_SHARDS", 2)
    cache = EmbeddingCache(root / "cache")
    for _ in range(2):
        assert [int(cache.embedding(row, "flip")[0]) for row in range(10)] == list(range(10))
    assert len(cache._maps) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 6}, "under CentralCrop.image_size=8, short_side=None., the data has CentralCrop.image_size=6"),
        (
            {"short_side": 9},
            "the data has CentralCrop.image_size=8, short_side=9.; set image_size and short_side of the data alike",
        ),
    ],
)
def test_another_transform_is_refused(root: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddedFolder(_images(root, **change), EmbeddingCache(root / "cache"), "train/")


def test_lacking_views_and_images_are_refused(root: Path) -> None:
    replace(DESCRIPTION, views=("plain",)).write(root / "cache")
    with pytest.raises(ValueError, match=r"has the views plain and lacks flip; leave them out of data\.views"):
        EmbeddedFolder(_images(root, "plain", "flip"), EmbeddingCache(root / "cache"), "train/")
    DESCRIPTION.write(root / "cache")
    for name in ("c/1.png", "a/10.png"):
        file = root / "images" / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((root / "images" / NAMES[0]).read_bytes())
    with pytest.raises(ValueError, match=r"2 of 12 images in .* \(first: train/a/10\.png\); run .* what is missing"):
        EmbeddedFolder(_images(root), EmbeddingCache(root / "cache"), "train/")
    with pytest.raises(ValueError, match="12 of 12 images"):  # the cache of another folder
        EmbeddedFolder(_images(root), EmbeddingCache(root / "cache"), "val/")


def test_changed_images_are_refused_at_once_and_when_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(root / "cache")
    data = EmbeddedFolder(_images(root), cache, "train/")
    changed = root / "images" / NAMES[8]
    Image.new("RGB", (9, 10)).save(changed)
    message = r"b/3\.png is not the image whose embedding is in .*; restore it, or delete shard-00002\.index\.npy"
    with pytest.raises(ValueError, match=message):
        data[8]
    with pytest.raises(ValueError, match=message):
        EmbeddedFolder(_images(root), cache, "train/")
    monkeypatch.setattr("lipsim.data.embeddings.folder.CHECKED_FILES", 2)  # the first and the last
    assert len(EmbeddedFolder(_images(root), cache, "train/")) == 10


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: _flip_a_bit(folder / "shard-00001.npy"),
            "the embedding of train/b/1.png is not what was written",
        ),
        (lambda folder: (folder / "shard-00001.npy").unlink(), "No such file"),
        (lambda folder: (folder / "shard-00001.npy").write_bytes(b"\x93NUMPY"), "shard 1 of the cache"),
        (
            lambda folder: np.save(folder / "shard-00001.npy", np.zeros((3, 2, 3))),
            "expected float16 (3, 2, 3), got float64",
        ),
        (lambda folder: (folder / "shard-00001.index.npy").write_bytes(b"no index"), "shard 1 of the cache"),
        (lambda folder: np.save(folder / "shard-00001.index.npy", np.zeros(3)), "unknown columns"),
    ],
)
def test_damaged_shards_are_named(root: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(root / "cache")
    with pytest.raises(ValueError) as error:
        cache = EmbeddingCache(root / "cache")
        for row in range(10):
            cache.embeddings(row)
    assert message in str(error.value) and "delete shard-00001.index.npy there and run" in str(error.value)


def test_caches_of_version_1_are_read(root: Path) -> None:
    """What is now the short side was called resize."""
    file = root / "cache" / "cache.json"
    for short_side in (None, 9):
        content = json.loads(file.read_text()) | {"version": 1, "resize": short_side}
        content.pop("short_side")
        file.write_text(json.dumps(content))
        cache = EmbeddingCache(root / "cache")
        assert cache.description == replace(DESCRIPTION, short_side=short_side)
        EmbeddedFolder(_images(root, short_side=short_side), cache, "train/")
        with pytest.raises(ValueError, match="set image_size and short_side of the data alike"):
            EmbeddedFolder(_images(root, short_side=5), cache, "train/")
        cache.description.write(root / "cache")  # as adding to it does
        assert json.loads(file.read_text())["version"] == 3
        assert EmbeddingCache(root / "cache").description.short_side == short_side


def test_unreadable_descriptions(root: Path) -> None:
    file = root / "cache" / "cache.json"
    content = json.loads(file.read_text())
    for change in (
        {"version": 4},
        {"format": "something"},
        {"views": ["plain", "upside down"]},
        {"dtype": "int8"},
        {"more": 1},
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match="make the cache again"):
            EmbeddingCache(root / "cache")
    file.write_text("{")
    with pytest.raises(ValueError, match="make the cache again"):
        EmbeddingCache(root / "cache")


def test_the_fingerprint_of_a_teacher_is_of_weights_and_architecture() -> None:
    teacher = SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    other = SmallViT(16, patch_size=8, width=12, depth=1, heads=3)
    other.load_state_dict(teacher.state_dict())
    assert teacher_fingerprint(teacher) != teacher_fingerprint(other)
    found = teacher_fingerprint(teacher)
    assert found == teacher_fingerprint(teacher.eval()) and len(found) == 64
    with torch.no_grad():
        next(teacher.parameters()).flatten()[3] += 1e-6
    assert teacher_fingerprint(teacher) != found
