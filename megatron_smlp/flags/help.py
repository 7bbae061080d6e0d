"""`--help` from files, because building the parser takes seconds: it imports Megatron and torch.

python -m megatron_smlp.flags.help      writes help.txt and docs/flags.md anew, after a flag changed
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
HELP_FILE = PACKAGE / "help.txt"
FLAGS_PAGE = PACKAGE.parents[1] / "docs" / "flags.md"
WIDTH = 100

PAGE = """# Flags

Megatron's flags keep their names and meaning; `pretrain_smlp.py --help` lists them all. Ours come
on top. A YAML file (`--config`) holds the same names, and flags win over it. This page is generated
by `python -m megatron_smlp.flags.help`.
"""


def wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help() -> None:
    print(HELP_FILE.read_text(encoding="utf-8"), end="")


def help_text(parser: argparse.ArgumentParser) -> str:
    """Every flag, as argparse words it at a fixed width; ours are at the end."""
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)
    return parser.format_help()


def flags_page(parser: argparse.ArgumentParser) -> str:
    """Our flags as a page of documentation: name, allowed values, default, meaning."""
    from megatron_smlp.options import ModelOptions, RunOptions

    lines = [PAGE]
    for title, options in (("Model", ModelOptions), ("Run", RunOptions)):
        lines += [f"\n## {title}\n", "| flag | default | meaning |", "|---|---|---|"]
        names = [field.name for field in dataclasses.fields(options)]
        lines += _rows(parser, names)
    return "\n".join(lines) + "\n"


def _rows(parser: argparse.ArgumentParser, names: Sequence[str]) -> Iterator[str]:
    actions = {action.dest: action for action in parser._actions}
    for name in names:
        action = actions[name]
        allowed = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        default = "" if action.default is None else f"`{action.default}`"
        meaning = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
        yield f"| `{action.option_strings[0]}{allowed}` | {default} | {meaning} |"


def main() -> None:
    """Write both files."""
    from megatron_smlp.flags.parse import build_parser
    from megatron_smlp.platform import cpu

    cpu.apply()
    HELP_FILE.write_text(help_text(build_parser()), encoding="utf-8")
    FLAGS_PAGE.write_text(flags_page(build_parser()), encoding="utf-8")
    print(f"wrote {HELP_FILE} and {FLAGS_PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
