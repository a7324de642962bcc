"""Random numbers by key: those of the published generator, whatever asks for them."""

from __future__ import annotations

import torch

from lipsim.utils.sampling import key_of, key_uniform, subkeys


def test_keys_are_the_outputs_of_splitmix64() -> None:
    """The five numbers of the seed 1234567 in the test of its page on rosettacode.org, from the authors' own code."""
    published = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    assert [int(key) % 2**64 for key in subkeys(key_of(1234567), torch.arange(5))] == published
    assert int(subkeys(key_of(1234567), 4)) % 2**64 == published[4]
    assert torch.equal(subkeys(key_of(1234567 - 2**64), 2), subkeys(key_of(1234567 + 2**64), 2))


def test_numbers_are_uniform_and_one_by_one() -> None:
    keys = subkeys(key_of(3), torch.arange(20_000))
    numbers = key_uniform(keys, 4)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    ordered = numbers.double().sort(0).values
    # Kolmogorov and Smirnov: 1.95/√N at a level of 0.001.
    assert (ordered - torch.linspace(0, 1, 20_000, dtype=torch.float64).unsqueeze(1)).abs().max() < 1.95 / 20_000**0.5
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 4 / 20_000**0.5
    assert torch.corrcoef(torch.stack([numbers[1:, 0], numbers[:-1, 0]]))[0, 1].abs() < 4 / 20_000**0.5
    assert torch.equal(key_uniform(keys[[7, 5]], 2), numbers[[7, 5], :2])
