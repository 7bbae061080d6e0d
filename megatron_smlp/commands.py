"""The project's commands, as started by tools/ and by the wheel's console scripts."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import NoReturn

from megatron_smlp.plugin_texts import ALLOW, FLAG
from megatron_smlp.program import run_tool

NAMING = {FLAG, ALLOW, "--config"}
"""Flags that may name plugins or allow them."""


def _run(module: str) -> NoReturn:
    run_tool(partial(_main, module))


def _main(module: str) -> int | None:
    """Load the named plugins, then the tool, which then has them in its tables."""
    if NAMING & {word.partition("=")[0] for word in sys.argv[1:]}:
        from megatron_smlp import plugin_files  # imports numpy, which --help does not need

        sys.argv[1:] = plugin_files.load_named(sys.argv[1:])
    code: int | None = importlib.import_module(f"megatron_smlp.{module}").main()
    return code


def launch() -> NoReturn:
    """Launch a training; --plugin is passed on to the ranks with the rest of the command line."""
    run_tool(lambda: importlib.import_module("megatron_smlp.launching.supervisor").main())


check = partial(_run, "checking.cli")
convert = partial(_run, "conversion.cli")
estimate = partial(_run, "accounting.estimate")
evaluate = partial(_run, "evaluation.cli")
generate = partial(_run, "generation.cli")
inspect_checkpoint = partial(_run, "checkpoints.inspect_cli")
inspect_dataset = partial(_run, "data.pairs.inspect_cli")
merge_datasets = partial(_run, "data.pairs.merge_cli")
plot = partial(_run, "plotting.cli")
new = partial(_run, "checking.new")
preprocess = partial(_run, "data.prepare.preprocess_cli")
serve = partial(_run, "serving.cli")
study = partial(_run, "study.cli")
train_tokenizer = partial(_run, "data.prepare.train_tokenizer_cli")
