"""Build argparse flags from the records in options.py. No torch, no Megatron."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.options import PLUGIN_OPTIONS, ModelOptions, RunOptions, choices_of

GROUPS = {"sparse all-MLP model": ModelOptions, "run": RunOptions}


def new_parser() -> argparse.ArgumentParser:
    """Return the training parser, without flags."""
    return argparse.ArgumentParser(
        prog="pretrain_smlp.py",
        usage="%(prog)s --config FILE.yaml [--flag value ...]",
        description="Pretrain sparse all-MLP language models and their baselines. Our flags extend "
        "Megatron's, which keep their names and meaning: --help-all lists those too, "
        "docs/flags.md the tested ones.",
        allow_abbrev=False,
    )


def add_our_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add both groups of options.py and the plugins' options; errors are raised, not printed."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title, options.__doc__)
        meanings = docstrings(options)
        for field in dataclasses.fields(options):
            group.add_argument(flag_of(field.name), **_keywords(field), help=meanings[field.name])
    add_plugin_options(parser)
    parser.error = _raise_usage  # type: ignore[method-assign]
    return parser


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the plugins that this process has loaded."""
    group = parser.add_argument_group("plugins")
    for name, it in PLUGIN_OPTIONS.items():
        kind: dict[str, Any] = {"type": it.kind, "choices": it.choices}
        if it.kind is bool:  # one that defaults to on gets --no-NAME
            switch = argparse.BooleanOptionalAction if it.default else "store_true"
            kind = {"action": switch}
        try:
            text = it.help.replace("%", "%%")
            group.add_argument(flag_of(name), default=it.default, help=text, **kind)
        except argparse.ArgumentError as error:
            raise UsageError(
                f"the plugin option {name} would shadow Megatron's flag {flag_of(name)}: rename it."
            ) from error


def _keywords(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.type is bool:
        return {"action": "store_true"}
    choices = choices_of(field)
    (kind,) = {str} if choices else {*(get_args(field.type) or [field.type])} - {NoneType}
    if get_origin(kind) is list:
        return {"action": "extend", "nargs": "+", "metavar": "NAME"}
    return {"type": kind, "choices": choices, "default": field.default}


def _raise_usage(message: str) -> NoReturn:
    """Raise a UsageError; argparse would print some hundred lines of usage before the message."""
    raise UsageError(message)


def docstrings(options: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(options))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
