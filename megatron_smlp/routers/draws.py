"""Random numbers that depend only on what they are drawn for, not on a generator's state.

    u = hash(seed, sample, layer, position) / 2^24        24 bits of the hash, so 0 <= u < 1

A sample's number is its index in the order in which the run reads its data, whatever micro-batch
and rank it lands on. So a token's draw is the same in every layout, after a resume, and when a
layer is recomputed, without communication. The hash is the finalizer of SplitMix64 (Steele, Lea,
Flood 2014), applied once per coordinate.

Letters: B samples, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 24
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def sample_keys(*, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return <int64>[B] for the samples `first` ... `first` + B - 1 of a run, B = count."""
    numbers = torch.arange(first, first + count, device=device)
    return _hashed(_hashed(torch.full_like(numbers, seed)) + numbers)


def uniform(keys: Tensor, *, layer: int, positions: int) -> Tensor:
    """keys: <int64>[B] -> <fp32>[T * B] in [0, 1), ordered by position, then by sample."""
    key = _hashed(keys + layer)
    places = torch.arange(positions, device=keys.device)[:, None]
    bits = _shifted(_hashed(key + places), 64 - _BITS)
    return (bits.float() / 2**_BITS).flatten()


def _hashed(values: Tensor) -> Tensor:
    """Hash <int64> of any shape; products and sums are modulo 2^64."""
    values = values + _signed(_STEP)
    values = (values ^ _shifted(values, 30)) * _signed(_FACTORS[0])
    values = (values ^ _shifted(values, 27)) * _signed(_FACTORS[1])
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift to the right, treating the number as unsigned."""
    return (values >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """Return the int64 with the same 64 bits."""
    return word - (1 << 64)
