"""Change the number of rows that pad the vocabulary of a source of tensors.

docs/decisions/0034 says what new rows hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Source, Spec

# Tensors with one row per token, in a Megatron checkpoint and its optimizer state, in our Hugging
# Face folders, and in GPT-2's; the output layer comes after the embedding it may be tied to.
EMBEDDINGS = ("embedding.word_embeddings.weight", "model.embed_tokens.weight", "wte.weight")
OUTPUTS = ("output_layer.weight", "lm_head.weight")
TABLES = (".router.table", ".fingerprints")
FINAL_BIASES = ("decoder.final_layernorm.bias", "model.final_norm.bias", "transformer.ln_f.bias")
BLOCK_ROWS = 4096


def padded_size(tokens: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Return the number of rows of the padded vocabulary, by Megatron's rule."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple


class Repadded:
    """A source whose vocabulary is cut or padded to another number of rows.

    Args:
        specs: of all tensors that will be read.
        flags: of the source's model.
        rows: of the new vocabulary, padding included.
    """

    def __init__(
        self, source: Source, specs: Mapping[str, Spec], flags: Mapping[str, Any], *, rows: int
    ) -> None:
        self.source = source
        self.before = specs
        self.tokens: int = flags["vocab_size"]
        self.more = rows - flags["padded_vocab_size"]
        self.specs = {name: self._changed(name, spec) for name, spec in specs.items()}
        self.repeated = self._repeated(flags["padded_vocab_size"]) if self.more > 0 else 0

    def _changed(self, name: str, spec: Spec) -> Spec:
        if not name.endswith(EMBEDDINGS + OUTPUTS + TABLES):
            return spec
        return Spec((spec.shape[0] + self.more, *spec.shape[1:]), spec.dtype)

    def _repeated(self, rows: int) -> int:
        """Return the row that new ones repeat: one of padding, or of the least likely token."""
        if rows > self.tokens:
            return self.tokens
        names = [name for name in self.before if not name.startswith("optimizer.")]
        weights = [name for ends in (OUTPUTS, EMBEDDINGS) for name in names if name.endswith(ends)]
        biases = [name for name in self.before if name in FINAL_BIASES]
        if not weights or not biases:
            return rows - 1
        return least_likely(self.source.read(weights[0]), self.source.read(biases[0]))

    def read(self, name: str, row: int | None = None) -> Tensor:
        spec = self.specs[name]
        if row is not None or spec == self.before[name]:
            return self.source.read(name, row)
        kept = self.source.read(name)[: spec.shape[0]]
        return torch.cat((kept, kept[[self.repeated] * (spec.shape[0] - len(kept))]))


def least_likely(output: Tensor, bias: Tensor) -> int:
    """Return the row with the lowest mean logit.

    output: <float>[V, D] of the output layer; bias: <float>[D] of the final norm.
    """
    parts = output.split(BLOCK_ROWS)  # an fp32 copy of the whole may be too large
    return int(torch.cat([part.float() @ bias.float() for part in parts]).argmin())
