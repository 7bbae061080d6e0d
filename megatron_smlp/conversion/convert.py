"""The conversions, end to end: account for every tensor, write, compare, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_smlp.conversion import gpt2, huggingface, megatron_model, resharding, upcycling
from megatron_smlp.conversion.forward_check import check, check_loss, fixed_tokens
from megatron_smlp.conversion.output import whole_folder
from megatron_smlp.conversion.progress import Progress
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder
from megatron_smlp.conversion.tensors import Plan, Recipe, Source, account, carried_out, same
from megatron_smlp.conversion.tokenizer import tokenizer_folder
from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion.torch_dist_writer import write_weights
from megatron_smlp.platform.one_process import one_process

Say = Callable[[str], None]
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


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
    divisible_by: int = 128
    """gpt2: the vocabulary is padded to a multiple of this times the tensor parallel size."""
    layout: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(LAYOUT, 1))
    """Parallel sizes that a Megatron checkpoint is meant for."""
    drops_optimizer: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    """upcycle: flags of the sparse model that the dense one has other values for."""


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
    """A folder for transformers, ours or GPT-2's -> a Megatron checkpoint of the weights."""
    values = huggingface.read_config_json(options.load)
    if values.get("model_type") == gpt2.MODEL_TYPE:
        gpt2_to_torch_dist(options, say)
        return
    config = huggingface.read_config(options.load)
    source = SafetensorsFolder(options.load)

    def logits(tokens: Tensor) -> Tensor:
        return huggingface.logits(huggingface.build(config), source, tokens)

    flags = huggingface.flags_of(config)
    _weights_to_torch_dist(options, say, flags, source, huggingface.import_plan, logits)


def gpt2_to_torch_dist(options: Options, say: Say = print) -> None:
    """A GPT-2 folder of transformers -> a Megatron checkpoint of the weights."""
    values = huggingface.read_config_json(options.load)
    divisible_by = options.divisible_by * options.layout["tensor_model_parallel_size"]
    config = gpt2.config_of(values, options.load, divisible_by=divisible_by)
    source = gpt2.GPT2Folder(options.load, config)

    def logits(tokens: Tensor) -> Tensor:
        return gpt2.logits(values, source, tokens)

    flags = huggingface.flags_of(config)
    _weights_to_torch_dist(options, say, flags, source, gpt2.import_plan, logits)


def _weights_to_torch_dist(
    options: Options,
    say: Say,
    flags: Mapping[str, Any],
    source: Source,
    make_plan: Callable[[Iterable[str], Mapping[str, Any]], Plan],
    logits: Callable[[Tensor], Tensor],
) -> None:
    """Write a release, and compare its logits with those of the source."""
    with one_process():
        resharding.check_layout(flags, options.layout)
        model = megatron_model.build(flags)
        expected = megatron_model.expected_shapes(model)
        plan = make_plan(expected, flags)
        specs = account(plan, source.specs, expected, where=str(options.load))
        with whole_folder(options.save, overwrite=options.overwrite) as folder:
            write_weights(
                folder,
                flags,
                Progress(specs).over(carried_out(plan, source)),
                objects=megatron_model.object_names(model),
                layout=options.layout,
            )
            if options.checks:
                tokens = _tokens(flags)
                say(check(logits(tokens), _megatron_logits(TorchDistCheckpoint(folder), tokens)))
    say(f"{options.save}: {len(specs)} tensors written for Megatron, a release (iteration 0)")


def torch_dist_to_torch_dist(options: Options, say: Say = print) -> None:
    """A Megatron checkpoint -> the same for another layout, or without optimizer state."""
    with one_process():
        checkpoint = TorchDistCheckpoint(options.load, iteration=options.iteration)
        resharding.check_layout(checkpoint.flags, options.layout)
        model = megatron_model.build(checkpoint.flags)
        expected = megatron_model.expected_shapes(model)
        plan = {name: Recipe((name,), same) for name in checkpoint.specs}
        account(plan, checkpoint.specs, expected, where=str(checkpoint.folder))
        is_release = options.drops_optimizer or not checkpoint.iteration
        with whole_folder(options.save, overwrite=options.overwrite) as folder:
            if is_release:
                specs = checkpoint.specs
                write_weights(
                    folder,
                    checkpoint.flags,
                    Progress(specs).over(checkpoint.tensors()),
                    objects=megatron_model.object_names(model),
                    layout=options.layout,
                )
                count = len(specs)
            else:
                count = resharding.copy(checkpoint, folder, options.layout)
            if options.checks:
                tokens = _tokens(checkpoint.flags)
                before = megatron_model.logits(model, checkpoint, tokens)
                say(check(before, _megatron_logits(TorchDistCheckpoint(folder), tokens)))
    what = "a release (iteration 0)" if is_release else f"iteration {checkpoint.iteration}"
    say(f"{options.save}: {count} tensors written for Megatron, {what}")


def upcycle(options: Options, say: Say = print) -> None:
    """A dense Megatron checkpoint -> a sparse one, weights only; `options.model` says which."""
    with one_process():
        checkpoint = TorchDistCheckpoint(options.load, iteration=options.iteration)
        flags = upcycling.target_flags(checkpoint.flags, options.model)
        huggingface.config_of(flags)  # which knows what sizes fit
        resharding.check_layout(flags, options.layout)
        model = megatron_model.build(flags)
        expected = megatron_model.expected_shapes(model)
        plan = upcycling.plan(checkpoint.specs, expected, flags)
        specs = account(plan, checkpoint.specs, expected, where=str(checkpoint.folder))
        with whole_folder(options.save, overwrite=options.overwrite) as folder:
            write_weights(
                folder,
                flags,
                Progress(specs).over(carried_out(plan, checkpoint)),
                objects=megatron_model.object_names(model),
                layout=options.layout,
            )
            if options.checks:
                tokens = _tokens(flags)
                before = _megatron_logits(checkpoint, tokens)
                after = _megatron_logits(TorchDistCheckpoint(folder), tokens)
                reason = upcycling.why_not_exact(checkpoint.flags, flags)
                say(check_loss(before, after, tokens, why_not=reason))
    say(f"{options.save}: {len(specs)} tensors written for Megatron, a release (iteration 0)")


def _tokens(flags: Mapping[str, Any]) -> Tensor:
    return fixed_tokens(vocab_size=flags["vocab_size"], length=flags["seq_length"])


def _megatron_logits(checkpoint: TorchDistCheckpoint, tokens: Tensor) -> Tensor:
    model = megatron_model.build(checkpoint.flags)
    return megatron_model.logits(model, checkpoint, tokens)
