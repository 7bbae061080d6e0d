"""tiktoken ranks, numbered as in Megatron."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.ids import join_ids, within
from megatron_smlp.data.tokenizers.spec import Encoder, TokenizerSpec, WithTexts
from megatron_smlp.errors import DataError

# Split patterns of Megatron's TikTokenizer, `--tiktoken-pattern`; public in its source, and part
# of the meaning of the ids.
TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TIKTOKEN_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
TIKTOKEN_DEFAULT_VOCABULARY = 2**17


@dataclass(frozen=True)
class TikToken(WithTexts):
    """tiktoken ranks, numbered after the special tokens as in Megatron's TikTokenizer."""

    ranks: tuple[bytes, ...]
    """Token bytes by rank."""
    special: tuple[str, ...]
    pattern: str
    description: str = "tiktoken"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "TikToken":
        path = spec.existing_file("tokenizer_model")
        named = spec.tokenizer_special_tokens or TIKTOKEN_SPECIAL_TOKENS
        count = spec.tiktoken_num_special_tokens
        if not set(TIKTOKEN_SPECIAL_TOKENS) <= set(named) or len(named) > count:
            raise DataError(
                f"--tokenizer-special-tokens must hold {' '.join(TIKTOKEN_SPECIAL_TOKENS)}, and at "
                f"most --tiktoken-num-special-tokens {count} tokens; it has {len(named)}"
            )
        filler = (f"<SPECIAL_{number}>" for number in range(len(named), count))
        ranks = _read_ranks(path)
        wanted = (spec.vocab_size or TIKTOKEN_DEFAULT_VOCABULARY) - count
        if not 0 < wanted <= len(ranks):
            raise DataError(
                f"--vocab-size {wanted + count} needs {wanted} ranks and {count} special tokens, "
                f"but {path} has {len(ranks)}; give --vocab-size {len(ranks) + count} or less"
            )
        pattern = TIKTOKEN_PATTERNS[spec.tiktoken_pattern or "v2"]
        return cls(tuple(ranks[:wanted]), (*named, *filler), pattern)

    @cached_property
    def encoding(self) -> Any:
        import tiktoken

        shift = len(self.special)
        return tiktoken.Encoding(
            name="megatron",
            pat_str=self.pattern,
            mergeable_ranks={token: rank + shift for rank, token in enumerate(self.ranks)},
            special_tokens={token: number for number, token in enumerate(self.special)},
        )

    @property
    def vocab_size(self) -> int:
        return len(self.special) + len(self.ranks)

    @property
    def eod(self) -> int | None:
        return self.special.index("</s>")

    @property
    def entries(self) -> list[tuple[int, bytes]]:
        return list(enumerate([*(token.encode() for token in self.special), *self.ranks]))

    def build(self) -> Encoder:
        return self

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return join_ids([self.encoding.encode(text, allowed_special="all") for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.encoding.decode(within(ids, self.vocab_size)))


def _read_ranks(path: Path) -> list[bytes]:
    """Return token bytes by rank, from the only kind of file that Megatron's tokenizer reads."""
    try:
        text = path.read_text(encoding="utf-8")
        rows: list[Any] = [(row["token_bytes"], row["rank"]) for row in json.loads(text)]
        pairs = sorted((int(rank), base64.b64decode(token)) for token, rank in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--tokenizer-model {path} has no tiktoken ranks: give a JSON list, as Megatron "
            f"reads it ({error})"
        ) from None
    if [rank for rank, _ in pairs] != list(range(len(pairs))):
        raise DataError(f"--tokenizer-model {path}: the ranks must run from 0 without gaps")
    return [token for _, token in pairs]
