"""tools/evaluate.py: options -> a model -> tasks or perplexity -> console, JSON, markdown."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.options import parse


def main(argv: Sequence[str] | None = None) -> None:
    options, megatron_flags = parse(sys.argv[1:] if argv is None else argv)
    from megatron_smlp.training.captured_output import CapturedOutput

    with (
        CapturedOutput() as output
    ):  # Megatron and torch print much; the results go to the terminal
        output.open(None, rank=0)
        evaluate(options, megatron_flags)
        _end_together()


def evaluate(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    if options.data_path:
        evaluate_text(options, megatron_flags)
    else:
        evaluate_tasks(options, megatron_flags)


def _end_together() -> None:
    """A rank that left early would tear down what the others still talk through."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def evaluate_text(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Print the perplexity of a dataset, a number a line."""
    args, scorer, tokenizer = _scorer(options, megatron_flags)
    from megatron_smlp.evaluation.perplexity import measure
    from megatron_smlp.options import suffix_start
    from megatron_smlp.training.captured_output import terminal

    flags = argparse.Namespace(**{**vars(args), "suffix_from": options.suffix_from})
    try:
        suffix_from = suffix_start(flags, seq_length=args.seq_length)
    except ValueError as error:
        raise UsageError(str(error)) from error
    result = measure(
        scorer,
        tokenizer,
        options.data_path,
        stride=options.stride,
        suffix_from=suffix_from,
        split=options.split,
    )
    if args.rank != 0:
        return
    for name, value in result.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name.replace('_', ' ')}: {shown}", file=terminal(), flush=True)
    if options.output:
        about = {"checkpoint": options.checkpoint, "data_path": options.data_path, **result}
        Path(options.output).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def evaluate_tasks(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    from megatron_smlp.evaluation.selection import require_harness, select_tasks, split_names

    require_harness()
    from megatron_smlp.evaluation.harness import run_tasks
    from megatron_smlp.library_logging import quiet_libraries

    with quiet_libraries():
        selection = select_tasks(
            split_names(options.tasks), data_dir=options.data_dir, prompt_style=options.prompt_style
        )
        model = _harness_model(options, megatron_flags)
        results = run_tasks(model, selection, limit=options.limit)
    if int(os.environ.get("RANK", "0")) == 0:
        _report(options, results)


def _harness_model(options: argparse.Namespace, megatron_flags: Sequence[str]) -> Any:
    if options.hf:
        from megatron_smlp.evaluation.huggingface_model import ExportedModel

        return ExportedModel(
            options.hf,
            batch_size=options.batch_size,
            device=options.device or default_device(),
            dtype=options.dtype,
        )
    args, scorer, tokenizer = _scorer(options, megatron_flags)
    from megatron_smlp.evaluation.adapter import ScorerModel

    def generator() -> Any:
        from megatron_smlp.generation.language_model import of_checkpoint

        return of_checkpoint(
            options.checkpoint, tokenizer, dtype=options.dtype, device=str(scorer.device)
        )

    return ScorerModel(scorer, tokenizer, speaks=args.rank == 0, generator=generator)


def _scorer(options: argparse.Namespace, megatron_flags: Sequence[str]) -> tuple[Any, Any, Any]:
    """Arguments, scorer and tokenizer of --checkpoint, in the layout of the flags."""
    from megatron_smlp.evaluation.megatron_loading import load_model, sequence_length

    args, stages, tokenizer = load_model(options.checkpoint, megatron_flags, dtype=options.dtype)
    from megatron_smlp.evaluation.megatron_model import MegatronScorer

    longest = sequence_length(args, options.seq_length)
    scorer = MegatronScorer(stages, longest=longest, batch_size=options.batch_size)
    return args, scorer, tokenizer


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(options: argparse.Namespace, results: Sequence[Any]) -> None:
    from rich.console import Console

    from megatron_smlp.evaluation.reports import as_markdown, print_table, write_json
    from megatron_smlp.evaluation.results import write_samples
    from megatron_smlp.training.captured_output import terminal

    source = options.hf or options.checkpoint
    console = Console(file=terminal(), highlight=False, soft_wrap=True)
    print_table(results, console, title=f"Zero-shot: {source}")
    if options.output:
        about = {
            "path": str(source),
            "kind": "hf" if options.hf else "checkpoint",
            "dtype": options.dtype,
            "limit": options.limit,
            "prompt_style": options.prompt_style,
        }
        write_json(Path(options.output), model=about, results=results)
    if options.samples:
        write_samples(list(results), Path(options.samples))
    if options.markdown:
        text = as_markdown(results, model=str(source))
        Path(options.markdown).write_text(text, encoding="utf-8")
