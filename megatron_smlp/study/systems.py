"""The systems of a study: their flags from YAML files, their kinds, and what a token costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp import plugin_files
from megatron_smlp.accounting.estimate import estimate
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.exclusive import replaced_by
from megatron_smlp.flags.yaml_file import read_settings, spelling
from megatron_smlp.study.study_file import Study
from megatron_smlp.systems import ARCHITECTURES, BY_PREFIX

Flags = Mapping[str, Any]

# Flags that a study sets itself, for every run.
OWN_FLAGS = (
    *("seed", "train_iters", "train_samples", "exit_interval", "exit_duration_in_mins"),
    *("lr_decay_style", "lr_wsd_decay_iters", "lr_decay_iters", "eval_interval"),
    *("save", "load", "log_dir", "save_interval", "keep_last", "keep_every", "ckpt_step"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
    *("tokenizer_type", "tokenizer_model", "mock_data", "tensorboard_dir", "wandb_project"),
    plugin_files.KEY,  # of the system's own file
)


@dataclass(frozen=True, kw_only=True)
class System:
    name: str
    flags: Flags
    """Flags from its file and from the study, without those that the study sets for each run."""
    costs: Mapping[str, Any]
    """Costs according to accounting/estimate.py."""
    title: str

    @property
    def is_smlp(self) -> bool:
        return self.flags.get("architecture") == "smlp"

    @property
    def moes(self) -> frozenset[str]:
        """The kinds of its MoEs: `token`, `feature`."""
        has = {
            "token": bool(self.flags.get("num_experts")),
            "feature": self.flags.get("feature_router") not in (None, "none"),
        }
        return frozenset(kind for kind, is_there in has.items() if is_there)

    @property
    def is_sparse(self) -> bool:
        return bool(self.moes)

    @property
    def is_sparse_transformer(self) -> bool:
        return (
            self.is_sparse and ARCHITECTURES[self.flags.get("architecture", "transformer")].attends
        )

    @property
    def predicts_suffix(self) -> bool:
        """Return whether it is trained only on what follows a prefix."""
        is_partial = self.flags.get("feature_router") in BY_PREFIX
        return is_partial and self.flags.get("partial_loss", "suffix") == "suffix"

    @property
    def evaluation(self) -> str:
        """Describe how an evaluation routes tokens."""
        rule = self.flags.get("token_router")
        if rule == "base":
            priced = self.flags.get("base_gate") == "price"
            routing = "prices" if priced else self.flags.get("base_eval", "greedy")
            return f"BASE: {routing}, nothing is dropped"
        if self.flags.get("moe_train_capacity_factor"):
            return "the training's rule, without a capacity: nothing is dropped"
        return "as in training" if self.is_sparse else "dense"


def read_systems(study: Study, *, folder: Path) -> dict[str, System]:
    """Read the flags of every system; `folder` is that of the study file."""
    return {name: _system(study, name, folder=folder) for name in study.systems}


def _system(study: Study, name: str, *, folder: Path) -> System:
    own = dict(study.variants.get(name, {}))
    source = own.pop("from", name)
    file = folder / study.base / f"{source}.yaml"
    settings = read_settings([file])
    flags = {spelling(key): setting.value for key, setting in settings.items()}
    if clash := sorted({*study.fixed, *own} & {*OWN_FLAGS}):
        raise UsageError(
            f"{', '.join(clash)} of study {study.name!r}, {name}: the study sets it for each run, "
            f"from horizons, seeds, --data, or (plugins) the system's own {file}. Remove it."
        )
    flags = {key: value for key, value in flags.items() if key not in OWN_FLAGS}
    if plugins := [plugin_files.load(path) for path in plugin_files.named_in(settings)]:
        # Names only: a run is the same on another machine. Its sources cover the code.
        flags[plugin_files.KEY] = [plugin.path.name for plugin in plugins]
    for layer in (study.fixed, own):
        # Override as a YAML file does the files that it includes.
        replaced = replaced_by(key for key, value in layer.items() if value not in (None, False))
        flags = {key: value for key, value in flags.items() if key not in replaced} | layer
    flags = {key: value for key, value in flags.items() if value is not None}
    # A system with a capacity is evaluated without it: its loss is not that of dropped tokens.
    flags.pop("moe_eval_capacity_factor", None)
    try:
        costs = estimate(flags | {"vocab_size": study.vocab_size})
    except ValueError as error:
        raise UsageError(f"{name} of study {study.name!r}, from {file}: {error}") from error
    for required in ("lr", "global_batch_size"):
        if required not in flags:
            raise UsageError(f"{file}: {required} is missing: give it there or in `fixed`.")
    return System(name=name, flags=flags, costs=costs, title=study.titles.get(name, name))
