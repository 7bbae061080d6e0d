"""Tables of flags that have no effect without something else, and of values that do not work.

A flag that would be accepted and do nothing is refused; spelling out a default is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flag_facts import MEGATRON_FLAGS
from megatron_smlp.flags.check_model import slots_of
from megatron_smlp.options import DEFAULTS, OUR_FLAGS
from megatron_smlp.platform import cpu
from megatron_smlp.systems import ARCHITECTURES, BY_PREFIX, POSITIONS, SPECS

OFF = {
    "attention_backend": "auto",
    "cuda_graph_impl": "none",
    "attention_dropout": 0.0,
    "dist_ckpt_workers": 1,
}
KNOWN = {**DEFAULTS, **{name: flag.default for name, flag in MEGATRON_FLAGS.items()}}
FILLED_IN = {name for name, flag in MEGATRON_FLAGS.items() if flag.filled_in}
VALUES: dict[str, tuple[tuple[str, ...], str]] = {
    "optimizer": (("adam", "muon"), "no test saves and reshards another one's state"),
    "muon_tp_mode": (
        ("duplicated", "distributed"),
        "its update would depend on the tensor parallel size",
    ),
    "ckpt_format": (("torch_dist",), ""),
    "async_strategy": (
        ("mcore",),
        "it writes no checksums, and does not publish a save by one rename",
    ),
    "dataloader_type": (("single", "cyclic"), ""),
    "rerun_mode": (("disabled",), "--nonfinite-loss needs no rerun of steps"),
    "transformer_impl": (("local", "transformer_engine"), ""),
    "position_embedding_type": (POSITIONS, ""),
    "softmax_type": (("vanilla", "off-by-one"), "its parameters are not counted"),
    "cuda_graph_impl": (
        ("none", "local"),
        "a replay would skip the Python that gives routers their inputs",
    ),
    "moe_router_dtype": (("fp32",), ""),
    "moe_router_load_balancing_type": (
        ("aux_loss", "none"),
        "exports lose seq_aux_loss, and global_aux_loss depends on earlier micro-batches",
    ),
    "moe_router_score_function": (("softmax", "sigmoid"), ""),
}
"""The values that work here, for flags of which Megatron's parser accepts others too, and why the
others do not, where that is not plain."""
POSITIONS_WITHOUT_ATTENTION = ("none", "learned_absolute")
ROTARY_FLAGS = (
    *("rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_freq"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
)


class Need(NamedTuple):
    """A requirement, and the flags that have it."""

    what: str
    is_met: Callable[[argparse.Namespace], Any]
    flags: tuple[str, ...]


NEEDS = (
    Need(
        "attention (--architecture transformer)",
        lambda args: ARCHITECTURES[args.architecture].attends,
        (
            *("group_query_attention", "num_query_groups", "add_qkv_bias", "qk_layernorm"),
            *("qk_l2_norm", "softmax_type", "window_size", "attention_backend"),
            *("use_rotary_position_embeddings", "no_rope_freq", "attention_softmax_in_fp32"),
        ),
    ),
    Need(
        "attention (--architecture transformer or amlp)",
        lambda args: any(it.drops_attention for it in ARCHITECTURES[args.architecture].mixers),
        ("attention_dropout",),
    ),
    Need(
        "a GELU (no --swiglu, --quick-geglu or --squared-relu)",
        lambda args: not (args.swiglu or args.quick_geglu or args.squared_relu),
        ("openai_gelu",),
    ),
    Need(
        "--moe-router-group-topk",
        lambda args: args.moe_router_group_topk,
        ("moe_router_num_groups",),
    ),
    Need(
        "--position-embedding-type rope",
        lambda args: args.position_embedding_type == "rope",
        ROTARY_FLAGS,
    ),
    Need("--use-rope-scaling", lambda args: args.use_rope_scaling, ("rope_scaling_factor",)),
    Need("--group-query-attention", lambda args: args.group_query_attention, ("num_query_groups",)),
    # Without biases the flag would add parameters that nothing here counts.
    Need("biases (no --disable-bias-linear)", lambda args: args.add_bias_linear, ("add_qkv_bias",)),
    Need(
        "a layer with an FFN (a Transformer's, or token experts)",
        lambda args: any(slots.channel != "none" for slots in slots_of(args)),
        ("swiglu", "quick_geglu"),
    ),
    Need(
        "--swiglu or --quick-geglu",
        lambda args: args.swiglu or args.quick_geglu,
        ("glu_linear_offset", "activation_func_clamp_value"),
    ),
    Need(
        "--async-save and --ckpt-assume-constant-structure",
        lambda args: args.async_save and args.ckpt_assume_constant_structure,
        ("dist_ckpt_workers",),
    ),
    Need(
        "--feature-router",
        # An explicit "none" undoes what an included file sets.
        lambda args: args.feature_router != "none" or "feature_router" in args.explicit_flags,
        ("num_feature_experts",),
    ),
    Need("--use-mup", lambda args: args.use_mup, ("mup_base_hidden_size", "mup_base_head_dim")),
    Need(
        "Transformer Engine (--transformer-impl transformer_engine)",
        lambda args: args.transformer_impl != "local",
        (
            *("layernorm_zero_centered_gamma", "softmax_type", "window_size"),
            *("moe_grouped_gemm", "attention_backend", "tp_comm_overlap"),
        ),
    ),
    Need(
        "--position-embedding-type learned_absolute",
        lambda args: args.position_embedding_type == "learned_absolute",
        ("reset_position_ids",),
    ),
    Need(
        "Megatron's own layers (--transformer-impl local, without --cuda-graph-impl)",
        lambda args: args.transformer_impl == "local" and args.cuda_graph_impl in (None, "none"),
        ("reset_attention_mask",),
    ),
    Need("a CUDA device", lambda args: not cpu.needed(), ("cuda_graph_impl",)),
    Need(
        "--moe-router-score-function sigmoid",
        lambda args: args.moe_router_score_function == "sigmoid",
        ("moe_router_enable_expert_bias",),
    ),
    Need(
        "--moe-router-enable-expert-bias",
        lambda args: args.moe_router_enable_expert_bias,
        ("moe_router_bias_update_rate",),
    ),
    Need(
        "--moe-router-load-balancing-type aux_loss",
        lambda args: args.moe_router_load_balancing_type != "none",
        ("moe_aux_loss_coeff",),
    ),
    Need(
        "a CUDA device, or --use-pytorch-profiler",
        lambda args: args.use_pytorch_profiler or not cpu.needed(),
        ("profile",),
    ),
    Need(
        "--log-dir, --save or --tensorboard-dir",
        lambda args: args.tensorboard_dir or not args.profile,
        ("use_pytorch_profiler",),
    ),
    Need(
        "--wandb-exp-name, and --save or --wandb-save-dir",
        lambda args: args.wandb_exp_name and (args.save or args.wandb_save_dir),
        ("wandb_project",),
    ),
    Need(
        "--optimizer muon",
        lambda args: args.optimizer == "muon",
        (
            *("muon_momentum", "muon_nesterov", "muon_scale_mode", "muon_extra_scale_factor"),
            *("muon_num_ns_steps", "muon_coefficient_type", "muon_fp32_matmul_prec"),
            "muon_tp_mode",
        ),
    ),
    Need("the package wandb", lambda args: find_spec("wandb"), ("wandb_project",)),
    # Megatron's fused loss rounds its gradient to bf16, whatever the precision of the run.
    Need("--bf16", lambda args: args.bf16, ("cross_entropy_loss_fusion",)),
    # With the suffix alone, the loss would be divided by another token count than balance losses.
    Need(
        "--partial-loss all",
        lambda args: args.feature_router not in BY_PREFIX or args.partial_loss == "all",
        ("calculate_per_token_loss",),
    ),
    # Megatron's schedule counts samples, and it does not know how many an iteration will have.
    Need("--train-samples", lambda args: args.train_samples, ("step_batch_size_schedule",)),
    Need(
        "--eval-interval",
        lambda args: args.eval_interval or not args.eval_iters,
        ("eval_iters",),
    ),
    Need("--keep-last", lambda args: args.keep_last, ("keep_every",)),
    Need(
        "--eval-tasks",
        lambda args: args.eval_tasks,
        ("eval_tasks_interval", "eval_tasks_limit", "eval_tasks_data_dir"),
    ),
    Need(
        "a training (no --skip-train; tools/evaluate.py scores a checkpoint)",
        lambda args: not args.skip_train,
        ("eval_tasks",),
    ),
    Need(
        "--multiple-validation-sets",
        lambda args: args.multiple_validation_sets,
        ("validation_set_names",),
    ),
)


def check_choices(args: argparse.Namespace) -> None:
    """Refuse values of Megatron's flags that do not work here."""
    for name, (allowed, why) in VALUES.items():
        if name in args.explicit_flags and _text(args.explicit_flags[name]) not in allowed:
            reason = f" ({why})" if why else ""
            raise UsageError(
                f"{said(args, name)} does not work here{reason}: give {one_of(allowed)}, or leave "
                "it out."
            )
    spec = args.explicit_flags.get("spec")
    if spec and spec not in SPECS:
        raise UsageError(
            f"--spec {' '.join(spec)} builds layers that are unknown here (parameters, FLOPs, "
            f"export): give {SPECS[0][0]} with {', '.join(name for _, name in SPECS)}, or "
            "--architecture."
        )
    if spec and spec[1] != args.architecture:
        raise UsageError(
            f"--spec {' '.join(spec)} contradicts --architecture {args.architecture}: leave one of "
            "them out."
        )


def check_needs(args: argparse.Namespace) -> None:
    """Refuse flags whose requirement is not met."""
    rotates = ARCHITECTURES[args.architecture].rotates
    if not rotates and args.position_embedding_type not in POSITIONS_WITHOUT_ATTENTION:
        raise UsageError(
            f"--position-embedding-type {args.position_embedding_type} rotates queries and keys, "
            f"which --architecture {args.architecture} does not have: its mixers encode positions. "
            f"Give {one_of(POSITIONS_WITHOUT_ATTENTION)}, or leave it out."
        )
    for name in requested(args, ("reset_attention_mask", "reset_position_ids")):
        if not all(mixer.attends for mixer in ARCHITECTURES[args.architecture].mixers):
            raise UsageError(
                f"{flag_of(name)} is for attention: in --architecture {args.architecture} a matrix "
                "has one row for each position, the same in all samples, wherever documents begin. "
                "Leave it out."
            )
    for what, is_met, names in NEEDS:
        for name in requested(args, names):
            if not is_met(args):
                raise UsageError(f"{said(args, name)} needs {what}, or is left out.")


def refuse_unless(args: argparse.Namespace, choice: str) -> None:
    """Refuse flags that are for a value of `choice` other than the one chosen.

    Args:
        choice: destination of the flag that chooses; its plural is a field of options.Facts."""
    chosen = getattr(args, choice)
    facts = {**OUR_FLAGS, **MEGATRON_FLAGS}
    for name in requested(args, facts):
        allowed = getattr(facts[name], f"{choice}s")
        if allowed and chosen not in allowed and name != "moe_router_topk":  # check_routers.py
            raise UsageError(
                f"{said(args, name)} is for {flag_of(choice)} {one_of(allowed)}, not {chosen}: "
                "leave it out."
            )


def requested(args: argparse.Namespace, names: Iterable[str]) -> Iterator[str]:
    """Yield the flags that were given, except those that only switch off or repeat a default."""
    for name in names:
        value = args.explicit_flags.get(name)
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        is_off = value is None or value is False or getattr(value, "name", value) == OFF.get(name)
        # Where defaults.py fills in another value, giving Megatron's default changes something.
        is_default = name in KNOWN and value == KNOWN[name] and not (value and name in FILLED_IN)
        if not (is_off or is_default):
            yield name


def said(args: argparse.Namespace, name: str) -> str:
    """Return the flag with its value, as it was given."""
    flag, value = flag_of(name), args.explicit_flags[name]
    return flag if value is True else f"{flag} {_text(value)}"


def _text(value: Any) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(str(getattr(item, "name", item)) for item in values)


def one_of(names: Sequence[str]) -> str:
    """Return `a`, `a or b`, `a, b or c`, for a message."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
