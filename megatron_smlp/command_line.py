"""Flags: how they are spelt, and the parser of every tool's."""

import argparse

from megatron_smlp.errors import UsageError


def flag_of(name: str) -> str:
    """`--num-layers` of `num_layers`."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other error of the tools: in one line, with 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `--help` lists every flag.")
