"""The conversions, end to end: account for every tensor, write, compare, publish.

Their `options` are those that cli.py parses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_smlp.checkpoints.folders import partial_folder
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.checkpoints.tensors import Source, Spec, tensors_of
from megatron_smlp.checkpoints.tokenizer_copy import keep_tokenizer
from megatron_smlp.checkpoints.torch_dist import COMMON, AveragedCheckpoint, TorchDistCheckpoint
from megatron_smlp.checkpoints.writer import weights_state, write_checkpoint
from megatron_smlp.conversion import (
    gpt2,
    huggingface,
    llama,
    megatron_model,
    rewriting,
    upcycling,
)
from megatron_smlp.conversion.forward_check import check, check_loss, fixed_tokens
from megatron_smlp.conversion.model_card import training_facts, write_card
from megatron_smlp.conversion.padding import Repadded, padded_size
from megatron_smlp.conversion.recipes import Converted, Recipe, same
from megatron_smlp.conversion.record import SPECIAL, converted_record, sizes
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder
from megatron_smlp.conversion.target import check_target
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer, tokenizer_folder
from megatron_smlp.durable import flush_folder, replace_folder
from megatron_smlp.errors import UsageError
from megatron_smlp.platform.one_process import one_process
from megatron_smlp.signals import interrupt

Say = Callable[[str], None]
GPT2_DIVISIBLE_BY = 128
FORMS: dict[str, Any] = {gpt2.MODEL_TYPE: gpt2, llama.MODEL_TYPE: llama}
"""Models of transformers that can be read besides our own, by the `model_type` in config.json."""


@dataclass(frozen=True)
class Weights:
    """A model's weights under Megatron's names, whatever format holds them."""

    source: Source
    flags: Mapping[str, Any]
    where: str
    logits: Callable[[Tensor], Tensor]
    """Maps tokens to logits of the model in that format, before its vocabulary was repadded."""
    record: Mapping[str, Any] | None = None
    """run.json of the run that it comes from, or what is known about an import."""
    args: argparse.Namespace = field(default_factory=argparse.Namespace)
    """All flags of that run."""


def torch_dist_to_hf(options: argparse.Namespace, say: Say = print) -> None:
    """Convert a Megatron checkpoint to a folder for transformers: a Llama, or our own model."""
    with one_process():
        checkpoint = _checkpoint(options)
        source, flags = _padded(options, checkpoint, checkpoint.specs, checkpoint.flags)
        ours = huggingface.config_of(flags)
        record = read_run_record(checkpoint.folder)
        huggingface.set_special_ids(ours, (record or {}).get(SPECIAL))
        is_llama = llama.fits(ours)
        form: Any = llama if is_llama else huggingface
        config = llama.exported(ours) if is_llama else ours
        plan = form.TENSORS.export_plan(source.specs, flags)
        model = (huggingface.build_theirs if is_llama else huggingface.build)(config)
        expected = huggingface.expected_shapes(model)
        converted = Converted(plan, source, expected, where=str(checkpoint.folder))
        tokenizer = options.tokenizer_model or tokenizer_folder(checkpoint.args, say)
        with _whole(options, checkpoint.folder) as folder:
            huggingface.write(
                folder,
                config,
                converted.specs,
                tensors_of(converted),
                shard_limit=options.shard_limit,
                tokenizer=tokenizer,
                recorded=recorded_tokenizer(checkpoint.args),
            )
            write_card(
                folder,
                model,
                converted.specs,
                options,
                of=ours,
                training=training_facts(checkpoint.folder, record, average=options.average),
                has_tokenizer=bool(tokenizer),
            )
            if options.checks:
                tokens = fixed_tokens(flags)
                before = _megatron_logits(checkpoint, checkpoint.flags, tokens)
                after = huggingface.logits(lambda: model, SafetensorsFolder(folder), tokens)
                say(check(before, after))
    kind = ", as a Llama" if is_llama else ""
    say(f"{options.save}: {len(converted.specs)} tensors written for transformers{kind}")


def to_torch_dist(options: argparse.Namespace, say: Say = print) -> None:
    """Convert weights in any format to a Megatron checkpoint."""
    with one_process():
        weights = _weights(options)
        rewriting.check_layout(weights.flags, options.layout)
        with _release(options, weights, weights.flags, weights.source) as folder:
            if options.checks:
                tokens = fixed_tokens(weights.flags)
                before, after = weights.logits(tokens), _read_back(folder, tokens)
                say(check(before, after))
    count = len(weights.source.specs)
    say(f"{options.save}: {count} tensors written for Megatron, a release (iteration 0)")


def torch_dist_to_torch_dist(options: argparse.Namespace, say: Say = print) -> None:
    """Rewrite a Megatron checkpoint for another layout, or without optimizer state."""
    checkpoint = TorchDistCheckpoint(options.load, iteration=options.ckpt_step)
    if options.drop_optimizer or options.average is not None or not checkpoint.iteration:
        to_torch_dist(options, say)
        return
    with one_process():
        _account(checkpoint, checkpoint.specs, checkpoint.flags, str(checkpoint.folder))
        record = read_run_record(checkpoint.folder)
        source, flags = _padded(
            options, checkpoint, checkpoint.all_specs, checkpoint.flags, record=record
        )
        rewriting.check_layout(flags, options.layout)
        with _whole(options, checkpoint.folder) as folder:
            rewriting.copy(checkpoint, source, folder, flags, options.layout, record)
            keep_tokenizer(checkpoint.args, folder)
            if options.checks:
                tokens = fixed_tokens(flags)
                before = _megatron_logits(checkpoint, checkpoint.flags, tokens)
                say(check(before, _read_back(folder, tokens)))
    count = len(source.specs)
    say(f"{options.save}: {count} tensors written for Megatron, iteration {checkpoint.iteration}")


def upcycle(options: argparse.Namespace, say: Say = print) -> None:
    """Upcycle a dense model in any format to the Megatron model that `options.model` describes."""
    with one_process():
        dense = _weights(options)
        flags = upcycling.target_flags(dense.flags, options.model)
        rewriting.check_layout(flags, options.layout, is_new=True)
        huggingface.config_of(flags)  # checks that the sizes fit
        expected = megatron_model.expected_shapes(flags)
        plan = upcycling.plan(dense.source.specs, expected, flags)
        sparse = Converted(plan, dense.source, expected, where=dense.where)
        with _release(options, dense, flags, sparse) as folder:
            if options.checks:
                tokens = fixed_tokens(flags)
                before = _megatron_logits(dense.source, dense.flags, tokens)
                reason = upcycling.why_not_exact(dense.flags, flags)
                say(check_loss(before, _read_back(folder, tokens), tokens, why_not=reason))
    count = len(sparse.specs)
    say(f"{options.save}: {count} tensors written for Megatron, a release (iteration 0)")


def _checkpoint(options: argparse.Namespace) -> TorchDistCheckpoint:
    if options.average is None:
        return TorchDistCheckpoint(options.load, iteration=options.ckpt_step)
    return AveragedCheckpoint(options.load, iteration=options.ckpt_step, count=options.average)


def _weights(options: argparse.Namespace) -> Weights:
    """Open the folder to convert, and account for every tensor in it."""
    if options.source == "torch_dist":
        return _of_checkpoint(options)
    values = huggingface.read_config_json(options.load)
    files = SafetensorsFolder(options.load)
    kind = gpt2.MODEL_TYPE if options.source == "gpt2" else values["model_type"]
    form = FORMS.get(kind, huggingface)
    config = form.config_in(values, options.load)
    noted = values.get("unpadded_vocab_size")
    if not noted or form is not huggingface:
        huggingface.find_padding(config, options.load, noted)
    if form is gpt2:
        files.rename(gpt2.with_prefix)
    if form is not huggingface:
        files.leave_out(form.NO_WEIGHT)
        if config.tie_word_embeddings:
            files.leave_out_tied(form.HEAD, form.EMBEDDING)
    flags = huggingface.flags_of(config)
    default = GPT2_DIVISIBLE_BY if form is gpt2 else None
    source, flags = _padded(options, files, files.specs, flags, default=default)
    huggingface.build(config)  # checks that the sizes fit
    expected = megatron_model.expected_shapes(flags)
    plan = form.import_plan(expected, flags)
    converted = Converted(plan, source, expected, where=str(options.load))
    build = partial(huggingface.build, config)
    if form is not huggingface:
        build = partial(huggingface.build_theirs, huggingface.theirs_of(values))
    ids = huggingface.special_ids(config)
    record = {SPECIAL: ids} if any(number is not None for number in ids.values()) else None
    logits = partial(huggingface.logits, build, files)
    return Weights(converted, flags, str(options.load), logits, record)


def _of_checkpoint(options: argparse.Namespace) -> Weights:
    checkpoint = _checkpoint(options)
    record = read_run_record(checkpoint.folder)
    source, flags = _padded(options, checkpoint, checkpoint.specs, checkpoint.flags, record=record)
    where = str(checkpoint.folder)
    converted = _account(source, source.specs, flags, where)
    logits = partial(_megatron_logits, checkpoint, checkpoint.flags)
    return Weights(converted, flags, where, logits, record, checkpoint.args)


def _padded(
    options: argparse.Namespace,
    source: Source,
    specs: Mapping[str, Spec],
    flags: Mapping[str, Any],
    *,
    record: Mapping[str, Any] | None = None,
    default: int | None = None,
) -> tuple[Repadded, dict[str, Any]]:
    """Return a source whose vocabulary is padded as the options say, and the flags for it."""
    divisible_by = options.make_vocab_size_divisible_by or default
    rows = flags["padded_vocab_size"]
    if divisible_by is not None:
        tensor = sizes(options.layout, record)["tensor_model_parallel_size"]
        rows = padded_size(flags["vocab_size"], divisible_by=divisible_by, tensor_parallel=tensor)
    return Repadded(source, specs, flags, rows=rows), {**flags, "padded_vocab_size": rows}


def _account(
    source: Source, specs: Mapping[str, Spec], flags: Mapping[str, Any], where: str
) -> Converted:
    """Account for a source that already has Megatron's names."""
    expected = megatron_model.expected_shapes(flags)
    return Converted({name: Recipe((name,), same) for name in specs}, source, expected, where=where)


@contextlib.contextmanager
def _release(
    options: argparse.Namespace, before: Weights, flags: Mapping[str, Any], source: Source
) -> Iterator[Path]:
    """Write weights as a Megatron release, and publish it if the block does not raise.

    Args:
        flags: of the model in `source`, which is made from `before`.
    """
    record = converted_record(
        before.record,
        flags,
        options.layout,
        iteration=None,
        is_new_model=source is not before.source,
    )
    names = megatron_model.object_names(flags)
    objects: dict[str, Any] = {name: [None] for name in names}
    tokenizer = recorded_tokenizer(before.args)
    objects[COMMON] = [
        weights_state(
            flags,
            sizes(options.layout, before.record),
            dataclasses.asdict(tokenizer) if tokenizer else {},
        )
    ]
    with _whole(options, Path(before.where)) as folder:
        write_checkpoint(folder, None, tensors_of(source), objects, flags=flags, record=record)
        keep_tokenizer(before.args, folder)
        yield folder


@contextlib.contextmanager
def _whole(options: argparse.Namespace, source: Path) -> Iterator[Path]:
    """Make a hidden folder to write into; on success it replaces `options.save`.

    Ctrl-C, SIGTERM, a full disk and any other error remove what was written.

    Args:
        source: the folder that is read: `options.load`, or one checkpoint in it.

    Raises:
        UsageError: it cannot be written, or something would be lost.
    """
    target = options.save.resolve()  # a symlink stands for the folder it points to
    for folder in (options.load, source):
        check_target(target, folder, overwrite=options.overwrite)
    hidden = partial_folder(target)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
        yield hidden
        flush_folder(hidden)
        replace_folder(hidden, target)
    except OSError as error:
        name = error.filename or target
        raise UsageError(f"{name} cannot be written: {error.strerror or error}.") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(hidden, ignore_errors=True)


def _megatron_logits(source: Source, flags: Mapping[str, Any], tokens: Tensor) -> Tensor:
    return megatron_model.logits(megatron_model.build(flags), source, tokens)


def _read_back(run: Path, tokens: Tensor) -> Tensor:
    written = TorchDistCheckpoint(run)
    return _megatron_logits(written, written.flags, tokens)
