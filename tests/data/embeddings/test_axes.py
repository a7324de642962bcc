"""Principal axes of cached embeddings, against the singular vectors of the matrix of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lipsim.data.embeddings import axes
from lipsim.data.embeddings.axes import principal_axes
from lipsim.data.embeddings.cache import CacheDescription, EmbeddingCache, write_shard


def _cache(folder: Path, embeddings: np.ndarray, names: list[str]) -> EmbeddingCache:
    views = ("plain", "flip")[: embeddings.shape[1]]
    CacheDescription("f" * 64, "Vit", embeddings.shape[2], 8, None, views, "float32", "float32").write(folder)
    digests = np.zeros((len(names), 32), np.uint8)
    write_shard(folder, 0, [name.encode() for name in names], digests, embeddings.astype(np.float32))
    return EmbeddingCache(folder)


@pytest.fixture
def embeddings() -> np.ndarray:
    """Forty images, two views, six features of falling size about a mean that is not 0."""
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 1, (40, 2, 6)) * np.array([3, 2, 1.5, 1, 0.5, 0.2])


def test_axes_are_those_of_the_training_embeddings_without_their_mean(embeddings: np.ndarray, tmp_path: Path) -> None:
    names = [f"{'val' if i % 4 == 3 else 'train'}/{i:02d}.png" for i in range(40)]
    found = principal_axes(_cache(tmp_path, embeddings, names), 3)
    train = embeddings[[i for i in range(40) if i % 4 != 3]].reshape(-1, 6)
    expected = np.linalg.svd(train)[2][:3].T
    assert found.shape == (6, 3) and found.dtype == torch.float32
    cosines = (found.numpy() * expected).sum(0)
    assert np.allclose(np.abs(cosines), 1, atol=1e-5)
    assert torch.allclose(found.T @ found, torch.eye(3), atol=1e-6)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())

    def loss(projection: np.ndarray) -> float:
        coordinates = train @ projection
        return float(np.square(coordinates @ coordinates.T - train @ train.T).sum())

    centred = np.linalg.svd(train - train.mean(0))[2][:3].T
    assert loss(found.double().numpy()) <= loss(expected) * (1 + 1e-6) < loss(centred)


def test_a_large_cache_is_sampled_evenly(
    embeddings: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = _cache(tmp_path, embeddings, [f"{i:02d}.png" for i in range(40)])  # no train/: all count
    whole = principal_axes(cache, 2)
    assert np.allclose(
        np.abs(whole.numpy().T @ np.linalg.svd(embeddings.reshape(-1, 6))[2][:2].T), np.eye(2), atol=1e-5
    )
    monkeypatch.setattr(axes, "MAX_ROWS", 14)
    some = principal_axes(cache, 2)
    expected = np.linalg.svd(embeddings[::3].reshape(-1, 6))[2][:2].T  # 0, 3, …, 39
    assert np.allclose(np.abs((some.numpy() * expected).sum(0)), 1, atol=1e-5)
    for count in (0, 7):
        with pytest.raises(ValueError, match=r"number of axes|at most 6 axes of 28 embeddings of 6 features"):
            principal_axes(cache, count)
