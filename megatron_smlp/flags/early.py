"""Refuse at once, before torch is imported, what a command line alone shows to be wrong.

A parser with our flags, by their records, and with Megatron's, by a table of them, which holds for
the release that it was made of; with another one everything waits for the real parser. What is
refused, and how it is said, is in the functions that look again behind it.

    python -m megatron_smlp.flags.early     writes the table anew, for another Megatron
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.flags.config_file import expand_config
from megatron_smlp.flags.megatron_flags import usable
from megatron_smlp.flags.our_flags import add_our_flags, new_parser
from megatron_smlp.flags.parser_actions import refuse_unknown
from megatron_smlp.flags.ranges import check_values
from megatron_smlp.flags.use_checkpoint_args import FLAG as GOES_ON
from megatron_smlp.options import OUR_FLAGS
from megatron_smlp.provenance import version_of

TABLE = Path(__file__).with_name("megatron_flags.txt")
"""Megatron's release; then lines of what some flags take, each before the lines of these flags, as
`--flag[,--other-spelling]`, with `=name` where that is another one."""
TYPES = {"int": int, "float": float}


def refuse(argv: Sequence[str]) -> None:
    """Refuse flags that do not exist or are not tested, and values that are not of their type,
    choice or range.

    Raises:
        UsageError: as the real parser would.
    """
    release, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    if GOES_ON in argv or release != version_of("megatron-core"):
        return
    parser = add_our_flags(new_parser())
    facts: dict[str, Any] = {}
    for line in lines:
        if line.startswith("{"):
            facts = json.loads(line)
            continue
        for flags, _, name in (entry.partition("=") for entry in line.split()):
            first, *others = flags.split(",")
            dest = name or first.removeprefix("--").replace("-", "_")
            _add(parser, [first, *others], dest=dest, **facts)
    expanded, _ = expand_config(parser, argv)
    check_values(refuse_unknown(parser, expanded))


def spellings() -> set[str]:
    """Return every flag of Megatron's, as the table has them."""
    return {
        word.partition("=")[0]
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        for word in line.replace(",", " ").split()
        if word.startswith("--")
    }


def _add(
    parser: argparse.ArgumentParser,
    flags: list[str],
    *,
    dest: str,
    nargs: int | str | None = None,
    type: str = "str",
    choices: list[Any] | None = None,
) -> None:
    if nargs == 0:
        is_pair = any(flag_of(f"no-{flags[0][2:]}") == flag for flag in flags[1:])
        action: Any = argparse.BooleanOptionalAction if is_pair else "store_true"
        parser.add_argument(*flags[: 1 if is_pair else None], dest=dest, action=action)
    else:
        kind: Any = TYPES.get(type, str)
        parser.add_argument(*flags, dest=dest, nargs=nargs, type=kind, choices=choices)


def megatrons_table() -> str:
    """Return the table, from Megatron's own parser."""
    from megatron_smlp.flags.parse import build_parser
    from megatron_smlp.platform import cpu

    cpu.apply()
    parser = build_parser()
    tested = usable(parser)
    entries: dict[str, list[str]] = {}
    for action in parser._actions:
        if action.dest not in {*OUR_FLAGS, "help"}:
            entry = ",".join(action.option_strings)
            name = "" if flag_of(action.dest) == action.option_strings[0] else f"={action.dest}"
            facts = _facts(action, with_choices=action.dest in tested)
            entries.setdefault(json.dumps(facts), []).append(entry + name)
    lines = [str(version_of("megatron-core"))]
    for taken, flags in sorted(entries.items()):
        text = " ".join(sorted(flags))
        lines += [taken, *textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False)]
    return "\n".join(lines) + "\n"


def _facts(action: argparse.Action, *, with_choices: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if action.nargs is not None:
        facts["nargs"] = action.nargs
    if action.type in TYPES.values():
        facts["type"] = action.type.__name__  # type: ignore[union-attr]
    choices = [value.name if isinstance(value, Enum) else value for value in action.choices or ()]
    if with_choices and choices and all(isinstance(choice, (str, int)) for choice in choices):
        facts["choices"] = choices
    return facts


if __name__ == "__main__":
    TABLE.write_text(megatrons_table(), encoding="utf-8")
