"""Megatron's tokenizer flags, and what is made from them, without importing torch or Megatron.

    TokenizerSpec (flags)  --read_tokenizer-->  Tokenizer (picklable)  --build-->  Encoder

The ids equal those of Megatron's `build_tokenizer` with the same flags. A `Tokenizer` is sent to
the worker processes, where `build` makes the encoder; training only needs its identity.
"""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import DataError

if TYPE_CHECKING:  # numpy would triple the time of `--help`
    import numpy as np
    from numpy.typing import NDArray

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    *SENTENCEPIECE_TYPES,
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
)
FILES = ("tokenizer_model", "vocab_file", "merge_file")
SIZED_TYPES = ("TikTokenizer", "ByteLevelTokenizer", "NullTokenizer")
"""Types that read --vocab-size."""


class UnencodableTextError(ValueError):
    """A tokenizer cannot turn this text into ids; the message says why."""


class Encoder(Protocol):
    """A tokenizer that is ready to encode in one process."""

    @property
    def description(self) -> str:
        """Return a description for the log: the library, and why a slower one was chosen."""

    def encode_batch(self, texts: Sequence[str]) -> "tuple[NDArray[Any], NDArray[np.int64]]":
        """Return <int>[tokens of all texts], <int64>[texts] tokens of each; text is valid Unicode.

        Raises:
            UnencodableTextError: one of the texts has no ids.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Ids that are not text are shown in a readable form, and those
        of the vocabulary's padding left out."""


class Tokenizer(Protocol):
    """A tokenizer whose files have been read: picklable, not yet ready to encode.

    It is a dataclass, whose `repr` contains everything that determines the ids of a text.
    """

    @property
    def vocab_size(self) -> int:
        """Entries, special tokens included, before padding."""

    @property
    def eod(self) -> int | None:
        """Id of the end-of-document token."""

    @property
    def entries(self) -> Iterable[tuple[int, bytes]] | None:
        """Ids with their strings, or None if ids stand for no text."""

    @property
    def identity(self) -> str | None:
        """`WithTexts.identity`, or None if ids stand for no text."""

    def build(self) -> Encoder:
        """Make the encoder for this process."""


class WithTexts:
    """Base class for dataclasses of tokenizers whose ids stand for texts."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Cached values are left out and rebuilt where needed: their pickles are slower to load.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    @property
    def entries(self) -> Iterable[tuple[int, bytes]]:
        """Return the ids with their strings."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """SHA-256 over (id, token) in id order: equal if every id has the same meaning.

        The same vocabulary has the same identity whatever files it is stored in, so data written
        with `vocab.json` and `merges.txt` trains with a Hugging Face folder of the same tokenizer.
        """
        digest = hashlib.sha256()
        for number, token in sorted(self.entries):
            digest.update(number.to_bytes(8, "little") + len(token).to_bytes(8, "little") + token)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Megatron's tokenizer flags, under Megatron's names."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    tokenizer_special_tokens: tuple[str, ...] = ()
    tokenizer_hf_no_include_special_tokens: bool = False
    trust_remote_code: bool = False
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    null_tokenizer_eod_id: int | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "TokenizerSpec":
        """Return the tokenizer flags of parsed arguments, ours or Megatron's."""
        values = {
            field.name: getattr(args, field.name)
            for field in fields(cls)
            if hasattr(args, field.name)
        }
        # Megatron stores --tokenizer-special-tokens as `special_tokens`.
        special = values.get("tokenizer_special_tokens") or getattr(args, "special_tokens", None)
        return cls(**{**values, "tokenizer_special_tokens": tuple(special or ())})

    def existing_file(self, name: str) -> Path:
        """Return the path in field `name`.

        Raises:
            DataError: the flag was not given, or names no file.
        """
        flag = flag_of(name)
        value = getattr(self, name)
        if value is None:
            raise DataError(f"--tokenizer-type {self.tokenizer_type} needs {flag} FILE")
        if not Path(value).is_file():
            raise DataError(f"{flag} {value}: no such file")
        return Path(value)


def adds_nothing(spec: TokenizerSpec) -> bool:
    """Return whether a run with these flags trained on texts without tokens around them, which of
    all types Hugging Face's alone adds; whoever wrote ids as numbers is not known."""
    kinds = ("HuggingFaceTokenizer", "NullTokenizer")
    return spec.tokenizer_hf_no_include_special_tokens or spec.tokenizer_type not in kinds


def named_or_moved(
    args: argparse.Namespace, recorded: TokenizerSpec | None = None
) -> TokenizerSpec | None:
    """Return the tokenizer that flags name. Files without a type are where the recorded one has
    moved or, if none is recorded, a HuggingFaceTokenizer's or the two of a GPT2BPETokenizer."""
    if args.tokenizer_type:
        named = TokenizerSpec.from_arguments(args)
        # Texts begin as they did in training, wherever the tokenizer is now.
        is_bare = recorded is not None and adds_nothing(recorded)
        return replace(named, tokenizer_hf_no_include_special_tokens=True) if is_bare else named
    files: dict[str, Any] = {name: getattr(args, name, None) for name in FILES}
    if any(files.values()):
        kind = "HuggingFaceTokenizer" if args.tokenizer_model else "GPT2BPETokenizer"
        return replace(recorded or TokenizerSpec(tokenizer_type=kind), **files)
    return recorded


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add Megatron's tokenizer flags to `parser`."""
    group = parser.add_argument_group("tokenizer (Megatron's flags)")
    group.add_argument("--tokenizer-type", required=required, choices=TOKENIZER_TYPES)
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="Hugging Face folder, SentencePiece .model, or tiktoken ranks",
    )
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="ENTRIES",
        help="size of the vocabulary: NullTokenizer, ByteLevelTokenizer (512), TikTokenizer",
    )
    group.add_argument("--tokenizer-special-tokens", nargs="+", metavar="TOKEN")
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="omit the tokens that a Hugging Face tokenizer adds around each text",
    )
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--tiktoken-pattern", choices=["v1", "v2"])
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000, metavar="N")
    group.add_argument("--null-tokenizer-eod-id", type=int, metavar="ID")
