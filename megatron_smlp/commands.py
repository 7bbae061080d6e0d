"""Every command of the project: tools/ and the console scripts of the wheel start it from here."""

from __future__ import annotations

import importlib
from functools import partial
from typing import NoReturn

from megatron_smlp.program import run_tool


def _run(module: str) -> NoReturn:
    run_tool(importlib.import_module(f"megatron_smlp.{module}").main)


build_hash_table = partial(_run, "data.hash_table_cli")
convert = partial(_run, "conversion.cli")
estimate = partial(_run, "accounting.estimate")
evaluate = partial(_run, "evaluation.cli")
generate = partial(_run, "generation.cli")
goodput = partial(_run, "accounting.goodput")
inspect_checkpoint = partial(_run, "checkpoints.inspect_cli")
inspect_dataset = partial(_run, "data.pairs.inspect_cli")
launch = partial(_run, "launching.supervisor")
merge_datasets = partial(_run, "data.pairs.merge_cli")
plot = partial(_run, "plotting.cli")
preprocess = partial(_run, "data.prepare.preprocess_cli")
serve = partial(_run, "serving.cli")
study = partial(_run, "study.cli")
train_tokenizer = partial(_run, "data.prepare.train_tokenizer_cli")
