"""Positions in partial prediction: where the prefix ends, and which targets its loss covers.

A sample's first P tokens choose the experts of its chunks (routers/prefix.py), so the model trains
on the targets predicted from there on: Yu et al., arXiv 2203.06850, section 3. Their loss is also
reported separately; for any system with --suffix-from.

Letters: T sequence length, P prefix length.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.systems import BY_PREFIX


def prefix_length(options: Any, *, seq_length: int) -> int:
    """P = floor(fraction x T), the tokens from which partial prediction routes; 0 without it.

    The fraction is taken as the decimal number given: in binary, 0.29 of 100 would be 28.

    Args:
        options: ModelOptions, or a namespace with its attributes.
    """
    is_partial = options.feature_router in BY_PREFIX
    return int(Fraction(str(options.prefix_fraction)) * seq_length) if is_partial else 0


def trained_from(options: Any) -> int:
    """Return the first position whose target is trained on: P, or 0 with --partial-loss all.

    Args:
        options: a namespace with the attributes of ModelOptions, and seq_length.
    """
    if options.partial_loss == "all":
        return 0
    return prefix_length(options, seq_length=options.seq_length)


def suffix_start(options: Any) -> int:
    """Return the P of --suffix-from, else partial prediction's; 0 if no suffix is reported.

    Args:
        options: a namespace with the attributes of ModelOptions and RunOptions, and seq_length.

    Raises:
        UsageError: --suffix-from is not a position strictly inside a sample.
    """
    given, seq_length = options.suffix_from, options.seq_length
    if given is None:
        return prefix_length(options, seq_length=seq_length)
    inside = 0 < given < seq_length
    position = Fraction(str(given)) * (seq_length if given < 1 else 1) if inside else Fraction(0)
    if position < 1 or (given >= 1 and position.denominator != 1):
        raise UsageError(
            f"--suffix-from {given:g}: give a whole position over 0 and under --seq-length "
            f"{seq_length}, or an equivalent fraction such as 0.2; or leave it out."
        )
    return int(position)
