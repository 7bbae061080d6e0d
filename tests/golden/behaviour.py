"""Resolve the command lines of every config, and write the result as text to compare.

    PYTHONPATH=tests:. python tests/golden/behaviour.py

writes namespaces.json and dry_runs.txt next to this file. They record today's behaviour: a change
that should change nothing leaves them as they are; any other shows in their diff what it changes.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from support.in_process import forget_arguments, prepare_megatron
from support.language_models import save_tokenizer

HERE = Path(__file__).parent
CONFIGS = Path(__file__).parents[2] / "configs"
NAMESPACES, DRY_RUNS = HERE / "namespaces.json", HERE / "dry_runs.txt"
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 4096"
STRINGS = "--mock-data --tokenizer-type HuggingFaceTokenizer --tokenizer-model"
# Number of processes, and flags on top of a file's.
COMBINATIONS = {
    "two tensor parallel ranks": (2, "--tensor-model-parallel-size 2 --save runs/golden"),
    "saving in the background": (1, "--async-save --save runs/golden --keep-last 2"),
    "bf16, recomputed, distributed optimizer": (
        2,
        "--bf16 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --use-distributed-optimizer --nonfinite-loss skip",
    ),
}
COMBINED = ("cpu/gmlp.yaml", "cpu/smlp_deterministic.yaml")
SHOWN = ("cpu/smlp_partial.yaml", "cpu/llama_moe.yaml", "paper/large/amlp.yaml")
# Internal to the package, or specific to this machine and checkout.
LEFT_OUT = {"command_line", "explicit_flags", "data_contents", "places"}
LEFT_OUT |= {"config", "tokenizer_model"}


def configs(folder: str = "") -> Iterator[Path]:
    """Return the files that each configure one system."""
    found = sorted((CONFIGS / folder).rglob("*.yaml"))
    return (path for path in found if path.parent.name not in ("base", "recipes"))


@functools.cache
def tokenizer() -> str:
    """Make a tokenizer of 4096 entries, for the input that hashes their strings."""
    folder = tempfile.mkdtemp(prefix="golden-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_tokenizer(Path(folder), entries=4096)
    return folder


@functools.cache
def parsed(path: Path, flags: str, *, processes: int) -> argparse.Namespace:
    """Return the resolved arguments of rank 0."""
    from megatron_smlp.flags.parse import parse_arguments

    os.environ |= {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    forget_arguments()
    prepare_megatron()
    data = f"{STRINGS} {tokenizer()}" if path.stem == "minhash" else DATA
    try:
        return parse_arguments(["--config", str(path), *data.split(), *flags.split()])
    finally:
        forget_arguments()


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything in a namespace, as JSON values."""
    return {
        name: value if isinstance(value, int | float | str | list | type(None)) else str(value)
        for name, value in sorted(vars(args).items())
        if name not in LEFT_OUT
    }


def beyond(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ; a missing name reads "(gone)"."""
    gone = {name: "(gone)" for name in known if name not in values}
    return gone | {n: v for n, v in values.items() if n not in known or known[n] != v}


def namespaces() -> dict[str, dict[str, Any]]:
    """Return how all files differ from the defaults, each file from that, and each combination
    from its file."""
    from megatron_smlp.flags.parse import build_parser

    defaults = plain(build_parser().parse_args([]))
    files = {str(path.relative_to(CONFIGS)): plain(parsed(path, "", processes=1))
             for path in configs()}  # fmt: skip
    changed = {name: beyond(own, defaults) for name, own in files.items()}
    first, *others = changed.values()
    shared = {n: v for n, v in first.items() if all((n, v) in other.items() for other in others)}
    found = {name: beyond(own, shared) for name, own in changed.items()} | {"all files": shared}
    for name in COMBINED:
        for title, (processes, flags) in COMBINATIONS.items():
            values = plain(parsed(CONFIGS / name, flags, processes=processes))
            found[f"{name}: {title}"] = beyond(values, files[name])
    return json.loads(json.dumps(found))


def dry_runs() -> str:
    """Return what --dry-run prints for some files, without what depends on the machine."""
    from megatron_smlp.training.start_screen import print_dry_run

    text = io.StringIO()
    for path in map(CONFIGS.joinpath, SHOWN):
        text.write(f"== {path.relative_to(CONFIGS)}\n")
        console = Console(file=text, width=100, highlight=False, soft_wrap=True)
        print_dry_run(parsed(path, "", processes=1), console)
    plain_text = text.getvalue().replace(tokenizer(), "TOKENIZER")
    return plain_text.replace(str(CONFIGS.parent), "...")


if __name__ == "__main__":
    sys.path.insert(0, str(CONFIGS.parent))
    NAMESPACES.write_text(json.dumps(namespaces(), indent=1, sort_keys=True) + "\n")
    DRY_RUNS.write_text(dry_runs())
