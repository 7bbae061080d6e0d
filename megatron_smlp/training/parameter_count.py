"""Checks at every start that the model has as many parameters as the accounting counts.

Sizes, FLOPs and MFU are computed, not measured (accounting/costs.py): a mixer whose cost is wrong
there would make all of them silently wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state

from megatron_smlp.accounting.costs import ModelShape, model_cost
from megatron_smlp.collectives import gathered
from megatron_smlp.errors import AccountingError


def check_parameters(
    args: argparse.Namespace, model: Sequence[Any], say: Callable[[str], None]
) -> None:
    """Compare the number of parameters built with the number counted. Collective.

    Args:
        model: this rank's chunks.
        say: prints a line for the user on rank 0.

    Raises:
        AccountingError: they differ, and --strict-accounting is given; on every rank.
    """
    built, counted = built_parameters(model), model_cost(ModelShape.from_args(args)).parameters
    if built == counted:
        return
    message = (
        f"the model has {built:,} parameters, but accounting/costs.py counts {counted:,}: sizes, "
        "FLOPs and MFU of this run are wrong. Correct the cost that systems.py names for its mixer "
        "(that of a plugin: each layer has its own parameters, all made in `build`)"
    )
    if args.strict_accounting:
        raise AccountingError(f"{message}, or leave --strict-accounting out.")
    say(f"WARNING: {message}.")


def built_parameters(model: Sequence[Any]) -> int:
    """Return the number of parameters of the whole model, each counted once. Collective.

    model: this rank's chunks.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    expert_replicas = parallel_state.get_expert_data_parallel_world_size()
    first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    own = 0.0
    for parameter in (p for chunk in model for p in chunk.parameters()):
        if getattr(parameter, "shared_embedding", False) and not first_stage:
            continue  # another stage's copy of a tied embedding
        is_expert = not getattr(parameter, "allreduce", True)
        copies = expert_replicas if is_expert else replicas
        if not getattr(parameter, "tensor_model_parallel", False):
            copies *= expert_tensor if is_expert else tensor
        own += parameter.numel() / copies
    return round(sum(gathered(own)))
