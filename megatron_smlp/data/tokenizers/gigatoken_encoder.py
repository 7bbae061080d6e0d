"""Use `gigatoken` instead of a slower library where it gives the same ids."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.ids import join_ids
from megatron_smlp.data.tokenizers.spec import Encoder
from megatron_smlp.signals import is_interruption

# What tokenizers differ in: contractions, numbers, code, scripts, combining marks, emoji, controls,
# special tokens, white space in every position, long runs.
PROBE = (
    "The quick brown fox isn't 12,345.67 km from here;  it's\tI'LL we\u2019ll.\r\n\n   def f(x):",
    "caf\u00e9 cafe\u0301 Stra\u00dfe \u65e5\u672c\u8a9e\u306e\u6587 \u0420\u0443\u0441\u0441",
    "\u0627\u0644\u0639 \u0e44\u0e17\u0e22 \uff11\uff12\u0663 \U0001f642\u200d\U0001f9d1\U0001f3fd",
    "\u00a0\u2003x\u0000\u0007\ufeff\U0010ffff",
    "<|endoftext|>a <|endoftext|> b</s><s> [CLS]<unk><pad>",
    "",
    " ",
    "   leading",
    "trailing \n ",
    "a" * 300 + " " * 70 + "\n" * 9,
)


class GigatokenEncoder:
    """Encodes with gigatoken, and decodes with the library that it replaces."""

    description = "gigatoken"

    def __init__(
        self,
        fast: Any,
        *,
        slow: Encoder,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        slow_strings: Sequence[str] = (),
    ) -> None:
        """Args:
        fast: a `gigatoken.Tokenizer`.
        prefix, suffix: ids that the slow encoder puts around each text.
        slow_strings: a text that contains one of these is left to the slow encoder.
        """
        self.fast, self.slow, self.slow_strings = fast, slow, tuple(slow_strings)
        self.prefix = np.asarray(prefix, dtype=np.uint32)
        self.suffix = np.asarray(suffix, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        is_slow = [any(string in text for string in self.slow_strings) for text in texts]
        if not any(is_slow):
            return self._encode_fast(texts)
        one_by_one = (
            self.slow.encode_batch([text]) if slow else self._encode_fast([text])
            for text, slow in zip(texts, is_slow, strict=True)
        )
        return join_ids([ids for ids, _ in one_by_one])

    def _encode_fast(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        rows = self.fast.encode_batch(list(texts), parallel=False).layout
        ids = np.asarray(rows.content.data)
        lengths = np.diff(np.asarray(rows.offsets.data))
        if not len(self.prefix) and not len(self.suffix):
            return ids, lengths
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        return join_ids([np.concatenate((self.prefix, part, self.suffix)) for part in parts])

    def decode(self, ids: Sequence[int]) -> str:
        return self.slow.decode(ids)


def gigatoken_in_place_of(
    slow: Any,
    load: Callable[[Any], Any],
    *,
    pieces: Sequence[str],
    **around: Sequence[Any],
) -> Encoder:
    """Return the fast encoder if it agrees with `slow` on the probe, else `slow`, whose description
    then says why.

    Args:
        slow: an `Encoder` that is a dataclass.
        load: makes the `gigatoken.Tokenizer`, given the module.
        pieces: what the tokenizer searches a text for by special rules, before it merges. Libraries
            differ in such rules, so the probe contains each piece in context.
        around: `prefix`, `suffix` and `slow_strings` of `GigatokenEncoder`.
    """
    in_context = [text for piece in pieces for text in (f"x{piece}y", f"a {piece} b", piece * 2)]
    why = "gigatoken gives other ids for this tokenizer"
    try:
        import gigatoken

        fast = GigatokenEncoder(load(gigatoken), slow=slow, **around)
        probe = [*PROBE, *in_context]
        pairs = zip(fast.encode_batch(probe), slow.encode_batch(probe), strict=True)
        if all(np.array_equal(ours, theirs) for ours, theirs in pairs):
            return fast
    except ImportError:
        why = "pip install gigatoken is faster"
    # A tokenizer that gigatoken does not support raises errors of many kinds from Rust.
    except Exception as error:
        if is_interruption(error):  # gigatoken may drop one while it imports what it needs.
            raise KeyboardInterrupt from error
        reason = str(error).partition("\n")[0]  # a location in its source follows
        why = f"gigatoken does not support it: {reason}"
    return replace(slow, description=f"{slow.description} ({why})")
