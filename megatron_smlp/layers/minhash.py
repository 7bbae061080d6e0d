"""pNLP-Mixer's projection: an input without an embedding table (Fusco et al., arXiv 2202.04350).

    f_i(token) = min over x of h_i(x),  x a character trigram of the token, or the whole; 0 <= i < n
    C[j]       = the number of i with f_i = j modulo m, a counting Bloom filter;          0 <= j < m
    e_t        = LN([C of token t-w | ... | C of token t]) W'

h_i(x) is the i-th 32-bit little-endian word of SHAKE-128 of x in UTF-8: the same on every machine,
and for every n. A token is its string in the tokenizer's vocabulary. Before the first token of a
sequence C is 0.

Of each token only f_i modulo m is kept: `fingerprints` <int32>[V, n], computed from the tokenizer's
strings. It is a buffer saved with the model, so that a checkpoint's table overrides the tokenizer's
and a model is complete without one. It takes 4 n V bytes; int16 would be wide enough, but neither
gloo nor NCCL can send it, which --ckpt-fully-parallel-load needs. LN and W <float>[D, (w+1) m] are
trained.

The source looks w tokens to both sides; a language model looks back only. The source hashes the
trigrams of a word, but a piece that continues a word only as a whole; here every token has both.
The bottleneck of the source's mixer is W here, whose output is the residual stream.

Tensor parallelism: every rank holds all of it, like learned positions; only the output layer is
sharded. Pipeline parallelism: it is on the first stage, like an embedding.

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
    """Check that the projection's window is shorter than a sample.

    Raises:
        ValueError: it is not.
    """
    if args.window >= args.seq_length:
        raise ValueError(f"--window {args.window} must be below --seq-length {args.seq_length}.")


def fingerprints(
    tokens: Iterable[tuple[int, bytes]], *, num_ids: int, hash_count: int, filter_size: int
) -> Tensor:
    """Build the table of a tokenizer.

    Args:
        tokens: id and string of each token; a byte that is not UTF-8 counts as a character.
        num_ids: V; an id without a token, which occurs in no text, gets the fingerprint of "".

    Returns:
        <int32>[V, n], indices of counters.
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
    """Yield the whole token and its character trigrams."""
    yield token
    for start in range(len(token) - 2):
        yield token[start : start + 3]


def _hashes(piece: str, count: int) -> NDArray[np.uint32]:
    """Return h_i of a string: <uint32>[n]."""
    digest = hashlib.shake_128(piece.encode("utf-8", errors="surrogateescape")).digest(4 * count)
    return np.frombuffer(digest, dtype="<u4")


class MinHashProjection(MegatronModule):
    """Replaces Megatron's word embeddings; see the top of the file.

    Args:
        vocab_size: V.
        device: where its parameters live.
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
            # Normalized features have variance 1, so embeddings start as large as a table's.
            spread = config.embedding_init_method_std
            nn.init.normal_(self.proj.weight, std=spread / math.sqrt(num_features))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: <int64>[B, T] -> <float>[B, T, D]."""
        return self.proj(self.norm(self.features(ids)))

    def features(self, ids: Tensor) -> Tensor:
        """ids: <int64>[B, T] -> <float>[B, T, (w+1) m], the counters of the window's tokens."""
        values = self.fingerprints[ids].long()
        # Not made from a parameter: that would read one before --overlap-param-gather delivers it.
        shape, dtype = (*ids.shape, self.filter_size), self.norm.weight.dtype
        counters = torch.zeros(shape, dtype=dtype, device=ids.device)
        counters.scatter_add_(2, values, counters.new_ones(()).expand(values.shape))
        padded = functional.pad(counters, (0, 0, self.window, 0))
        length = ids.shape[1]
        return torch.cat([padded[:, i : i + length] for i in range(self.window + 1)], dim=2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Allow another layout to pad the table to another length: no id lies in the padding."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        for name, entry in state.items():
            if name.endswith(".fingerprints"):
                entry.allow_shape_mismatch = True
        return state


def replace_embedding(model: Any) -> MinHashProjection | None:
    """Replace a model's word embeddings with the projection, its table all zeros.

    Returns:
        The projection, or None where the model, or this stage of it, has none.
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
    # Only Megatron's own can reduce over ranks and scatter over the sequence in one step.
    embedding.reduce_scatter_embeddings = False
    return projection
