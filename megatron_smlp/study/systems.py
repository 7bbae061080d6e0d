"""The systems of a study: their flags from YAML files, what kind each is, and what a token costs.

Fairness is checked here: what must be the same for all systems, and FLOPs within a tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.accounting.estimate import estimate
from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import read_yaml, spelling
from megatron_smlp.study.study_file import Study

Flags = Mapping[str, Any]

# What a study sets itself, for every run.
OWN_FLAGS = (
    *("seed", "train_iters", "train_samples", "exit_interval", "exit_duration_in_mins"),
    *("lr_decay_style", "lr_wsd_decay_iters", "lr_decay_iters", "eval_interval"),
    *("save", "load", "log_dir", "save_interval", "keep_last", "keep_every", "ckpt_step"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
    *("tokenizer_type", "tokenizer_model", "mock_data", "tensorboard_dir", "wandb_project"),
)
# What may not differ between systems: the data and its order, the batch, what is evaluated.
COMMON_FLAGS = (
    *("seq_length", "micro_batch_size", "global_batch_size", "rampup_batch_size"),
    *("dataloader_type", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("eval_iters", "suffix_from", "bf16", "fp16", "lr_warmup_fraction", "lr_warmup_iters"),
    *("lr_wsd_decay_style", "no_create_attention_mask_in_dataloader"),
)
CONVENTIONS = {
    "forward_tflops_per_1024_tokens": ("full squares (paper)", "flops-tolerance"),
    "forward_needed_tflops_per_1024_tokens": ("needed (triangles)", "needed-flops-tolerance"),
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One of the systems that are compared."""

    name: str
    flags: Flags
    """Flags from its file and from the study, without those that the study sets for each run."""
    costs: Mapping[str, Any]
    """Costs according to accounting/estimate.py."""

    @property
    def is_smlp(self) -> bool:
        return self.flags.get("architecture") == "smlp"

    @property
    def is_sparse(self) -> bool:
        return bool(self.flags.get("num_experts")) or self.flags.get("feature_router") not in (
            None,
            "none",
        )

    @property
    def kind(self) -> str:
        """`smlp`, `moe` (a sparse Transformer) or `dense`."""
        if self.is_smlp:
            return "smlp"
        return "moe" if self.is_sparse else "dense"

    @property
    def predicts_suffix(self) -> bool:
        """Return whether it is trained only on what follows a prefix."""
        is_partial = self.flags.get("feature_router") == "partial"
        return is_partial and self.flags.get("partial_loss", "suffix") == "suffix"

    @property
    def evaluation(self) -> str:
        """Return in words how an evaluation routes tokens."""
        rule = self.flags.get("token_router")
        if rule == "base":
            return f"BASE: {self.flags.get('base_eval', 'greedy')}, nothing is dropped"
        if self.flags.get("moe_train_capacity_factor"):
            return "the training's rule, without a capacity: nothing is dropped"
        return "as in training" if self.is_sparse else "dense"


def read_systems(study: Study, *, folder: Path) -> dict[str, System]:
    """Read the flags of every system, and check that the study compares them fairly.

    Args:
        folder: the study file's.

    Raises:
        UsageError: a file is missing or wrong, or the comparison would not be fair.
    """
    systems = {name: _system(study, name, folder=folder) for name in study.systems}
    _check_common_flags(systems)
    _check_trials(study)
    _check_flops(study, systems)
    return systems


def _system(study: Study, name: str, *, folder: Path) -> System:
    own = dict(study.variants.get(name, {}))
    source = own.pop("from", name)
    file = folder / study.base / f"{source}.yaml"
    flags = {spelling(key): value for key, value in read_yaml(file).items()}
    given = {*study.fixed, *own}
    if clash := sorted(given & set(OWN_FLAGS)):
        raise UsageError(
            f"{', '.join(clash)} of study {study.name!r}, {name}: a study sets that itself for "
            "each run, from horizons, seeds and --data. Remove it."
        )
    flags = {key: value for key, value in flags.items() if key not in OWN_FLAGS}
    flags |= dict(study.fixed) | own
    flags = {key: value for key, value in flags.items() if value is not None}
    # The loss of a capacity system is that of its model, not of the tokens that found no slot.
    flags.pop("moe_eval_capacity_factor", None)
    try:
        costs = estimate(flags | {"vocab_size": study.vocab_size})
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    for required in ("lr", "global_batch_size"):
        if required not in flags:
            raise UsageError(f"{file}: {required} is missing: give it there or in `fixed`.")
    return System(name=name, flags=flags, costs=costs)


def _check_common_flags(systems: Mapping[str, System]) -> None:
    for flag in COMMON_FLAGS:
        values = {name: system.flags.get(flag) for name, system in systems.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            raise UsageError(
                f"{flag_of(flag)} differs between the systems of the study, which see the same "
                f"data in the same batches: give it once, in `fixed`.\n{_lines(values)}"
            )


def _check_trials(study: Study) -> None:
    if study.tuning is None:
        return
    trials = {name: len(study.tuning.factors(name)) for name in study.systems}
    if len(set(trials.values())) > 1:
        raise UsageError(
            "tuning: lr: the systems have different numbers of trials, and more trials are an "
            f"advantage: give every system as many.\n{_lines(trials)}"
        )


def _check_flops(study: Study, systems: Mapping[str, System]) -> None:
    for convention, (title, key) in CONVENTIONS.items():
        tolerance = getattr(study, key.replace("-", "_"))
        spread = flops_spread(systems, convention)
        if spread > tolerance:
            raise UsageError(
                f"FLOPs per token, {title}, differ by {spread:.1%} between the systems, and "
                f"{tolerance:.0%} is allowed ({key}): change the sizes in {study.base}.\n"
                f"{flops_table(systems)}"
            )


def flops_spread(systems: Mapping[str, System], convention: str) -> float:
    """Return by which share the dearest system is over the cheapest."""
    costs = [system.costs[convention] for system in systems.values()]
    return float(max(costs) / min(costs) - 1)


def flops_table(systems: Mapping[str, System]) -> str:
    """Return the FLOPs of every system in both conventions, as lines."""
    titles = [title for title, _ in CONVENTIONS.values()]
    lines = [f"{'TFLOPs forward per 1024 tokens':32}{titles[0]:>22}{titles[1]:>22}"]
    lines += [
        f"  {name:30}" + "".join(f"{system.costs[key]:>22.6f}" for key in CONVENTIONS)
        for name, system in systems.items()
    ]
    spreads = [flops_spread(systems, key) for key in CONVENTIONS]
    lines.append(f"  {'difference':30}" + "".join(f"{spread:>22.2%}" for spread in spreads))
    return "\n".join(lines)


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"  {name:30}{value}" for name, value in values.items())
