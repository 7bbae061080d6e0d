"""The command line of tools/evaluate.py: score tasks or a dataset, print and write the results."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import Parser, flag_of, require_positive
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.generation.cli import add_source_arguments, check_model_arguments

EPILOG = """\
Other flags go to Megatron (with --checkpoint): the layout to evaluate in, for example
--tensor-model-parallel-size 2 under torchrun."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate.py",
        description="Zero-shot tasks, or perplexity, of a checkpoint or an exported model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_source_arguments(parser)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="A,B", help="copa,piqa,... or any harness task")
    tasks.add_argument("--data-dir", metavar="DIR", help="local task files; no network")
    tasks.add_argument(
        "--include-path", metavar="DIR",
        help="YAML files of your own harness tasks, for use in --tasks",
    )  # fmt: skip
    tasks.add_argument(
        "--prompt-style", choices=["lm_eval", "paper"], default="lm_eval",
        help="COPA prompts (default lm_eval)",
    )  # fmt: skip
    tasks.add_argument("--samples", metavar="FILE", help="per-example scores, as JSON lines")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data-path", metavar="PREFIX", help="a .bin/.idx pair, read once, whole")
    text.add_argument("--split", metavar="A,B,C", help="of the run: read only its validation set")
    text.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: no overlap)"
    )
    text.add_argument(
        "--suffix-from", type=float, metavar="P",
        help="also report perplexity from position P, or a fraction of T, on (default: the prefix "
        "of partial prediction, else none)",
    )  # fmt: skip
    text.add_argument(
        "--breakdown", action="store_true",
        help="also report the loss by position, token frequency, repetition, and document (if 100 "
        "or fewer)",
    )  # fmt: skip
    text.add_argument(
        "--allow-tokenizer-mismatch", action="store_true",
        help="accept data whose manifest names another vocabulary than the model's tokenizer",
    )  # fmt: skip
    both = parser.add_argument_group("both")
    both.add_argument(
        "--limit", type=int, metavar="N",
        help="only the first N examples of each task, or N windows spread over the dataset",
    )  # fmt: skip
    both.add_argument(
        "--seq-length", type=int, metavar="N",
        help="sequence length for --checkpoint (default: that of training; can be longer with "
        "--toeplitz)",
    )  # fmt: skip
    both.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    both.add_argument("--output", metavar="FILE", help="write the results as JSON")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our options, and the remaining flags, which are Megatron's.

    Raises:
        UsageError: flags that do not go together.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(list(argv))
    check_model_arguments(options)
    if bool(options.tasks) == bool(options.data_path):
        raise UsageError("give either --tasks copa,piqa,... or --data-path PREFIX (perplexity)")
    if options.hf and options.tasks and options.seq_length:
        raise UsageError(
            "--seq-length requires --checkpoint DIR, the run that --hf came from, or "
            "--data-path PREFIX"
        )
    text_flags = ("stride", "split", "suffix_from", "breakdown", "allow_tokenizer_mismatch")
    task_flags = ("data_dir", "include_path", "prompt_style", "samples")
    for flags, excludes, instead in (
        (text_flags, options.tasks, "--data-path PREFIX"),
        (task_flags, options.data_path, "--tasks A,B"),
        (("device",), options.checkpoint, "--hf DIR"),
    ):
        for flag in flags:
            value = getattr(options, flag)
            if excludes and value != parser.get_default(flag):
                given = flag_of(flag) if value is True else f"{flag_of(flag)} {value}"
                raise UsageError(f"{given} requires {instead}")
    if options.hf and rest:
        raise UsageError(f"{rest[0]} is not a flag of evaluate.py --hf; see `--help`")
    require_positive(options, "limit", "batch_size", "stride", "seq_length")
    for flag in ("output", "samples"):  # found before hours of work, not after them
        path = getattr(options, flag)
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise UsageError(f"--{flag} {path}: the folder {Path(path).parent} does not exist")
    return options, rest


def main(argv: Sequence[str] | None = None) -> None:
    options, megatron_flags = parse(sys.argv[1:] if argv is None else argv)
    from megatron_smlp.training.captured_output import CapturedOutput

    # Megatron and torch print a lot; only the results go to the terminal.
    with CapturedOutput() as output:
        output.open(None, rank=0)
        evaluate(options, megatron_flags)
        import torch

        # A rank that exited early would tear down what the others still communicate through.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def evaluate(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Measure what `options` ask for, and report it on rank 0."""
    measure = evaluate_text if options.data_path else evaluate_tasks
    measure(options, megatron_flags)


def evaluate_text(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Print the perplexity of a dataset, one number per line."""
    if options.hf:
        facts, scorer, tokenizer = _exported_scorer(options)
    else:
        facts, scorer, tokenizer = _scorer(options, megatron_flags)
    from megatron_smlp.evaluation.perplexity import measure
    from megatron_smlp.training.captured_output import terminal

    suffix_from = _suffix_from(options.suffix_from, facts, longest=scorer.longest)
    result = measure(scorer, tokenizer, options, suffix_from=suffix_from)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    numbers = dict(result)
    for name, bins in numbers.pop("breakdown", {}).items():
        print(f"{name:12}{'tokens':>10}{'loss':>10}{'sd':>10}", file=terminal())
        for kind in bins:
            row = f"{kind['tokens']:>10,}{kind['loss']:>10.4f}{kind['sd']:>10.4f}"
            print(f"  {kind['label']:10}{row}", file=terminal())
    for name, value in numbers.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name.replace('_', ' ')}: {shown}", file=terminal(), flush=True)
    if options.output:
        model = {"hf": options.hf}
        if options.checkpoint:
            model = {"checkpoint": options.checkpoint, "iteration": facts.ckpt_step}
        asked = {name: getattr(options, name) for name in ("data_path", "split", "limit", "dtype")}
        about = {**model, **asked, "seq_length": scorer.longest, **result}
        Path(options.output).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _suffix_from(given: float | None, facts: argparse.Namespace, *, longest: int) -> int:
    """Return P for windows of `longest` tokens: `given`, else that of partial prediction."""
    from megatron_smlp.partial_prediction import prefix_length, suffix_start

    if given is not None:
        return suffix_start(argparse.Namespace(suffix_from=given, seq_length=longest))
    start = prefix_length(facts, seq_length=facts.seq_length)
    return start if start < longest else 0  # shorter windows have no default suffix


def evaluate_tasks(options: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Score zero-shot tasks, print a table, and write the requested files."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    from megatron_smlp.evaluation.selection import select_tasks, split_names

    require_package("lm_eval", purpose="--tasks", extra="'megatron-smlp[eval]'")
    from megatron_smlp.library_logging import quiet_libraries

    with quiet_libraries():
        selection = select_tasks(
            split_names(options.tasks),
            data_dir=options.data_dir,
            prompt_style=options.prompt_style,
            include_path=options.include_path,
        )
        iteration, model = _harness_model(options, megatron_flags)
        from megatron_smlp.evaluation.harness import run_tasks

        _report(options, run_tasks(model, selection, limit=options.limit), iteration=iteration)


def _harness_model(
    options: argparse.Namespace, megatron_flags: Sequence[str]
) -> tuple[int | None, Any]:
    """Return the iteration of --checkpoint, None with --hf, and the model for the harness."""
    if options.hf:
        from megatron_smlp.evaluation.huggingface_model import ExportedModel
        from megatron_smlp.generation.language_model import usable_device

        device = usable_device(options.device)  # lm-eval silently replaces an unusable one
        about = {"batch_size": options.batch_size, "device": device, "dtype": options.dtype}
        return None, ExportedModel(options.hf, **about)
    args, scorer, tokenizer = _scorer(options, megatron_flags)
    from megatron_smlp.data.tokenizers.factory import start_of
    from megatron_smlp.evaluation.harness import ScorerModel

    about = {"start": start_of(tokenizer, args), "shows_progress": args.rank == 0}
    return args.ckpt_step, ScorerModel(scorer, tokenizer, **about)


def _scorer(options: argparse.Namespace, megatron_flags: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return the arguments, scorer and tokenizer of --checkpoint, in the layout of the flags."""
    from megatron_smlp.evaluation.megatron_loading import load_model, sequence_length

    args, stages, tokenizer = load_model(options.checkpoint, megatron_flags, dtype=options.dtype)
    from megatron_smlp.evaluation.megatron_scorer import MegatronScorer

    longest = sequence_length(args, options.seq_length)
    end = tokenizer.eod if options.data_path else None
    scorer = MegatronScorer(stages, longest=longest, batch_size=options.batch_size, end=end)
    return args, scorer, tokenizer


def _exported_scorer(options: argparse.Namespace) -> tuple[argparse.Namespace, Any, Any]:
    """Return the facts that --suffix-from needs, scorer and tokenizer of --hf, in one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--hf with --data-path runs in one process: omit torchrun")
    from megatron_smlp.evaluation.exported_scorer import ExportedScorer
    from megatron_smlp.generation.language_model import check_with_tokenizer, model_and_tokenizer
    from megatron_smlp.library_logging import quiet_libraries

    check_with_tokenizer(Path(options.hf))
    with quiet_libraries():
        model, tokenizer, _ = model_and_tokenizer(
            argparse.Namespace(**vars(options), tokenizer_type=None, tokenizer_model=None)
        )
    most = int(model.config.max_position_embeddings)
    longest = options.seq_length or most
    if longest > most:
        raise UsageError(f"--seq-length {longest}: --hf {options.hf} has {most} positions")
    facts = argparse.Namespace(
        seq_length=most,
        feature_router=getattr(model.config, "feature_router", None) or "none",
        prefix_fraction=getattr(model.config, "prefix_fraction", None),
    )
    scorer = ExportedScorer(model, longest=longest, batch_size=options.batch_size)
    return facts, scorer, tokenizer


def _report(options: argparse.Namespace, scored: Iterable[Any], *, iteration: int | None) -> None:
    """Rewrite the requested files as each task ends, so that a later failure keeps its results."""
    from megatron_smlp.evaluation import reports
    from megatron_smlp.training.captured_output import terminal

    is_first = int(os.environ.get("RANK", "0")) == 0
    source = str(options.hf or options.checkpoint)
    results = []
    try:
        for result in scored:
            results.append(result)
            if is_first:
                _write(options, results, source=source, iteration=iteration)
    finally:
        if is_first and results:
            reports.print_table(results, terminal(), title=f"Zero-shot: {source}")


def _write(
    options: argparse.Namespace, results: Sequence[Any], *, source: str, iteration: int | None
) -> None:
    from megatron_smlp.evaluation import reports

    if options.output:
        names = ("dtype", "limit", "prompt_style", "seq_length")
        kept = {"iteration": iteration, **{name: getattr(options, name) for name in names}}
        about = {"path": source, "kind": "hf" if options.hf else "checkpoint", **kept}
        reports.write_json(Path(options.output), model=about, results=results)
    if options.samples:
        reports.write_samples(Path(options.samples), results)
