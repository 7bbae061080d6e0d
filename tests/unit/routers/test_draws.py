"""Draws match the hash of seed, sample, layer and position, in plain integers."""

import torch

from megatron_smlp.routers.draws import sample_keys, uniform

CPU = torch.device("cpu")
WORD = 1 << 64


def hashed(value: int) -> int:
    """Return SplitMix64's next number from this state, in Python's unbounded integers."""
    value = (value + 0x9E3779B97F4A7C15) % WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def test_it_is_the_hash_of_all_coordinates():
    assert hashed(0) == 0xE220A8397B1DCDAF, "as published"
    keys = sample_keys(seed=7, first=1000, count=3, device=CPU)
    drawn = uniform(keys, layer=5, positions=4).view(4, 3)
    for position in range(4):
        for number in range(3):
            key = hashed(hashed(7) + 1000 + number)
            bits = hashed(hashed(key + 5) + position) >> 40
            assert drawn[position, number].item() == bits / 2**24
