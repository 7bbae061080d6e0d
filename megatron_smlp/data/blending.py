"""Parse Megatron's data flags into checked blends: datasets and their weights for each split.

Megatron takes a flat list. If its length is odd, or if it mixes numbers and names, Megatron
silently reads names only; here it is refused with the entry that is wrong.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_smlp.command_line import flag_of
from megatron_smlp.data.pairs.indexed import strip_suffix
from megatron_smlp.errors import UsageError

MEGATRONS_SPLIT = "969, 30, 1"
SPLITS = ("train", "valid", "test")
SPLIT_FLAGS = ("train_data_path", "valid_data_path", "test_data_path")
WHOLE_FLAGS = ("data_path", "data_args_path")
PER_SPLIT_FLAGS = (*SPLIT_FLAGS, "per_split_data_args_path")


class Blend(NamedTuple):
    """Datasets of one split, as `GPTDatasetConfig` takes them."""

    prefixes: list[str]
    weights: list[float] | None
    """Shares of the samples, with any sum; None reads each dataset once, by its size."""


@dataclass(frozen=True)
class Blends:
    """All data that a run reads: one blend that `--split` divides, or one blend per split."""

    whole: Blend | None = None
    per_split: list[Blend | None] | None = None

    def as_megatron(self) -> dict[str, Any]:
        """Return `blend` and `blend_per_split` of `GPTDatasetConfig`."""
        return {"blend": self.whole, "blend_per_split": self.per_split}

    @property
    def prefixes(self) -> list[str]:
        """Every dataset once, in the order of the flags."""
        blends = [self.whole, *(self.per_split or ())]
        return list(dict.fromkeys(name for blend in blends if blend for name in blend.prefixes))


def blends_from_arguments(args: argparse.Namespace) -> Blends:
    """Return the blends of `--data-path`, `--data-args-path`, `--train-data-path` and so on.

    Raises:
        UsageError: mutually exclusive flags, an unreadable file, or an invalid blend.
    """
    given = [name for name in (*WHOLE_FLAGS, *PER_SPLIT_FLAGS) if getattr(args, name, None)]
    if len(given) > 1 and not set(given) <= set(SPLIT_FLAGS):
        flags = " and ".join(flag_of(name) for name in given)
        raise UsageError(f"{flags} cannot be combined; give one of them")
    if "data_path" in given:
        return Blends(parse_blend(args.data_path, source="--data-path"))
    if "data_args_path" in given:
        entries = _read(args.data_args_path, "--data-args-path").split()
        return Blends(parse_blend(entries, source=f"--data-args-path {args.data_args_path}"))
    if "per_split_data_args_path" in given:
        return Blends(per_split=_read_per_split(args.per_split_data_args_path))
    if given:
        lists = [getattr(args, name, None) for name in SPLIT_FLAGS]
        return Blends(per_split=_three_blends(lists, [flag_of(name) for name in SPLIT_FLAGS]))
    return Blends()


def has_data(args: argparse.Namespace, split: str) -> bool:
    """Return whether the flags give any data to `split`, one of SPLITS.

    Raises:
        UsageError: see `blends_from_arguments`.
    """
    place = SPLITS.index(split)
    if (per_split := blends_from_arguments(args).per_split) is not None:
        return per_split[place] is not None
    shares = (args.split or MEGATRONS_SPLIT).split(",")
    return len(shares) > place and float(shares[place]) > 0


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} is not readable: {error}") from None


def _read_per_split(path: str) -> list[Blend | None]:
    flag = "--per-split-data-args-path"
    text = _read(path, flag)
    try:
        values = [json.loads(text)[name] for name in SPLITS]
        lists = [value.split() if isinstance(value, str) else value for value in values]
        if not all(isinstance(value, list | None) for value in lists):
            raise TypeError(f"{text[:80]}")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{flag} {path} must be JSON with the keys {', '.join(SPLITS)}, each a list or string "
            f"of weights and prefixes, or null ({type(error).__name__}: {error})"
        ) from None
    return _three_blends(lists, [f"{flag} {path}, {name}:" for name in SPLITS])


def _three_blends(
    lists: Sequence[Sequence[str] | None], sources: Sequence[str]
) -> list[Blend | None]:
    return [
        parse_blend(entries, source=source) if entries else None
        for entries, source in zip(lists, sources, strict=True)
    ]


def parse_blend(entries: Sequence[str], *, source: str) -> Blend:
    """Parse a list of prefixes, or of alternating weights and prefixes; strip `.bin` and `.idx`.

    Args:
        source: the flag or file that error messages name.

    Raises:
        UsageError: the list is neither of the two, or a weight is not a positive number.
    """
    entries = [str(entry).strip() for entry in entries]
    if not entries:
        raise UsageError(f"{source} is empty: give a dataset prefix, or weights and prefixes")
    numbers = [_is_weight(entry) for entry in entries]
    if not any(numbers):
        return Blend(list(map(strip_suffix, entries)), None)
    for position, (entry, is_number) in enumerate(zip(entries, numbers, strict=True)):
        expected = "weight" if position % 2 == 0 else "prefix"
        if is_number != (expected == "weight"):
            raise UsageError(
                f"{source} mixes weights and prefixes: entry {position + 1} of {len(entries)}, "
                f"{entry!r}, should be a {expected}; give a weight before every prefix (0.7 "
                f"first_prefix 0.3 second_prefix), or none at all"
            )
    if len(entries) % 2:
        raise UsageError(f"{source} ends with the weight {entries[-1]}, which has no prefix")
    prefixes = entries[1::2]
    weights = [_weight(*pair, source) for pair in zip(entries[::2], prefixes, strict=True)]
    return Blend(list(map(strip_suffix, prefixes)), weights)


def _is_weight(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True


def _weight(entry: str, name: str, source: str) -> float:
    weight = float(entry)
    if not math.isfinite(weight) or weight <= 0:
        raise UsageError(
            f"{source}: the weight {entry} of {name!r} must be above 0; omit a dataset that should "
            f"not be read"
        )
    return weight
