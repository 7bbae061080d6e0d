"""The command line of tools/generate.py: continue a prompt, a file of them, or a conversation."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smlp.command_line import Parser, flag_of, require_positive
from megatron_smlp.errors import UsageError

if TYPE_CHECKING:
    from megatron_smlp.generation.completion import Completion
    from megatron_smlp.generation.language_model import LanguageModel

EPILOG = """\
Without --prompt or --prompts-file, prompts are read from the terminal, one per line; Ctrl-D ends.
Generation stops with a message on stderr at the model's last position, the --seq-length of its
run."""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, its dtype and its device."""
    model = parser.add_argument_group("model (one of the first two)")
    model.add_argument(
        "--checkpoint",
        "--load",
        metavar="DIR",
        help="a run's --save folder, or an iter_ folder",
    )
    model.add_argument("--hf", metavar="DIR", help="output of tools/convert_checkpoint.py --to hf")
    model.add_argument("--device", help="(default: a GPU if available)")
    model.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of weights and computation (default: as stored)",
    )  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, its tokenizer, and the device it runs on."""
    from megatron_smlp.data.tokenizers.spec import add_tokenizer_arguments

    add_source_arguments(parser)
    parser.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration of --checkpoint (default: the newest)"
    )
    add_tokenizer_arguments(parser, required=False)


def check_model_arguments(options: argparse.Namespace) -> None:
    """Check the flags of `add_model_arguments`, before torch is imported.

    Raises:
        UsageError: not exactly one model is given, its folder does not exist, or --hf would ignore
            a flag.
    """
    if bool(options.checkpoint) == bool(options.hf):
        raise UsageError("give one model: --checkpoint DIR (of a run) or --hf DIR (exported)")
    if options.hf and (step := getattr(options, "ckpt_step", None)) is not None:
        raise UsageError(f"--ckpt-step {step} requires --checkpoint DIR")
    if options.hf and getattr(options, "trust_remote_code", False) and not options.tokenizer_type:
        raise UsageError("--trust-remote-code requires --checkpoint DIR or --tokenizer-type")
    flag = "checkpoint" if options.checkpoint else "hf"
    folder = getattr(options, flag)
    if not Path(folder).is_dir():
        raise UsageError(f"--{flag} {folder}: no such folder")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="generate.py",
        description="Continue prompts with a checkpoint, in any layout, or an exported model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", metavar="TEXT", help="print it with its continuation")
    prompts.add_argument(
        "--prompts-file", metavar="FILE",
        help='a prompt per line, or {"prompt": ...} per line of a .jsonl; prints JSON lines',
    )  # fmt: skip
    prompts.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="(default 64)"
    )
    sampling.add_argument(
        "--temperature", type=float,
        help="0: the likeliest token (default 0.8; 0 with --num-beams alone)",
    )  # fmt: skip
    sampling.add_argument("--top-k", type=int, help="0: all tokens (default 50)")
    sampling.add_argument("--top-p", type=float, help="(default 1: all tokens)")
    sampling.add_argument("--num-beams", type=int, default=1, help="beam search (default 1: none)")
    sampling.add_argument("--num-samples", type=int, default=1, help="of each prompt (default 1)")
    sampling.add_argument("--seed", type=int, default=0, help="(default 0)")
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    check_model_arguments(options)
    if options.temperature is None:
        draws = options.num_beams == 1 or options.top_k is not None or options.top_p is not None
        options.temperature = 0.8 if draws else 0.0
    options.top_k = 50 if options.top_k is None else options.top_k
    options.top_p = 1.0 if options.top_p is None else options.top_p
    _check(options)
    prompts = read_prompts(Path(options.prompts_file)) if options.prompts_file else []
    # Imported late: torch takes seconds, and --help and wrong flags should not.
    import torch

    from megatron_smlp.generation.language_model import load
    from megatron_smlp.library_logging import quiet_libraries

    with quiet_libraries():
        lm = load(options)
        torch.manual_seed(options.seed)
        if options.prompts_file:
            _run_file(lm, prompts, options)
        elif options.prompt is not None:
            _run_one(lm, options.prompt, options, where="--prompt")
        else:
            _converse(lm, options)


def _check(options: argparse.Namespace) -> None:
    from megatron_smlp.generation.language_model import COLDEST

    if options.prompt is not None and options.prompts_file:
        raise UsageError("give --prompt or --prompts-file, not both")
    require_positive(options, "max_new_tokens", "num_beams", "num_samples", "batch_size")
    for flag, is_allowed, allowed in (
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "over 0 and at most 1"),
    ):
        if not is_allowed:
            raise UsageError(f"{flag_of(flag)} {getattr(options, flag)}: give {allowed}")
    draws_freely = options.num_beams == 1 and options.temperature >= COLDEST
    if options.num_samples > options.num_beams and not draws_freely:
        raise UsageError(
            f"--num-samples {options.num_samples} with --num-beams {options.num_beams} and "
            f"--temperature {options.temperature:g}: a search yields one text per beam; "
            "give as many --num-beams, or none and a temperature over 0"
        )


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Return (name for messages, prompt) of each line that is not blank.

    Raises:
        UsageError: the file cannot be read, or a line of a .jsonl has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts-file {path} cannot be read: {error}") from error
    prompts = [
        (where, _from_json(line, where) if path.suffix == ".jsonl" else line.rstrip("\r"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
        for where in [f"{path}, line {number}"]
    ]
    if not prompts:
        raise UsageError(f"--prompts-file {path} has no prompts: give one per line")
    return prompts


def _from_json(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UsageError(f'{where} has no "prompt" string')
    return prompt


def _run_file(
    lm: LanguageModel, prompts: list[tuple[str, str]], options: argparse.Namespace
) -> None:
    from megatron_smlp.generation.completion import complete, encode_prompt

    # Encode all prompts first, to find a wrong line before hours of work, not after them.
    encoded = [(prompt, encode_prompt(lm, prompt, where=where)) for where, prompt in prompts]
    room = lm.longest - options.max_new_tokens
    # A prompt that will reach position T runs alone, so that it does not stop others early.
    for ends_early, group in itertools.groupby(encoded, key=lambda pair: len(pair[1]) > room):
        for batch in itertools.batched(group, 1 if ends_early else options.batch_size):
            texts, ids = zip(*batch, strict=True)
            given = (text for text in texts for _ in range(options.num_samples))
            for prompt, done in zip(given, complete(lm, ids, options), strict=True):
                record = {"prompt": prompt, "text": done.text, "num_tokens": done.num_tokens}
                print(json.dumps(record, ensure_ascii=False), flush=True)
                _report_the_end(lm, done)


def _run_one(lm: LanguageModel, prompt: str, options: argparse.Namespace, *, where: str) -> None:
    from megatron_smlp.generation.completion import complete, encode_prompt

    for done in complete(lm, [encode_prompt(lm, prompt, where=where)], options):
        print(prompt + done.text, flush=True)
        _report_the_end(lm, done)


def _report_the_end(lm: LanguageModel, done: Completion) -> None:
    if done.reached_the_end:
        print(
            f"generate.py: stopped at position {lm.longest}, the model's limit, "
            f"after {done.num_tokens} new tokens",
            file=sys.stderr,
        )


def _converse(lm: LanguageModel, options: argparse.Namespace) -> None:
    """Continue lines from a terminal or a pipe; a wrong one does not end the conversation."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            prompt = input(sign)
        except (EOFError, KeyboardInterrupt):
            return
        if not prompt.strip():
            continue
        try:
            _run_one(lm, prompt, options, where="the prompt")
        except UsageError as error:
            print(f"generate.py: {error}", file=sys.stderr)
