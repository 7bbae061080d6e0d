"""`tools/estimate.py`: estimate what a configuration costs, before anything heavy starts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_smlp.accounting.costs import (
    ModelShape,
    forward_tflops_per_1024_tokens,
    model_cost,
)
from megatron_smlp.accounting.footprint import footprint
from megatron_smlp.accounting.ranks import ParallelLayout, gathers
from megatron_smlp.command_line import Parser, did_you_mean, flag_of
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.spec import TokenizerSpec
from megatron_smlp.flags.check_model import check_attention, check_experts, check_sparse
from megatron_smlp.flags.megatron_flags import listed
from megatron_smlp.flags.yaml_file import StrictLoader, read_yaml, spelling
from megatron_smlp.options import (
    DEFAULTS,
    OUR_FLAGS,
    PLUGIN_OPTIONS,
    ModelOptions,
    choices_of,
    model_defaults,
)
from megatron_smlp.partial_prediction import prefix_length
from megatron_smlp.systems import ARCHITECTURES, BY_PREFIX, SPECS

_REQUIRED = ("num_layers", "hidden_size", "seq_length")
_LAYOUT: dict[str, Any] = {
    "vocab_size": 50257,
    "disable_bias_linear": False,
    "no_bias_swiglu_fusion": False,
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
    "optimizer_checkpoint": "any_layout",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "overlap_grad_reduce": False,
    "async_save": False,
    "bf16": False,
    "fp16": False,
    "grad_reduce_in_bf16": False,
    "accumulate_allreduce_grads_in_fp32": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_activations": False,
}
_UNCOUNTED: dict[str, Any] = {
    "num_layers_per_virtual_pipeline_stage": None,
    "ddp_bucket_size": None,
    "context_parallel_size": 1,
    "optimizer": "adam",
    "recompute_modules": ["core_attn"],
    "moe_token_dispatcher_type": "alltoall",
}
"""Flags that change memory or traffic in uncounted ways unless they have this value. So may any
flag that a run accepts only as untested."""
_GATHERED_BYTES = 12
"""Bytes per parameter: its fp32 value and Adam's two moments."""
_PINNED = 2
"""Upper bound on pinned bytes per byte copied: torch rounds blocks up to powers of two."""
_DEFAULTS = {**model_defaults(), "token_router": None, "position_embedding_type": None} | _LAYOUT
_CHOICES: dict[str, tuple[str, ...]] = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
}
_SIZES = {
    *_REQUIRED,
    *("num_feature_chunks", "ffn_hidden_size", "num_attention_heads"),
    *("kv_channels", "max_position_embeddings", "num_experts", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "padded_vocab_size", "global_batch_size"),
    *("expert_tensor_parallel_size", "world_size", "recompute_num_layers"),
    *(name for name, default in _DEFAULTS.items() if type(default) is int),
} - {"rotary_base", "moe_layer_freq"}
"""Flags whose value must be an integer."""
_KNOWN = {*_DEFAULTS, *_REQUIRED, *(field.name for field in dataclasses.fields(TokenizerSpec))}
EPILOG = """
Flags are those of pretrain_smlp.py, whose command line can be given unchanged; they override the
file, and --no-KEY drops a key of it. The vocabulary size comes from the tokenizer.
"""


def estimate(values: dict[str, Any]) -> dict[str, Any]:
    """Return the cost of `values`: flags by name, with underscores; only sizes and layouts matter.

    Returns:
        padded_vocab_size, total_parameters, active_parameters (per token), zero_parameters (part of
        both, above the diagonals of spatial matrices), experts_per_token (the most that the rule
        may send it to; training may use fewer), forward_tflops_per_1024_tokens (full squares, the
        paper's convention), forward_needed_tflops_per_1024_tokens (causal products as triangles),
        per_gpu (bytes; see footprint.Footprint. save_host_bytes: host memory that its rank uses at
        a save or a load, if it gathers the optimizer's state. save_pinned_bytes: the most pinned
        memory that an --async-save of everything on the rank uses, which torch keeps for the next
        save).

    Raises:
        ValueError: a size is missing, misspelled or does not fit the others.
    """
    args = resolve(values)
    shape = ModelShape.from_args(args)
    cost = model_cost(shape)
    paper, needed = forward_tflops_per_1024_tokens(cost, shape)
    per_gpu = footprint(shape, ParallelLayout.from_args(args))
    saved = per_gpu.weight_bytes + per_gpu.optimizer_bytes
    return {
        "padded_vocab_size": shape.padded_vocab_size,
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
            "save_host_bytes": _GATHERED_BYTES * per_gpu.parameters if gathers(args) else 0,
            "save_pinned_bytes": _PINNED * saved if args.async_save else 0,
        },
    }


def resolve(values: dict[str, Any]) -> argparse.Namespace:
    """Fill in the values that Megatron and `pretrain_smlp.py` would set."""
    _refuse_misspelt(values)
    missing = [name for name in _REQUIRED if not values.get(name)]
    if missing:
        flags = ", ".join(map(flag_of, missing))
        raise ValueError(f"{flags} missing: give a positive number for each")
    _refuse_wrong(values)
    plugins = {name: DEFAULTS[name] for name in PLUGIN_OPTIONS}
    args = argparse.Namespace(**(_DEFAULTS | plugins | values))
    if getattr(args, "use_rotary_position_embeddings", False):
        args.position_embedding_type = "rope"
    if values.get("spec") in SPECS and "architecture" not in values:
        args.architecture = values["spec"][1]
    args.moe_layer_freq = _layer_freq(args.moe_layer_freq)
    args.load = None
    _refuse_impossible(args)
    args.num_attention_heads = args.num_attention_heads or 1
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.ffn_hidden_size = args.ffn_hidden_size or _default_width(args)
    # Experts without a named rule are counted with the simplest one.
    args.token_router = args.token_router or ("switch" if args.num_experts else "none")
    args.untie_embeddings_and_output_weights |= args.input_projection == "minhash"
    args.add_bias_linear = not args.disable_bias_linear
    if args.position_embedding_type is None:
        args.position_embedding_type = ARCHITECTURES[args.architecture].positions
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    # The fused SwiGLU supports neither clamps nor offsets.
    plain = args.activation_func_clamp_value is None and not args.glu_linear_offset
    args.bias_swiglu_fusion = plain and not args.no_bias_swiglu_fusion
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    padded = -(-args.vocab_size // multiple) * multiple
    args.padded_vocab_size = args.padded_vocab_size or padded
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    args.world_size = args.world_size or model_parallel * args.expert_model_parallel_size
    if not args.fp16:
        args.accumulate_allreduce_grads_in_fp32 = not args.grad_reduce_in_bf16
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.num_experts and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True  # as pretrain_smlp.py does
    return args


def _layer_freq(value: Any) -> int | list[int]:
    """Parse --moe-layer-freq as Megatron does: a number, a list, or an expression, [0,1]*3+[1]."""
    with contextlib.suppress(SyntaxError, TypeError, IndexError):
        if isinstance(value, str) and re.fullmatch(r"(?!.*\*\*)[\d,\[\]()*+ ]+", value):
            value = eval(value, {})
    if not isinstance(value, int | list):
        raise ValueError(f"--moe-layer-freq {value}: give a number or list like [0, 1] or [0,1]*3")
    return value


def _default_width(args: argparse.Namespace) -> int:
    """Return Megatron's default --ffn-hidden-size: 2 / 3 of the width for a gated FFN, in steps of
    64. Without attention, flags/defaults.py sets the full width."""
    if args.swiglu and ARCHITECTURES[args.architecture].attends:
        return int((4 * args.hidden_size * 2 / 3) / 64) * 64
    return 4 * args.hidden_size


def _refuse_misspelt(values: dict[str, Any]) -> None:
    if values.get("allow_untested_flag"):  # some resemble a tested one: end_weight_decay
        return
    known = {*_KNOWN, *OUR_FLAGS, *(spelling(flag.removeprefix("--")) for flag in listed())}
    for name in sorted(set(values) - known):
        if hint := did_you_mean(name, sorted(known), cutoff=0.85):
            raise ValueError(f"unknown key {name!r}: {hint}")


def _refuse_wrong(values: Mapping[str, Any]) -> None:
    """Refuse values outside a flag's choices, and non-numbers where a number is required."""
    # A study may have loaded a plugin since this file was imported.
    ours = {field.name: choices_of(field) for field in dataclasses.fields(ModelOptions)}
    for name, value in values.items():
        choices = _CHOICES.get(name) or ours.get(name)
        if choices and value is not None and value not in choices:
            raise ValueError(f"{flag_of(name)} {value}: give one of {', '.join(choices)}")
        if name in _SIZES and type(value) not in (int, type(None)):
            raise ValueError(f"{flag_of(name)} {value}: give a whole number")
        is_number = name == "rotary_base" or type(_DEFAULTS.get(name)) is float
        if is_number and type(value) not in (int, float, type(None)):
            raise ValueError(f"{flag_of(name)} {value}: give a number")


def _refuse_impossible(args: argparse.Namespace) -> None:
    """Refuse sizes that cannot work; a mixer's layers check its own sizes when they are built."""
    kind = ARCHITECTURES[args.architecture]
    if kind.attends and args.num_attention_heads:
        check_attention(args)
    if kind.sparse_mixer:
        check_sparse(args)
    if args.num_experts is not None:
        check_experts(args)
    prefix = prefix_length(args, seq_length=args.seq_length)
    if args.feature_router in BY_PREFIX and not 0 < prefix < args.seq_length:
        raise ValueError(f"--prefix-fraction {args.prefix_fraction}: give a part of the sequence")


def uncounted(values: Mapping[str, Any]) -> list[str]:
    """Return the names of flags whose effect on memory or traffic is not counted."""
    known, taken = {*_KNOWN, *OUR_FLAGS}, listed()
    return [
        name
        for name, value in values.items()
        if value not in (None, False, default := _UNCOUNTED.get(name)) and [value] != default
        if name in _UNCOUNTED or not (name in known or flag_of(name) in taken)
    ]


def merged(file: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return a file's flags, by name, overridden by those of a command line; `--no-KEY` drops a key
    of the file.

    Raises:
        ValueError: a word is neither a flag nor a value.
    """
    values, given = dict(file), dict[str, list[Any]]()
    key = ""
    for word in words:
        name, has_value, text = word.partition("=")
        if not word.startswith("--"):
            if not key:
                raise ValueError(f"{word}: give a flag such as --num-layers first")
            given[key].append(_value(key, word))
            continue
        key = spelling(name.removeprefix("--"))
        given[key] = [_value(key, text)] if has_value else []
    for key in [key for key in given if key.startswith("no_") and key[3:] in {**file, **given}]:
        del given[key]
        given.pop(key[3:], None)
        values.pop(key[3:], None)
    for key, typed in given.items():
        if not typed and key not in _SIZES:
            values[key] = True  # a switch
        else:
            values[key] = typed[0] if len(typed) == 1 else typed
    if values.get("tokenizer_type"):
        spec = TokenizerSpec.from_arguments(argparse.Namespace(**values))
        values["vocab_size"] = read_tokenizer(spec).vocab_size
    return values


def _value(key: str, word: str) -> Any:
    """Parse a word as the YAML file would: 4, 1e-5, true, text, [0, 1]."""
    try:
        return yaml.load(word, StrictLoader)
    except yaml.YAMLError as error:
        if key == "moe_layer_freq":
            return word  # [0,1]*3
        raise ValueError(f"{flag_of(key)} {word}: give a number, text or list") from error


def _table(result: dict[str, Any]) -> str:
    gpu = result["per_gpu"]
    giga = {name: f"{value / 2**30:12.3f} GiB" for name, value in gpu.items()}
    lines = [
        f"vocabulary, padded          {result['padded_vocab_size']:>16,}",
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
    names = ["weight", "gradient", "optimizer", "activation", "memory"]
    if gpu["gradient_copy_bytes"]:  # never held together with the activations
        names.insert(3, "gradient_copy")
    lines += [f"  {name.replace('_', ' '):26}{giga[name + '_bytes']:>16}" for name in names]
    if gpu["save_host_bytes"]:
        lines.append(f"  {'memory at a save, at most':26}{giga['save_gpu_bytes']:>16}")
        lines.append(f"  {'host memory at a save':26}{giga['save_host_bytes']:>16}")
    if gpu["save_pinned_bytes"]:
        lines.append(f"  {'pinned memory, at most':26}{giga['save_pinned_bytes']:>16}")
    lines.append("sent by it in one optimizer step")
    kinds = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel")
    lines += [f"  {kind.replace('_', ' '):26}{giga[kind + '_bytes']:>16}" for kind in kinds]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="estimate.py",
        description="Parameters, FLOPs, memory and communication of a configuration.",
        usage="%(prog)s [--config FILE ...] [--json] [FLAG ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, action="append", default=[],
        help="YAML file of flags; later files override",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 if the configuration is refused."""
    try:
        options, words = build_parser().parse_known_args(argv)
        file = {spelling(key): value for key, value in read_yaml(*options.config).items()}
        values = merged(file, words)
        result = estimate(values)
        for name in uncounted(values):
            raise ValueError(
                f"{flag_of(name)} {values[name]}: its effect on memory and traffic is not counted. "
                f"--no-{flag_of(name)[2:]} omits it"
            )
    except ValueError as error:
        print(f"estimate.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0
