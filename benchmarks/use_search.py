"""Certified search against the plain matrix product it cannot do without, on one thread.

    python benchmarks/use_search.py

100,000 embeddings of 256 features are searched for the five nearest of one query and of 32, with the radius of each
rank and of the set, exact over all of them (:func:`lipsim.certificates.ranking.rank`). The product is ``z @ gallery.T``
in float32 of the same numbers. Both alternate, and medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lipsim.certificates.gallery import Gallery
from lipsim.certificates.ranking import rank

ITEMS, FEATURES, NEAREST = 100_000, 256, 5
QUERIES = (1, 32)
ROUNDS = 15


def search_ratio(
    items: int = ITEMS, features: int = FEATURES, rounds: int = ROUNDS, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Seconds of the product and of the search, and their ratio, by the number of queries: medians of rounds.

    Returns:
        ``product_N``, ``search_N`` in seconds and ``ratio_N`` for N queries.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draw = torch.Generator().manual_seed(0)
        stored = torch.randn(items, features, generator=draw).to(device)
        gallery = Gallery(stored)
        found: dict[str, float] = {}
        for count in QUERIES:
            z = torch.randn(count, features, generator=draw).to(device)
            product, search = _medians(
                rounds,
                lambda z=z: z @ stored.T,
                lambda z=z: rank(z, gallery, k=NEAREST, feature_error=1e-5),
            )
            found |= {f"product_{count}": product, f"search_{count}": search, f"ratio_{count}": search / product}
        return found
    finally:
        torch.set_num_threads(threads)


def _medians(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call; they take turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


if __name__ == "__main__":
    for name, value in search_ratio().items():
        print(f"{name}: {value:.4g}")
