"""Commands in README.md and docs/: their files exist, and the tools accept their flags."""

import importlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY

from megatron_smlp import commands as commands_of_the_wheel
from megatron_smlp.accounting import estimate
from megatron_smlp.evaluation import cli as evaluation
from megatron_smlp.flags.parse import build_parser

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"\$\w+")


def commands(page: Path) -> list[list[str]]:
    """Return the argv of each command that runs a file of ours; shell variables become `name`."""
    found = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        for line in lines:
            if re.search(r"(tools/\w+|pretrain_smlp)\.py ", line):
                text = line.replace("$P", ".venv/bin/python")
                found.append(shlex.split(SHELL.sub("name", text), comments=True))
    return found


CASES = [
    pytest.param(argv, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, argv in enumerate(commands(page))
]


@pytest.mark.parametrize("argv", CASES)
def test_a_command_is_as_printed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the environment's Python, one of our tools, and flags that this tool accepts."""
    at = next(i for i, word in enumerate(argv) if re.search(r"(tools/\w+|pretrain_smlp)\.py", word))
    assert argv[0] in (".venv/bin/python", ".venv/bin/torchrun")
    assert (REPOSITORY / argv[at]).is_file()
    rest = [word for word in argv[at + 1 :] if word != "..."]
    if "--plugin" in rest:  # which all tools accept
        place = rest.index("--plugin")
        assert (REPOSITORY / rest.pop(place + 1)).is_file()
        rest.pop(place)
    if argv[at] in ("pretrain_smlp.py", "tools/evaluate.py"):
        if argv[at] != "pretrain_smlp.py":
            _, rest = evaluation.build_parser().parse_known_args(rest)  # the rest is Megatron's
        known = build_parser()._option_string_actions
        assert {word for word in rest if word.startswith("--")} <= set(known)
    elif argv[at] == "tools/estimate.py":  # its parser does not know model flags
        monkeypatch.chdir(REPOSITORY)
        assert estimate.main(rest) == 0
    else:
        _parser_of(REPOSITORY / argv[at]).parse_args(rest)


@pytest.mark.parametrize("place", ["examples", "megatron_smlp", "docs"])
def test_a_launch_of_one_machine_does_not_ask_for_its_name(place: str) -> None:
    """It may not resolve (on a laptop, behind a VPN); the supervisor has found an address."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in (REPOSITORY / place).rglob("*")
        if path.suffix in (".sh", ".py", ".md") and path.name != "supervisor.py"
    ]
    for line in "\n".join(texts).splitlines():
        assert "--standalone" not in line or "--local-addr" in line or line.startswith("#")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_its_variable_is(page: Path) -> None:
    """The tests that run pages set P for all of them, and would not notice."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\$P\b", text) or re.search(r"\bP=", text)


def _parser_of(tool: Path) -> Any:
    name = re.search(r"^from megatron_smlp.commands import (\w+)$", tool.read_text(), re.MULTILINE)
    assert name is not None
    (module,) = getattr(commands_of_the_wheel, name[1]).args
    return importlib.import_module(f"megatron_smlp.{module}").build_parser()


def test_there_are_commands_and_every_tool_can_be_run() -> None:
    assert len(CASES) > 25
    for tool in (REPOSITORY / "tools").glob("*.py"):
        assert os.access(tool, os.X_OK), tool
        assert tool.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")


def test_the_tools_have_one_vocabulary() -> None:
    """Each row of docs/tools.md agrees with the parsers of the tools that it names."""
    text = (REPOSITORY / "docs" / "tools.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    seen: dict[str, set[str]] = {}
    for _, flags, aliases, tools in rows:
        options = re.findall(r"`(--[\w-]+)`", flags + aliases)
        for tool in re.findall(r"^\w+|(?<=, )\w+", tools.strip()):
            known = _parser_of(REPOSITORY / "tools" / f"{tool}.py")._option_string_actions
            assert set(options) <= set(known), (tool, options)
            if aliases.strip():
                assert len({id(known[option]) for option in options}) == 1, (tool, options)
            seen.setdefault(tool, set()).update(options)
    shared = {flag for flags in seen.values() for flag in flags}
    for tool, flags in seen.items():  # the table lists every tool that has the flag
        known = set(_parser_of(REPOSITORY / "tools" / f"{tool}.py")._option_string_actions)
        assert known & shared <= flags | {"--config"}, tool
