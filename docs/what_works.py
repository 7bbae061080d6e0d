"""Write docs/what-works.md: what the flag checks accept and refuse, system by system.

    PYTHONPATH=tests python docs/what_works.py

tests/unit/test_what_works.py fails if the page is out of date.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from support.in_process import forget_arguments, prepare_megatron

from megatron_smlp.errors import UsageError
from megatron_smlp.flags import check_run
from megatron_smlp.flags.check import check
from megatron_smlp.flags.defaults import fill_in
from megatron_smlp.flags.parse import build_parser, parse, parse_arguments
from megatron_smlp.flags.yaml_file import read_yaml
from megatron_smlp.platform import cpu

DOCS = Path(__file__).parent
PAGE = DOCS / "what-works.md"
PRESETS = "configs/paper/regular"
SYSTEMS = (
    *("smlp_deterministic", "smlp_partial", "gmlp", "amlp", "mixer"),
    *("transformer", "switch", "gshard", "base", "hash", "llama", "llama_moe"),
)
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 50257"
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size {stages}"
BUDGET = "cuda_without_a_gpu/test_device_budget.py"
LAYOUTS = "invariants/test_layouts.py"
RECOMPUTED = "unit/layers/test_recompute.py"
MUON = "invariants/test_muon.py"
MUON_FLAGS = "--optimizer muon --no-overlap-param-gather"
GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 1"
ENGINE = "--transformer-impl transformer_engine"
BUILT = "unit/test_transformer_engine.py"
CUDA = "cuda_without_a_gpu/test_training_on_cuda.py"


STAGES = 0
"""Stands for as many ranks as the smallest pipeline that divides the layers of a preset."""


class Row(NamedTuple):
    """Something that a run may ask for."""

    title: str
    flags: str
    test: str
    """File in tests/ that trains small models this way."""
    ranks: int = 1
    is_for_gpus: bool = False


ROWS = (
    Row("on a CPU", "", LAYOUTS),
    Row("on a GPU", "", CUDA, is_for_gpus=True),
    Row("data parallel", "", LAYOUTS, 2),
    Row("tensor parallel", TP, LAYOUTS, 2),
    Row("sequence parallel", f"{TP} --sequence-parallel", LAYOUTS, 2),
    Row("pipeline parallel", PP, LAYOUTS, STAGES),
    Row("interleaved pipeline", f"{PP} --num-layers-per-virtual-pipeline-stage 1", LAYOUTS, STAGES),
    Row("expert parallel", "--expert-model-parallel-size 2", LAYOUTS, 2),
    Row("context parallel", "--context-parallel-size 2", LAYOUTS, 2),
    Row("distributed optimizer", "--use-distributed-optimizer", LAYOUTS, 2),
    Row("Muon", MUON_FLAGS, MUON),
    Row("Muon, spread over ranks", f"{MUON_FLAGS} --use-distributed-optimizer", MUON, 2),
    Row("muP", "--use-mup --mup-base-hidden-size 256", LAYOUTS),
    Row("bf16", "--bf16", LAYOUTS),
    Row("fp16", "--no-bf16 --no-cross-entropy-loss-fusion --fp16", CUDA, is_for_gpus=True),
    Row(
        "full recomputation",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        RECOMPUTED,
    ),
    Row("selective recomputation", "--recompute-granularity selective", RECOMPUTED),
    Row("CUDA graphs", "--cuda-graph-impl local", BUDGET, is_for_gpus=True),
    Row("Toeplitz matrices", "--toeplitz", LAYOUTS),
    Row("rotary positions", "--position-embedding-type rope", LAYOUTS),
    Row("SwiGLU", "--swiglu", LAYOUTS),
    Row("norms of queries and keys", "--qk-layernorm", LAYOUTS),
    Row("attention within documents", "--reset-attention-mask", LAYOUTS, 2),
    Row("positions of each document", "--reset-position-ids", LAYOUTS),
    Row("sliding windows", f"{ENGINE} --window-size 64,0", BUILT, is_for_gpus=True),
    Row("experts in groups", GROUPS, LAYOUTS),
)


def refusal(system: str, row: Row) -> str | None:
    """Return why the checks refuse a row for a preset; None if they do not."""
    path = DOCS.parent / PRESETS / f"{system}.yaml"
    preset = read_yaml(path)
    layers, own = preset["num-layers"], preset["architecture"]
    stages = next(size for size in range(2, layers + 1) if layers % size == 0)
    argv = f"--config {path} {DATA} {row.flags.format(stages=stages)}".split()
    layout = {"WORLD_SIZE": str(row.ranks or stages), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    said_by_megatron = contextlib.redirect_stdout(io.StringIO())
    with patch.dict(os.environ, layout), said_by_megatron:
        try:
            if row.is_for_gpus:
                with patch.object(cpu, "needed", lambda: False), with_transformer_engine():
                    check_alone(argv)
            else:
                parse_arguments(argv)
        except UsageError as error:
            return re.sub(f"(this )?--architecture {own}\\b", "this --architecture", str(error))
        finally:
            forget_arguments()
    return None


def with_transformer_engine() -> contextlib.AbstractContextManager[object]:
    """Check as if Transformer Engine were installed."""
    return patch.object(check_run, "find_spec", lambda name: name == "transformer_engine")


def check_alone(argv: list[str]) -> None:
    """Check without Megatron's own validation, which queries the device."""
    args = parse(build_parser(), argv)
    fill_in(args)
    check(args)


def table() -> dict[str, list[str | None]]:
    """Return one column per system: its refusals, by row."""
    return {system: [refusal(system, row) for row in ROWS] for system in SYSTEMS}


def alike(columns: dict[str, list[str | None]]) -> Iterator[tuple[list[str], list[str | None]]]:
    """Yield groups of systems with the same rows refused, and the first one's refusals."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for system, column in columns.items():
        groups.setdefault(tuple(said is None for said in column), []).append(system)
    for systems in groups.values():
        yield systems, columns[systems[0]]


def page() -> str:
    """Return the text of the page."""
    groups = list(alike(table()))
    reasons: dict[str, int] = {}
    lines = []
    for number, row in enumerate(ROWS):
        cells = []
        for _, column in groups:
            said = column[number]
            mark = "untried" if row.is_for_gpus else "yes"
            if said is not None:
                mark = f"no ({reasons.setdefault(said, len(reasons) + 1)})"
            cells.append(mark)
        is_taken = any(column[number] is None for _, column in groups)
        title = f"[{row.title}](../tests/{row.test})" if is_taken else row.title
        lines.append(f"| {title} | {' | '.join(cells)} |")
    names = ["<br>".join(systems) for systems, _ in groups]
    return "\n".join(
        (
            HEAD,
            f"| | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
            *lines,
            "",
            "Refused:",
            "",
            *(f"{number}. {said}" for said, number in reasons.items()),
            "",
        )
    )


HEAD = f"""# What works where

What `pretrain_smlp.py` takes of these presets of [{PRESETS}](../{PRESETS}/) on a CPU: *yes*, or
*no*, with the refusal below. *untried*: on a GPU, where nothing has been tried
([gpus.md](gpus.md)); the tests run it with the CPU in place of one. Each row links the tests that
train small models so. Export, generation, evaluation and checkpoints take all systems.
`docs/what_works.py` wrote this.
"""


if __name__ == "__main__":
    prepare_megatron()
    PAGE.write_text(page(), encoding="utf-8")
