"""The command line of `tools/inspect_checkpoint.py`: show, diff, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from megatron_smlp.checkpoints.folders import checkpoint_of
from megatron_smlp.command_line import Parser
from megatron_smlp.library_logging import silence_libraries


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Show, compare or verify checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, count, summary in (
        ("show", 1, "iteration, model, tensors with shapes and norms"),
        ("diff", 2, "tensors that differ; exit 0 if none does, else 1"),
        ("verify", 1, "compare all checksums; exit 0 or 1"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument(
            "folders", nargs=count, metavar="DIR", help="folder of a run (its newest), or iter_*"
        )
        command.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool, and return its exit code.

    Raises:
        UserError: there is no checkpoint, or one cannot be read.
    """
    args = build_parser().parse_args(argv)
    silence_libraries()
    # Imported late, as torch takes seconds.
    from megatron_smlp.checkpoints import inspection

    answer, code = getattr(inspection, args.command)(*map(checkpoint_of, args.folders))
    print(json.dumps(answer, indent=1) if args.json else "\n".join(_lines(answer)))
    return code


def _lines(answer: dict[str, Any]) -> list[str]:
    """Return the answer as text, a line for each row of a table; an empty table says `none`."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict):
            lines += [f"{key}.{name:<28} {inner}" for name, inner in value.items()]
        elif isinstance(value, list):
            lines.append(f"{key}: {len(value) or 'none'}")
            lines += [f"  {_row(row)}" for row in value]
        else:
            lines.append(f"{key}: {value}")
    return lines


def _row(row: Any) -> str:
    if not isinstance(row, dict):
        return str(row)
    rest = (f"{key} {v:.6g}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items())
    return "  ".join(rest).removeprefix("name ")
