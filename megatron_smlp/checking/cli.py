"""`smlp-check FILE`: print a table of comparisons; exit with code 1 at the first wrong row.

smlp-check gated_conv.py
smlp-check gated_conv.py --quick     without trainings: seconds
smlp-check gated_conv.py --taps 2    with another value of an option
smlp-check gated_conv.py conv_first.py     the second needs the first
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from megatron_smlp import plugin_files
from megatron_smlp.checking.rows import Check
from megatron_smlp.command_line import Parser, flag_of, negation_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.our_flags import add_plugin_options
from megatron_smlp.options import OUR_FLAGS, PLUGIN_OPTIONS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = Parser(
        prog="smlp-check",
        description="Check plugins, row by row.",
        epilog="Options of a plugin come last, as its flags: --taps 2.",
    )
    parser.add_argument(
        "plugins",
        nargs="+",
        metavar="FILE",
        help="a plugin, as for --plugin; after those whose names it uses",
    )
    parser.add_argument("--quick", action="store_true", help="skip training and export")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks of the given files, and print a row for each as it ends."""
    options, rest = build_parser().parse_known_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    for plugin in options.plugins:
        plugin_files.load(plugin)
    of_plugins = Parser(prog="smlp-check")
    add_plugin_options(of_plugins)
    values = vars(of_plugins.parse_args(rest))
    named = " ".join(options.plugins)
    count = 0
    with tempfile.TemporaryDirectory(prefix="smlp-check-") as folder:
        for check in _checks(options, named, Path(folder), values):
            row = check()
            count += 1
            mark = "[green]ok   [/]" if row.passed else "[red]WRONG[/]"
            console.print(
                f"{mark} {escape(row.subject)}  {escape(row.compared)}  {escape(row.apart)}"
            )
            if not row.passed:
                console.print(f"{named}: {row.subject}: {row.advice}", markup=False)
                return 1
    console.print(f"{named}: {count} checks passed in {time.monotonic() - began:.0f} s")
    return 0


def of_classes(values: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the checks of each registered class on its own, with these values of its options."""
    from megatron_smlp.checking import feature_routers, mixers, routers
    from megatron_smlp.plugins import register

    for table, checks in (
        (register.token_mixers, mixers.checks),
        (register.channel_mixers, mixers.checks),
        (register.token_routers, routers.checks),
        (register.feature_routers, feature_routers.checks),
    ):
        for name, kind in table.items():
            yield from checks(name, _with_defaults(kind, values))


def _with_defaults(kind: type, values: Mapping[str, Any]) -> type:
    """Return a class whose options have these defaults."""
    from megatron_smlp.plugins import options_of

    own = {
        name: dataclasses.replace(it, default=values.get(name, it.default))
        for name, it in options_of(kind).items()
    }
    return type(kind.__name__, (kind,), own)


def _flags(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags of an architecture's or router's options that differ from their defaults."""
    for option, value in values.items():
        facts = OUR_FLAGS[option]
        owners = (*facts.architectures, *facts.token_routers, *facts.feature_routers)
        if name in owners and value != PLUGIN_OPTIONS[option].default:
            flag = flag_of(option)
            switch = flag if value else negation_of(flag)
            yield switch if isinstance(value, bool) else f"{flag}={value}"


def _checks(
    options: argparse.Namespace, named: str, folder: Path, values: Mapping[str, Any]
) -> Iterator[Check]:
    from megatron_smlp.checking.runs import MODELS, Runs
    from megatron_smlp.plugins import register

    tables = dict(register.tables())
    if not any(tables.values()):
        raise UsageError(
            f"{named} registers no mixer, router or architecture, so nothing to check: "
            "decorate a class with @register(NAME). Observers are tested by training."
        )
    yield from of_classes(values)
    if options.quick:
        return
    mixing = [*register.token_mixers, *register.channel_mixers]
    if mixing and not register.architectures:
        name = mixing[0]
        mixer = name if register.token_mixers else "attention"
        channel = "" if register.token_mixers else f', channel="{name}"'
        raise UsageError(
            f"{named} registers no architecture, so nothing can be trained: add "
            f'register.architecture("{name}", mixer="{mixer}"{channel}).'
        )
    for title, flags in MODELS.items():
        for name in tables[title]:
            model = [*flags.format(name=name).split(), *_flags(name, values)]
            own = folder / title.replace(" ", "_") / name
            yield from Runs(name, plugins=options.plugins, model=model, folder=own).checks()
