"""The parser of every tool's flags."""

import argparse

from megatron_smlp.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other error of the tools: in one line, with 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `--help` lists every flag.")
