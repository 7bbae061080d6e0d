"""`run.json` of a converted checkpoint, from which --use-checkpoint-args can start a run.

Besides what a run writes, it has the `special_token_ids` of an imported model, for its export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_smlp import plugin_texts
from megatron_smlp.command_line import flag_of

SPECIAL = "special_token_ids"
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
OF_A_PIPELINE = frozenset(
    {
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    }
)
"""Flags that are valid for one pipeline parallel size only."""


def sizes(layout: Mapping[str, int], record: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the target's parallel sizes: those given, or else the run's."""
    before = (record or {}).get("layout", {})
    return {name: layout.get(name) or before.get(name) or 1 for name in LAYOUT}


def converted_record(
    before: Mapping[str, Any] | None,
    flags: Mapping[str, Any],
    layout: Mapping[str, int],
    *,
    iteration: int | None,
    is_new_model: bool,
) -> dict[str, Any]:
    """Return the record to write, from the run's own record or from the model's flags alone.

    Args:
        before: the record of the checkpoint that was converted, or what is known about an import.
        flags: of the model that is written.
        layout: the target's parallel sizes, where they differ from the run's.
        is_new_model: whether the model differs from the run's.
    """
    from megatron_smlp.flags.model_arguments import model_arguments
    from megatron_smlp.flags.parse import build_parser
    from megatron_smlp.flags.use_checkpoint_args import without

    special = {SPECIAL: before[SPECIAL]} if before and SPECIAL in before else {}
    before = before if before and "flags" in before else {}
    then, now = (sizes(given, before) for given in ({}, layout))
    dropped = {"padded_vocab_size"}  # model.json says it
    if iteration is None:
        dropped |= {"branch_from"}  # a fresh start from weights is not a branch
    if now["pipeline_model_parallel_size"] != then["pipeline_model_parallel_size"]:
        dropped |= OF_A_PIPELINE
    recorded = [str(argument) for argument in before.get("command_line", [])]
    arguments = without(dropped, build_parser(), recorded)
    if is_new_model or not arguments:
        arguments += model_arguments(build_parser(), flags, trains=True)
    for name, size in layout.items():
        flag = flag_of(name)
        if size > 1 or any(text.split("=")[0] == flag for text in arguments):
            arguments += [flag, str(size)]
    changes = {**layout, "padded_vocab_size": flags["padded_vocab_size"]}
    return {
        "iteration": iteration,
        "consumed_train_samples": before.get("consumed_train_samples", 0) if iteration else 0,
        "command_line": arguments,
        "given": [name for name in before.get("given", []) if name not in dropped],
        "layout": now,
        **({name: before[name] for name in ("data", "software") if iteration and name in before}),
        "tokenizer": before.get("tokenizer"),
        "plugins": before.get("plugins") or plugin_texts.texts(),
        "flags": {**before["flags"], **changes} if before else {},
        **special,
    }
