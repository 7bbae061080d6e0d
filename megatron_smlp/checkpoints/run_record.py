"""`run.json` in a checkpoint: the whole configuration of the run that saved it, as plain JSON.

| key | what it is |
|---|---|
| iteration, consumed_train_samples | how far the run had come |
| command_line | its arguments, including those from its YAML file |
| given | the names of the flags in `command_line` |
| flags | the value of every flag, with all defaults of Megatron and the machine filled in |
| layout | how many ranks the model was sharded over, and how |
| data | a checksum of each dataset's content, by prefix: `data/pairs/content.py` |
| plugins | the text of each plugin, by name |
| software | commit of this repository, hash of its sources, versions of Python and of packages |
| tokenizer | flags that name it, its size, and the SHA-256 of its vocabulary |
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron_smlp import plugin_texts
from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import MODEL, RUN
from megatron_smlp.data.tokenizers.spec import TokenizerSpec
from megatron_smlp.durable import write_durably
from megatron_smlp.options import OUR_FLAGS
from megatron_smlp.provenance import software

LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
)
TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")

# Flags that concern one start of a run, and that the next one does not inherit.
START_FLAGS = frozenset({
    *(name for name, facts in OUR_FLAGS.items() if facts.of_one_start),
    "use_checkpoint_args", "load", "save", "ckpt_step", "finetune", "no_load_optim", "no_load_rng",
    "override_ckpt_iteration", "exit_interval", "exit_duration_in_mins",
    "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "tensorboard_dir",
    "trust_remote_code",  # whose record it is need not be whom the user trusts
})  # fmt: skip


def run_record(args: argparse.Namespace, *, iteration: int | None) -> dict[str, Any]:
    """Return the contents of `run.json`, for a namespace from `parse_arguments`."""
    return {
        "iteration": iteration,
        "consumed_train_samples": args.consumed_train_samples,
        "command_line": args.command_line,
        "given": sorted(args.explicit_flags),
        "layout": {name: getattr(args, name) for name in LAYOUT},
        "data": args.data_contents,
        "software": software(),
        "plugins": plugin_texts.texts(),
        "tokenizer": {name: getattr(args, name) for name in TOKENIZER}
        | {"identity": _tokenizer_identity(TokenizerSpec.from_arguments(args))},
        "flags": {name: plain(value) for name, value in sorted(vars(args).items())},
    }


@cache  # once for all saves: it may start another Python process, which queries the hub
def _tokenizer_identity(spec: TokenizerSpec) -> str | None:
    from megatron_smlp.data.tokenizers.factory import read_tokenizer
    from megatron_smlp.errors import DataError

    try:
        return read_tokenizer(spec).identity
    except DataError:  # training can use it, but this repository's tools cannot read it
        return None


def plain(value: Any) -> Any:
    """Return a value as JSON keeps it; what JSON cannot express becomes its `str`."""
    return json.loads(json.dumps(value, default=str))


def write_records(folder: Path, model: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write model.json and run.json into the folder of a checkpoint."""
    for name, content in ((MODEL, model), (RUN, run)):
        write_durably(folder / name, json.dumps(dict(content), indent=1) + "\n")


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """Return the contents of run.json; None if it is missing or does not match its checksum."""
    return integrity.read_record(folder, RUN)
