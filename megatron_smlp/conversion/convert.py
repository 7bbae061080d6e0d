"""The conversions, end to end: account for every tensor, write, compare, publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_smlp.conversion import huggingface, megatron_model
from megatron_smlp.conversion.forward_check import check, fixed_tokens
from megatron_smlp.conversion.output import whole_folder
from megatron_smlp.conversion.progress import Progress
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder
from megatron_smlp.conversion.tensors import account, carried_out
from megatron_smlp.conversion.tokenizer import tokenizer_folder
from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion.torch_dist_writer import write_weights
from megatron_smlp.platform.one_process import one_process

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says, beside the two formats."""

    load: Path
    save: Path
    iteration: int | None = None
    overwrite: bool = False
    checks: bool = True
    shard_limit: int = 5 * 10**9
    """Bytes of one weights file of a Hugging Face folder."""
    tokenizer: str | None = None


def torch_dist_to_hf(options: Options, say: Say = print) -> None:
    """A Megatron checkpoint -> a folder for transformers."""
    with one_process():
        checkpoint = TorchDistCheckpoint(options.load, iteration=options.iteration)
        config = huggingface.config_of(checkpoint.flags)
        model = huggingface.build(config)
        plan = huggingface.export_plan(checkpoint.specs, checkpoint.flags)
        expected = huggingface.expected_shapes(model)
        where = str(checkpoint.folder)
        specs = account(plan, checkpoint.specs, expected, where=where)
        tokenizer = options.tokenizer or tokenizer_folder(checkpoint.args, say)
        with whole_folder(options.save, overwrite=options.overwrite) as folder:
            huggingface.write(
                folder,
                config,
                specs,
                Progress(specs).over(carried_out(plan, checkpoint)),
                shard_limit=options.shard_limit,
                tokenizer=tokenizer,
            )
            if options.checks:
                tokens = _tokens(checkpoint.flags)
                before = _megatron_logits(checkpoint, tokens)
                say(check(before, huggingface.logits(model, SafetensorsFolder(folder), tokens)))
    say(f"{options.save}: {len(specs)} tensors written for transformers")


def hf_to_torch_dist(options: Options, say: Say = print) -> None:
    """A folder for transformers -> a Megatron checkpoint of the weights."""
    with one_process():
        config = huggingface.read_config(options.load)
        source = SafetensorsFolder(options.load)
        flags = huggingface.flags_of(config)
        model = megatron_model.build(flags)
        expected = megatron_model.expected_shapes(model)
        plan = huggingface.import_plan(expected, flags)
        specs = account(plan, source.specs, expected, where=str(options.load))
        with whole_folder(options.save, overwrite=options.overwrite) as folder:
            write_weights(
                folder,
                flags,
                Progress(specs).over(carried_out(plan, source)),
                objects=megatron_model.object_names(model),
                layout={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
            )
            if options.checks:
                tokens = _tokens(flags)
                before = huggingface.logits(huggingface.build(config), source, tokens)
                say(check(before, _megatron_logits(TorchDistCheckpoint(folder), tokens)))
    say(f"{options.save}: {len(specs)} tensors written for Megatron, a release (iteration 0)")


def _tokens(flags: dict[str, Any]) -> Tensor:
    return fixed_tokens(vocab_size=flags["vocab_size"], length=flags["seq_length"])


def _megatron_logits(checkpoint: TorchDistCheckpoint, tokens: Tensor) -> Tensor:
    model = megatron_model.build(checkpoint.flags)
    return megatron_model.logits(model, checkpoint, tokens)
