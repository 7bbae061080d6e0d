"""pNLP-Mixer's projection: an input without an embedding table (Fusco et al., arXiv 2202.04350).

    f_i(token) = min over x of h_i(x),  x a character trigram of the token, or the whole; 0 <= i < n
    C[j]       = the number of i with f_i = j modulo m, a counting Bloom filter;          0 <= j < m
    e_t        = LN([C of token t-w | ... | C of token t]) W'

h_i(x) is the i-th word of 32 bits, little endian, of SHAKE-128 of x in UTF-8: the same on every
machine, and for every n. A token is its string in the tokenizer's vocabulary. In front of a
sequence C is 0.

What is kept of a token is f_i modulo m, `fingerprints` <int32>[V, n], which follows from the
tokenizer's strings: a buffer, saved with the model, so that a checkpoint's table wins over the
tokenizer's and a model is whole without it. It takes 4 n V bytes: an int16 would do, but
neither gloo nor NCCL sends that, as --ckpt-fully-parallel-load does. LN and W <float>[D, (w+1) m]
are trained.

The source looks w tokens to both sides; a language model looks back only. The source hashes the
trigrams of a word and, of the pieces that go on in a word, the whole alone; here every token has
both, and its mixer's bottleneck is W, whose output is the residual stream.

Tensor parallelism: every rank has all of it, as it has learned positions; only the output layer is
split. Pipeline parallelism: it is on the first stage, as an embedding is.

Letters: B batch, T tokens, D hidden, V padded vocabulary, n values of a fingerprint, m counters of
the filter, w tokens of the window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional


def check_flags(args: Any) -> None:
    """Check the window of the projection.

    Raises:
        ValueError: see the messages.
    """
    if args.window >= args.seq_length:
        raise ValueError(
            f"--window {args.window} looks back over more than the --seq-length {args.seq_length} "
            "tokens of a sample: give a smaller one."
        )


def fingerprints(
    tokens: Iterable[tuple[int, bytes]], *, num_ids: int, hash_count: int, filter_size: int
) -> Tensor:
    """Make the table of a tokenizer.

    Args:
        tokens: id and string of each token; bytes that are not UTF-8 are characters of their own.
        num_ids: V; an id without a token, which no text has, gets the fingerprint of "".

    Returns:
        <int32>[V, n], numbers of counters.
    """
    hashed: dict[str, NDArray[np.uint32]] = {}
    table = np.empty((num_ids, hash_count), dtype=np.int32)
    table[:] = _hashes("", hash_count) % filter_size
    for number, token in tokens:
        pieces = set(_pieces(token.decode("utf-8", errors="surrogateescape")))
        for piece in pieces - hashed.keys():
            hashed[piece] = _hashes(piece, hash_count)
        table[number] = np.minimum.reduce([hashed[piece] for piece in pieces]) % filter_size
    return torch.from_numpy(table)


def _pieces(token: str) -> Iterator[str]:
    """Yield the whole, and its character trigrams."""
    yield token
    for start in range(len(token) - 2):
        yield token[start : start + 3]


def _hashes(piece: str, count: int) -> NDArray[np.uint32]:
    """<uint32>[n] of a string."""
    digest = hashlib.shake_128(piece.encode("utf-8", errors="surrogateescape")).digest(4 * count)
    return np.frombuffer(digest, dtype="<u4")


class MinHashProjection(MegatronModule):
    """See the top of the file. Token ids in the place of Megatron's word embeddings.

    Args:
        vocab_size: V.
        device: of its parameters.
    """

    def __init__(self, config: TransformerConfig, *, vocab_size: int, device: torch.device) -> None:
        super().__init__(config)
        options: Any = config
        self.filter_size, self.window = options.filter_size, options.window
        num_features = (self.window + 1) * self.filter_size
        empty = torch.zeros(vocab_size, options.hash_count, dtype=torch.int32, device=device)
        self.register_buffer("fingerprints", empty)
        where: dict[str, Any] = {"device": device, "dtype": config.params_dtype}
        self.norm = nn.LayerNorm(num_features, eps=config.layernorm_epsilon, **where)
        self.proj = nn.Linear(num_features, config.hidden_size, bias=False, **where)
        self.proj.weight.is_embedding_or_output_parameter = True  # for --decoupled-lr
        if config.perform_initialization:
            # Normalised features have variance 1: embeddings start as large as those of a table.
            nn.init.normal_(self.proj.weight, std=config.init_method_std / math.sqrt(num_features))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: <int64>[B, T] -> <float>[B, T, D]."""
        return self.proj(self.norm(self.features(ids)))

    def features(self, ids: Tensor) -> Tensor:
        """ids: <int64>[B, T] -> <float>[B, T, (w+1) m], the counters of the window's tokens."""
        values = self.fingerprints[ids].long()
        # Of no parameter: that would read one before --overlap-param-gather has brought it.
        shape, dtype = (*ids.shape, self.filter_size), self.norm.weight.dtype
        counters = torch.zeros(shape, dtype=dtype, device=ids.device)
        counters.scatter_add_(2, values, counters.new_ones(()).expand(values.shape))
        padded = functional.pad(counters, (0, 0, self.window, 0))
        length = ids.shape[1]
        return torch.cat([padded[:, i : i + length] for i in range(self.window + 1)], dim=2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Save the table, which another layout may pad to another length: no id lies in the
        padding."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        for name, entry in state.items():
            if name.endswith(".fingerprints"):
                entry.allow_shape_mismatch = True
        return state


def replace_embedding(model: Any) -> MinHashProjection | None:
    """Put the projection in the place of a model's word embeddings, its table all 0.

    Returns:
        it, or None where the model, or this stage of it, has none.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is None or getattr(model.config, "input_projection", "embedding") != "minhash":
        return None
    projection = MinHashProjection(
        model.config,
        vocab_size=embedding.vocab_size,
        device=embedding.word_embeddings.weight.device,
    )
    embedding.word_embeddings = projection
    # Only Megatron's own reduces over ranks and scatters over the sequence in one step.
    embedding.reduce_scatter_embeddings = False
    return projection
