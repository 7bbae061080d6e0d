"""Copy every tensor of a checkpoint, and record the parallel layout that it is meant for.

A distributed checkpoint holds whole tensors under global names, so a run can load it in any layout
anyway. A rewrite also merges the ranks' pieces into whole tensors in one file, checks the layout
before you wait for a cluster, and can drop the optimizer's state, two thirds of the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.tensors import Source, tensors_of
from megatron_smlp.checkpoints.torch_dist import COMMON, NOT_WEIGHTS, TorchDistCheckpoint
from megatron_smlp.checkpoints.writer import write_checkpoint
from megatron_smlp.conversion.record import converted_record, sizes
from megatron_smlp.errors import UsageError

ANY_LAYOUT = "optimizer.state."
"""Prefix of the names of optimizer state that does not depend on the layout."""


def check_layout(
    flags: Mapping[str, Any], layout: Mapping[str, int], *, is_new: bool = False
) -> None:
    """Raise UsageError, as pretrain_smlp.py would, if the model cannot be sharded that way.

    Args:
        is_new: whether no run has had this model: check it in any layout.
    """
    from megatron_smlp.flags.check_model import check_model
    from megatron_smlp.flags.check_routers import check_feature_router

    layout = sizes(layout, None)
    if not is_new and all(size == 1 for size in layout.values()):
        return  # one process holds any model
    training = {"micro_batch_size": 1, "optimizer": "adam", "decoupled_lr": None}
    args = argparse.Namespace(
        **flags, **layout, **training, context_parallel_size=1, explicit_flags={}
    )
    check_model(args)
    if is_new:
        check_feature_router(args)
    tensor, pipeline = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    if flags["num_layers"] % pipeline:
        raise UsageError(
            f"--target-pipeline-model-parallel-size {pipeline} does not divide --num-layers "
            f"{flags['num_layers']}: choose a divisor."
        )
    if flags["padded_vocab_size"] % tensor:
        raise UsageError(
            f"--target-tensor-model-parallel-size {tensor} does not divide the padded vocabulary "
            f"{flags['padded_vocab_size']}: choose a divisor, or repad it with "
            "--make-vocab-size-divisible-by."
        )


def copy(
    checkpoint: TorchDistCheckpoint,
    source: Source,
    run: Path,
    flags: Mapping[str, Any],
    layout: Mapping[str, int],
    record: Mapping[str, Any] | None,
) -> None:
    """Write the whole state for another layout.

    RNG states belong to ranks of the old layout and are left out, as Megatron does when it loads
    another layout.

    Args:
        source: the tensors of the checkpoint, optimizer state included.
        flags: of the model, with the vocabulary size of `source`.
        layout: sizes that differ from the run's.
        record: run.json of the checkpoint.

    Raises:
        UsageError: the optimizer state is tied to the layout that saved it.
    """
    for name in source.specs:
        if name.startswith("optimizer.") and not name.startswith(ANY_LAYOUT):
            raise UsageError(
                f"{checkpoint.folder} was saved with --optimizer-checkpoint data_parallel "
                f"({name}), which no other layout can load: give --drop-optimizer."
            )
    common = dict(checkpoint.common)
    common.pop("rerun_state_machine", None)
    common["args"] = argparse.Namespace(
        **{**vars(checkpoint.args), **flags, **layout, "no_save_rng": True}
    )
    names = [name for name in checkpoint.objects if not name.startswith(NOT_WEIGHTS)]
    objects = {name: checkpoint.read_object(name) for name in names} | {COMMON: [common]}
    record = converted_record(
        record, flags, layout, iteration=checkpoint.iteration, is_new_model=False
    )
    write_checkpoint(
        run, checkpoint.iteration, tensors_of(source), objects, flags=flags, record=record
    )
