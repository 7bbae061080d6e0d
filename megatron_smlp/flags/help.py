"""`--help`: our flags, from the records in options.py, without importing Megatron and torch.

`--help-all` builds the parser, which takes seconds, and lists Megatron's flags too.

    python -m megatron_smlp.flags.help      writes docs/flags.md anew, after a flag changed
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import VERSION, flag_of
from megatron_smlp.flags.our_flags import docstrings
from megatron_smlp.options import OUR_FLAGS, ModelOptions, RunOptions, choices_of

FLAGS_PAGE = Path(__file__).parents[2] / "docs" / "flags.md"
WIDTH = 100
GROUPS = {"Model": ModelOptions, "Run": RunOptions}
HEAD = """usage: pretrain_smlp.py --config FILE.yaml [--flag value ...]

Pretrain sparse all-MLP language models and their baselines. These flags come on top of Megatron's,
which keep their names and meaning; --help-all lists those too.
"""
PAGE = """# Flags

Megatron's flags keep their names and meaning; `pretrain_smlp.py --help-all` lists them. Ours come
on top. A YAML file (`--config`) holds the same names, and flags win over it. This page is generated
by `python -m megatron_smlp.flags.help` from the records in `megatron_smlp/options.py`.
"""


def answered(argv: Sequence[str]) -> bool:
    """Print what --help, --help-all or --version asks for, where one of them is there."""
    if "--help-all" in argv:
        print(full_help(), end="")
    elif "--help" in argv or "-h" in argv:
        print(short_help())
    elif list(argv) == ["--version"]:
        print(VERSION)
    else:
        return False
    return True


def short_help() -> str:
    """Return our flags as argparse would print them."""
    lines = [HEAD]
    for title, options in GROUPS.items():
        lines.append(f"{title.lower()}:")
        for name, allowed, default, meaning in rows(options):
            lines.append(f"  {flag_of(name)}{f' {allowed}' if allowed else ''}")
            text = meaning + (f" (default: {default})" if default else "")
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )  # fmt: skip
        lines.append("")
    return "\n".join(lines).rstrip()


def full_help() -> str:
    """Return every flag, Megatron's among them, as argparse prints it."""
    import argparse

    from megatron_smlp.flags.parse import build_parser
    from megatron_smlp.platform import cpu

    cpu.apply()
    parser = build_parser()
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)
    return parser.format_help()


def rows(options: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield each flag of a dataclass: name, allowed values, default, meaning."""
    meanings = docstrings(options)
    for field in dataclasses.fields(options):
        default = "" if field.default is None or field.default is False else str(field.default)
        yield field.name, _allowed(field), default, meanings[field.name]


def _allowed(field: dataclasses.Field[Any]) -> str:
    if choices := choices_of(field):
        return "{" + ",".join(choices) + "}"
    return "" if field.type is bool else field.name.upper()


def flags_page() -> str:
    """Return our flags as a page of documentation."""
    lines = [PAGE]
    for title, options in GROUPS.items():
        lines += [f"\n## {title}\n", "| flag | for | default | meaning |", "|---|---|---|---|"]
        for name, allowed, default, meaning in rows(options):
            shown = f" {allowed}" if allowed else ""
            facts = OUR_FLAGS[name]
            owners = [
                *(*facts.architectures, *facts.token_routers),
                *(*facts.feature_routers, *facts.input_projections),
            ]
            lines.append(
                f"| `{flag_of(name)}{shown}` | {', '.join(owners)} | "
                f"{f'`{default}`' if default else ''} | {meaning.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write docs/flags.md."""
    FLAGS_PAGE.write_text(flags_page(), encoding="utf-8")
    print(f"wrote {FLAGS_PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
