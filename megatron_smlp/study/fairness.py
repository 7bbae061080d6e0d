"""Fairness: all systems of a study get the same data, batches, number of trials, and FLOPs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System

# Flags that may not differ between systems: the data and its order, the batch, the evaluation, and
# all of the optimizer and regularization except the learning rate, the only thing that is tuned.
COMMON_FLAGS = (
    *("seq_length", "micro_batch_size", "global_batch_size"),
    *("dataloader_type", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("full_validation", "eval_global_batch_size", "calculate_per_token_loss"),
    *("eval_iters", "suffix_from", "bf16", "fp16", "lr_warmup_fraction", "lr_warmup_iters"),
    *("lr_wsd_decay_style", "no_create_attention_mask_in_dataloader"),
    *("optimizer", "weight_decay", "start_weight_decay", "end_weight_decay"),
    *("weight_decay_incr_style", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    *("muon_momentum", "muon_nesterov", "muon_scale_mode", "muon_num_ns_steps"),
    *("muon_coefficient_type", "muon_fp32_matmul_prec", "muon_no_split_qkv"),
    *("muon_tp_mode", "use_mup", "iterations_to_skip"),
    *("attention_dropout", "hidden_dropout", "init_method_std", "init_method_xavier_uniform"),
    *("embedding_init_method_std", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init"),
    *("apply_wd_to_qk_layernorm", "muon_extra_scale_factor", "nonfinite_loss"),
    *("fp8_format", "fp4_format", "fp32_residual_connection", "mtp_num_layers", "min_lr"),
)
CONVENTIONS = {
    "forward_tflops_per_1024_tokens": ("full squares", "flops-tolerance"),
    "forward_needed_tflops_per_1024_tokens": ("needed (triangles)", "needed-flops-tolerance"),
}


def check_fair(study: Study, systems: Mapping[str, System]) -> None:
    """Check that the systems differ only in what the study compares.

    Raises:
        UsageError: they differ in flags of data, batches or optimizer, or by too many FLOPs.
    """
    _check_common_flags(study, systems)
    _check_flops(study, systems)


def _check_common_flags(study: Study, systems: Mapping[str, System]) -> None:
    # Reports compare times of steps of equally many tokens.
    compared = {*(study.may_differ or ())} - {"global_batch_size", "seq_length"}
    for flag in (flag for flag in COMMON_FLAGS if flag not in compared):
        values = {name: _compared(system, flag) for name, system in systems.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            raise UsageError(
                f"{flag_of(flag)} differs between the systems of the study, which may differ only "
                "in architecture and learning rate, on the same data in the same batches: set "
                "it once, in `fixed`, or list it in `may-differ` if the study compares it.\n"
                + "\n".join(f"  {name:30}{value}" for name, value in values.items())
            )


def _compared(system: System, flag: str) -> Any:
    """Return a flag's value; of `min_lr` the share of `lr`, since a trial scales both."""
    value = system.flags.get(flag)
    return f"{(value or 0.0) / system.flags['lr']:.4g} of lr" if flag == "min_lr" else value


def _check_flops(study: Study, systems: Mapping[str, System]) -> None:
    titles = convention_titles(study)
    for title, (convention, (_, key)) in zip(titles, CONVENTIONS.items(), strict=True):
        tolerance = getattr(study, key.replace("-", "_"))
        spread = flops_spread(systems, convention)
        if spread > tolerance:
            raise UsageError(
                f"{study.name}: FLOPs per token, {title}, differ by {spread:.1%} between the "
                f"systems, but {tolerance:.0%} is allowed ({key}): change their widths in "
                "`variants`.\n"
                f"{flops_table(study, systems)}"
            )


def flops_spread(systems: Mapping[str, System], convention: str) -> float:
    """Return by what fraction the most expensive system exceeds the cheapest in FLOPs per token."""
    costs = [system.costs[convention] for system in systems.values()]
    return float(max(costs) / min(costs) - 1)


def convention_titles(study: Study) -> list[str]:
    """Return the titles of both FLOP conventions; the paper uses the first."""
    squares, needed = (title for title, _ in CONVENTIONS.values())
    return [squares + " (paper)" * study.paper, needed]


def flops_table(study: Study, systems: Mapping[str, System]) -> str:
    """Return a text table of every system's FLOPs in both conventions."""
    titles = convention_titles(study)
    lines = [f"{'TFLOPs forward per 1024 tokens':32}{titles[0]:>22}{titles[1]:>22}"]
    lines += [
        f"  {name:30}" + "".join(f"{system.costs[key]:>22.6f}" for key in CONVENTIONS)
        for name, system in systems.items()
    ]
    spreads = [flops_spread(systems, key) for key in CONVENTIONS]
    lines.append(f"  {'difference':30}" + "".join(f"{spread:>22.2%}" for spread in spreads))
    return "\n".join(lines)
