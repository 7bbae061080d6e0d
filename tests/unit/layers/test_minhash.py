"""The MinHash projection matches plain loops: the table, the features, gradients."""

import hashlib
from collections import Counter
from typing import Any

import pytest
import torch
from support.in_process import layer_config
from torch import Tensor
from torch.nn import functional

from megatron_smlp.layers.minhash import MinHashProjection, fingerprints

pytestmark = pytest.mark.usefixtures("megatron")

WORDS = ["the", "Ġtheir", "a", "", "Ġ", "über", "日本語だ", "aaaa", "<|endoftext|>"]
TOKENS = [(number, word.encode()) for number, word in enumerate(WORDS)]
UNWRITTEN = len(WORDS)
"""An id without a token."""
HIDDEN = 24


def naive_fingerprint(word: str, count: int) -> list[int]:
    """Return the smallest value of each hash function, as integers."""
    shingles = [word[i : i + 3] for i in range(len(word) - 2)] + [word]
    values = []
    for function in range(count):
        hashes = []
        for shingle in shingles:
            digest = hashlib.shake_128(shingle.encode()).digest(4 * (function + 1))
            hashes.append(int.from_bytes(digest[-4:], "little"))
        values.append(min(hashes))
    return values


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 10), (64, 1024), (100, 32768)])
def test_the_table_is_that_of_a_loop(count: int, size: int):
    table = fingerprints(TOKENS, num_ids=UNWRITTEN + 2, hash_count=count, filter_size=size)
    assert (table.dtype, table.shape) == (torch.int32, (UNWRITTEN + 2, count))
    for number, word in enumerate([*WORDS, "", ""]):
        assert table[number].tolist() == [v % size for v in naive_fingerprint(word, count)], word


def test_values_that_are_written_down():
    """Checkpoints hold these hashes: another function would be another model."""
    table = fingerprints([(0, "Ġtheir".encode())], num_ids=1, hash_count=6, filter_size=1000)
    assert table.tolist() == [[438, 830, 3, 739, 399, 4]]


def test_bytes_that_are_no_text():
    """tiktoken's tokens may end inside a character: each such byte counts as a character."""
    tokens = [(0, b"\xe6"), (1, b"\xe6\x97"), (2, b"ab\xff\xfe"), (3, "日".encode())]
    table = fingerprints(tokens, num_ids=4, hash_count=32, filter_size=4096)
    assert len({tuple(row) for row in table.tolist()}) == 4


def projection(*, window: int = 2, size: int = 10, **options: Any) -> MinHashProjection:
    config = layer_config(
        architecture="mixer",
        input_projection="minhash",
        hash_count=7,
        filter_size=size,
        window=window,
        hidden_size=HIDDEN,
        **options,
    )
    made = MinHashProjection(config, vocab_size=UNWRITTEN, device=torch.device("cpu"))
    made.fingerprints.copy_(fingerprints(TOKENS, num_ids=UNWRITTEN, hash_count=7, filter_size=size))
    return made


def naive(layer: MinHashProjection, ids: Tensor) -> Tensor:
    """LN([C(t-w) | ... | C(t)]) W', a token at a time. ids: <int64>[B, T]."""
    size, window = layer.filter_size, layer.window
    samples = []
    for sample in ids.tolist():
        rows = []
        for t in range(len(sample)):
            features: list[int] = []
            for place in range(t - window, t + 1):
                values = naive_fingerprint(WORDS[sample[place]], 7) if place >= 0 else []
                counts = Counter(value % size for value in values)
                features += [counts[j] for j in range(size)]
            x = torch.tensor(features, dtype=torch.float64)
            normed = (x - x.mean()) / (x.var(unbiased=False) + layer.norm.eps).sqrt()
            rows.append(layer.proj.weight @ (normed * layer.norm.weight + layer.norm.bias))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


@pytest.mark.parametrize(("window", "length"), [(0, 5), (2, 5), (2, 1), (4, 3), (1, 13)])
def test_outputs_and_gradients_are_those_of_a_loop(window: int, length: int):
    layer = projection(window=window).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = torch.randint(len(WORDS), (3, length))
    upstream = torch.randn(3, length, HIDDEN, dtype=torch.float64)
    results = []
    for output in (layer(ids), naive(layer, ids)):
        results.append([output, *torch.autograd.grad(output, list(layer.parameters()), upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_only_the_norm_and_the_projection_are_trained():
    layer = projection()
    assert [name for name, _ in layer.named_parameters()] == [
        *("norm.weight", "norm.bias", "proj.weight")
    ]
    assert functional.one_hot(layer.fingerprints.long(), 10).sum(1).sum(1).tolist() == [7] * 9
    assert "fingerprints" in layer.state_dict()
    half = layer.bfloat16()
    assert half.fingerprints.dtype == torch.int32
    assert half(torch.tensor([[1, 2]])).dtype == torch.bfloat16
