"""`tools/estimate.py`: what a configuration costs, before anything heavy is started."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_smlp.accounting.costs import (
    ModelShape,
    forward_tflops_per_1024_tokens,
    model_cost,
)
from megatron_smlp.accounting.footprint import ParallelLayout, footprint
from megatron_smlp.command_line import Parser, flag_of
from megatron_smlp.flags.config_file import read_yaml, spelling
from megatron_smlp.options import model_defaults
from megatron_smlp.systems import ARCHITECTURES

_REQUIRED = ("num_layers", "hidden_size", "seq_length")
_LAYOUT: dict[str, Any] = {
    "vocab_size": 50257,
    "disable_bias_linear": False,
    "make_vocab_size_divisible_by": 128,
    "micro_batch_size": 1,
    "global_batch_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "world_size": None,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "bf16": False,
    "fp16": False,
    "recompute_granularity": None,
}
_DEFAULTS = {**model_defaults(), "token_router": None, "position_embedding_type": None} | _LAYOUT
_ON_COMMAND_LINE = (
    "vocab_size",
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
)


def estimate(values: dict[str, Any]) -> dict[str, Any]:
    """values: flags by name, with underscores; others than sizes and layouts are ignored.

    Returns:
        total_parameters, active_parameters (per token), zero_parameters (those of both that lie
        above the diagonals of spatial matrices), experts_per_token (that a rule may send it to;
        training may send it to fewer), forward_tflops_per_1024_tokens (full squares, the
        paper's convention), forward_needed_tflops_per_1024_tokens (causal products as triangles),
        per_gpu (bytes; see footprint.Footprint).

    Raises:
        ValueError: a size is missing, misspelt or does not fit the others.
    """
    args = resolve(values)
    shape = ModelShape.from_args(args)
    cost = model_cost(shape)
    paper, needed = forward_tflops_per_1024_tokens(cost, shape)
    per_gpu = footprint(shape, ParallelLayout.from_args(args))
    return {
        "total_parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "zero_parameters": cost.zero_parameters,
        "experts_per_token": shape.moe_router_topk if shape.num_experts else 0,
        "forward_tflops_per_1024_tokens": paper,
        "forward_needed_tflops_per_1024_tokens": needed,
        "per_gpu": asdict(per_gpu)
        | {
            "memory_bytes": per_gpu.memory_bytes,
            "communication_bytes": per_gpu.communication_bytes,
        },
    }


def resolve(values: dict[str, Any]) -> argparse.Namespace:
    """Fill in what Megatron and `pretrain_smlp.py` would."""
    _refuse_misspelt(values)
    missing = [name for name in _REQUIRED if not values.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: give a positive number for each")
    args = argparse.Namespace(**(_DEFAULTS | values))
    if not isinstance(args.moe_layer_freq, int | list):
        raise ValueError(f"moe_layer_freq {args.moe_layer_freq}: give a number or a list as [0, 1]")
    args.num_attention_heads = args.num_attention_heads or 1
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.ffn_hidden_size = args.ffn_hidden_size or _default_width(args)
    # Experts of nobody's rule are counted as those of the simplest one.
    args.token_router = args.token_router or ("switch" if args.num_experts else "none")
    args.untie_embeddings_and_output_weights |= args.input_projection == "minhash"
    args.add_bias_linear = not args.disable_bias_linear
    if args.position_embedding_type is None:
        args.position_embedding_type = ARCHITECTURES[args.architecture].positions
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    padded = -(-args.vocab_size // multiple) * multiple
    args.padded_vocab_size = args.padded_vocab_size or padded
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    args.world_size = args.world_size or model_parallel * args.expert_model_parallel_size
    if args.num_experts and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True  # as pretrain_smlp.py does
    return args


def _default_width(args: argparse.Namespace) -> int:
    """Return Megatron's --ffn-hidden-size: a gated FFN has 2 / 3 of the width, in steps of 64."""
    return int((4 * args.hidden_size * 2 / 3) / 64) * 64 if args.swiglu else 4 * args.hidden_size


def _refuse_misspelt(values: dict[str, Any]) -> None:
    known = [*_DEFAULTS, *_REQUIRED]
    for name in set(values) - set(known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if close:
            raise ValueError(f"unknown key {name!r}: did you mean {close[0]!r}?")


def _table(result: dict[str, Any]) -> str:
    gpu = result["per_gpu"]
    giga = {name: f"{value / 2**30:12.3f} GiB" for name, value in gpu.items()}
    lines = [
        f"total parameters            {result['total_parameters']:>16,}",
        f"active parameters           {result['active_parameters']:>16,}",
        f"  zeros above diagonals     {result['zero_parameters']:>16,}",
        f"experts of a token, at most {result['experts_per_token']:>16,}",
        "forward TFLOPs per 1024 tokens",
        f"  full squares (paper)      {result['forward_tflops_per_1024_tokens']:>16.4f}",
        f"  needed (triangles)        {result['forward_needed_tflops_per_1024_tokens']:>16.4f}",
        "one GPU of the fullest pipeline stage",
        f"  parameters                {gpu['parameters']:>16,}",
    ]
    names = ("weight", "gradient", "optimizer", "activation", "memory")
    lines += [f"  {name:26}{giga[name + '_bytes']:>16}" for name in names]
    lines.append("sent by it in one optimizer step")
    kinds = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel")
    lines += [f"  {kind.replace('_', ' '):26}{giga[kind + '_bytes']:>16}" for kind in kinds]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where the configuration is refused."""
    parser = Parser(
        prog="estimate.py",
        description="Parameters, FLOPs, memory and communication of a configuration.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of flags")
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name in _ON_COMMAND_LINE:
        parser.add_argument(flag_of(name), type=int, help="instead of the file's value")
    options = parser.parse_args(argv)
    try:
        values = {spelling(key): value for key, value in read_yaml(options.config).items()}
        given = {name: getattr(options, name) for name in _ON_COMMAND_LINE}
        result = estimate(values | {k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        print(f"estimate.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0
