"""Draws match the hash in plain integers, and do not depend on the micro-batches."""

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


def test_a_samples_numbers_do_not_depend_on_its_micro_batch():
    whole = uniform(sample_keys(seed=3, first=8, count=4, device=CPU), layer=2, positions=5)
    halves = [
        uniform(sample_keys(seed=3, first=first, count=2, device=CPU), layer=2, positions=5)
        for first in (8, 10)
    ]
    together = torch.cat([half.view(5, 2) for half in halves], dim=1)
    assert torch.equal(whole.view(5, 4), together)
