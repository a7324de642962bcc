"""Random numbers by key: those of the published generator, whatever asks for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipsim.utils.sampling import cpu_seed, key_uniform, sample_stream, subkey, subkeys


def test_keys_are_the_outputs_of_splitmix64() -> None:
    """The five numbers of the seed 1234567 in the test of its page on rosettacode.org, from the authors' own code."""
    published = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    assert [key % 2**64 for key in subkeys(1234567, torch.arange(5)).tolist()] == published
    assert [subkey(1234567, number) % 2**64 for number in range(5)] == published
    assert subkey(1234567 - 2**64, 2) == subkey(1234567 + 2**64, 2) == int(subkeys(1234567, 2))
    keys = subkeys(-7, torch.arange(50))
    assert subkeys(keys, 3).tolist() == [subkey(key, 3) for key in keys.tolist()]


def test_numbers_are_uniform_and_one_by_one() -> None:
    keys = subkeys(3, torch.arange(20_000))
    numbers = key_uniform(keys, 4)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    ordered = numbers.double().sort(0).values
    # Kolmogorov and Smirnov: 1.95/√N at a level of 0.001.
    assert (ordered - torch.linspace(0, 1, 20_000, dtype=torch.float64).unsqueeze(1)).abs().max() < 1.95 / 20_000**0.5
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 4 / 20_000**0.5
    assert torch.corrcoef(torch.stack([numbers[1:, 0], numbers[:-1, 0]]))[0, 1].abs() < 4 / 20_000**0.5
    assert torch.equal(key_uniform(keys[[7, 5]], 2), numbers[[7, 5], :2])


def test_streams_are_of_seed_and_index() -> None:
    """Also of numbers beyond 32 bits, whose words stand in one row; those below have the draws they always had."""
    pairs = [
        (5, 7),
        (5, 2**32 + 7),
        (5 + 7 * 2**32, 1),
        (5 + 7 * 2**32, 0),
        (7, 5),
        (5, 7 * 2**32),
        (5 + 7 * 2**32, 2**32),
    ]
    draws = {sample_stream(*pair).standard_normal() for pair in pairs}
    assert len(draws) == len(pairs)
    assert sample_stream(5, 7).standard_normal() == np.random.default_rng([5, 7]).standard_normal()
    assert sample_stream(5, 2**40).standard_normal() == np.random.default_rng([5, 2**40]).standard_normal()


def test_a_seed_of_the_cpu_leaves_all_generators_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(7)
    following = torch.rand(3)
    torch.manual_seed(7)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with cpu_seed(5):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), following) and not seeded
    torch.manual_seed(7)
    assert seeded == [7]  # what it must not do
