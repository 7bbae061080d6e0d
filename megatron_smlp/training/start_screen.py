"""The start screen and `--dry-run`: the model, its size and cost, the layout, the steps."""

from __future__ import annotations

import argparse
import enum
import itertools
import math
from collections.abc import Iterator
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_smlp.accounting.costs import (
    ModelShape,
    fingerprint_bytes,
    forward_tflops_per_1024_tokens,
    input_cost,
    layer_cost,
    model_cost,
)
from megatron_smlp.accounting.ranks import updates_by_layers
from megatron_smlp.systems import MIXERS, TOKEN_ROUTERS, LayerSlots

PRECISIONS = ("bf16", "fp16")
WIDTH = 40
"""Column up to which the comments that say where values come from are aligned."""


def print_dry_run(args: argparse.Namespace, console: Console) -> None:
    """Print the resolved configuration, the layer table, parameters and FLOPs."""
    shape = ModelShape.from_args(args)
    console.print("Configuration (flags and --config; other defaults: docs/from-megatron-lm.md)")
    for line in _configuration(args):
        console.print(line, markup=False)
    console.print()
    console.print(layer_table(args, shape))
    for line in summary(args, shape):
        console.print(line, markup=False)


def _configuration(args: argparse.Namespace) -> Iterator[str]:
    """Yield the given flags as lines of YAML, each with a comment on where its value comes from."""
    names = sorted(name for name in args.places if name != "config")
    lines = [f"{name}: {_in_yaml(getattr(args, name))}" for name in names]
    width = min(max(map(len, lines), default=0), WIDTH)
    for name, line in zip(names, lines, strict=True):
        yield f"{line:<{width}}  # {args.places[name]}"


def _in_yaml(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.name  # as the flag takes it
    value = value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]


def layer_table(args: argparse.Namespace, shape: ModelShape) -> Table:
    """Return a table with a row per run of equal layers: both slots, then per layer its parameters
    and forward GFLOPs per sequence, with full squares and with lower triangles.

    A narrow terminal wraps words, never numbers.
    """
    table = Table(title="Layers", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("token mixer", "channel mixer"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "GFLOPs", "needed"):
        table.add_column(name, justify="right", no_wrap=True)
    last = 0
    for slots, same in itertools.groupby(shape.slots):
        first, last = last + 1, last + len(list(same))
        cost = layer_cost(shape, slots)
        gflops = (f"{flops / 1e9:.2f}" for flops in (cost.square_flops, cost.flops))
        rows = str(first) if first == last else f"{first}-{last}"
        table.add_row(rows, *describe(args, slots), f"{cost.parameters:,}", *gflops)
    return table


def describe(args: argparse.Namespace, slots: LayerSlots) -> tuple[str, str]:
    """Return a text for each of the two slots."""
    router = args.token_router
    if router == "hash":
        table = "random" if args.hash_table is None else "balanced"
        router = f"hash, {"the checkpoint's" if args.load else table} table"
    rule = TOKEN_ROUTERS.get(args.token_router)
    if rule and rule.takes_topk:
        router += f", {args.moe_router_topk} a token"
    width = args.moe_shared_expert_intermediate_size
    shared = f", a shared one of width {width}" if width else ""
    channels = {
        "mlp": f"MLP, width {args.ffn_hidden_size}",
        "token_moe": f"token MoE ({router}), experts: {args.num_experts}{shared}",
        "none": "-",
    }
    mixer = MIXERS[slots.mixer].title.format_map({**vars(args), "heads": slots.heads})
    if args.toeplitz:
        mixer += ", Toeplitz"
    return mixer, channels.get(slots.channel, f"{slots.channel} (plugin)")


def summary(args: argparse.Namespace, shape: ModelShape) -> Iterator[str]:
    """Yield the lines of the start screen: model, size, layout, batch, precision."""
    cost = model_cost(shape)
    paper, needed = forward_tflops_per_1024_tokens(cost, shape)
    groups = itertools.groupby(describe(args, slots) for slots in shape.slots)
    layers = "; ".join(
        f"{len(list(same))} x {mixer}" + ("" if channel == "-" else f" + {channel}")
        for (mixer, channel), same in groups
    )
    dtype = next((name for name in PRECISIONS if getattr(args, name)), "fp32")
    yield f"model       {args.architecture}: {layers}"
    zeros = f" ({cost.zero_parameters:,} zeros above diagonals)" if cost.zero_parameters else ""
    yield (
        f"size        {cost.parameters:,} parameters, {cost.active_parameters:,} active per token"
        f"{zeros}; hidden {args.hidden_size}, T {args.seq_length}, "
        f"vocabulary {args.padded_vocab_size:,}"
    )
    yield (
        f"cost        {paper:.4f} TFLOPs forward per 1024 tokens "
        f"({needed:.4f} needed, without what lies above the diagonal)"
    )
    if args.input_projection == "minhash":
        yield f"input       {_hashes(args, shape)}"
    if note := _what_is_missing(args, shape):
        yield f"note        {note}"
    engine = "; Transformer Engine" if args.transformer_impl != "local" else ""
    yield f"layout      {layout(args)}; {dtype}{engine}"
    yield f"steps       {_steps(args)} tokens, micro-batch {args.micro_batch_size}"


def _hashes(args: argparse.Namespace, shape: ModelShape) -> str:
    return (
        f"minhash: {args.hash_count} hashes per token in {args.filter_size} counters, of "
        f"{args.window + 1} tokens; {input_cost(shape).parameters:,} parameters, and a fixed table "
        f"of {fingerprint_bytes(shape) / 2**20:.1f} MiB"
    )


def _what_is_missing(args: argparse.Namespace, shape: ModelShape) -> str | None:
    """Return a note if an sMLP lacks what its name promises."""
    if args.architecture != "smlp":
        return None
    has_features = any(slots.mixer == "feature_moe" for slots in shape.slots)
    has_tokens = any(slots.channel == "token_moe" for slots in shape.slots)
    if not (has_features or has_tokens):
        return "no layer has experts: this model equals --architecture gmlp"
    if not has_features:
        return "no spatial experts (--feature-router none): this is a gmlp with token experts"
    return None if has_tokens else "no token experts (--token-router none): only spatial ones"


def _steps(args: argparse.Namespace) -> str:
    if args.step_batch_size_schedule:
        batches = f"in batches by --step-batch-size-schedule '{args.step_batch_size_schedule}'"
        return f"{args.train_samples:,} samples {batches}, samples of {args.seq_length}"
    if args.train_iters:
        return f"{args.train_iters} x {args.global_batch_size} samples of {args.seq_length}"
    batches = f"in batches of {args.global_batch_size}"
    return f"{args.train_samples:,} samples {batches}, each of {args.seq_length}"


def layout(args: argparse.Namespace) -> str:
    """Return the layout as `4 processes: TP 2, PP 2, EP 1, DP 1`."""
    texts = [
        f"TP {args.tensor_model_parallel_size}" + (" + SP" if args.sequence_parallel else ""),
        f"PP {args.pipeline_model_parallel_size}",
        f"EP {args.expert_model_parallel_size}",
        f"DP {args.data_parallel_size}",
    ]
    if args.virtual_pipeline_model_parallel_size:
        texts[1] += f" x {args.virtual_pipeline_model_parallel_size} interleaved"
    if args.use_distributed_optimizer or updates_by_layers(args):
        texts.append("distributed optimizer")
    processes = f"{args.world_size} process" + ("es" if args.world_size > 1 else "")
    return f"{processes}: {', '.join(texts)}"
