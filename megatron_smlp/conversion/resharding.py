"""torch_dist -> torch_dist: every tensor copied, the parallel layout that is meant recorded.

A distributed checkpoint holds whole tensors under global names, so a run may load it in any layout
anyway. What a rewrite adds: ranks' pieces become whole tensors in one file, the layout is checked
before a cluster is waited for, and the optimizer's state, two thirds of the file, can be left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_smlp.checkpoints.structure import iteration_folder
from megatron_smlp.conversion.progress import Progress
from megatron_smlp.conversion.torch_dist import COMMON, NOT_WEIGHTS, TorchDistCheckpoint
from megatron_smlp.conversion.torch_dist_writer import TorchDistWriter, finish
from megatron_smlp.errors import UsageError

ANY_LAYOUT = "optimizer.state."
"""How names of optimizer state begin that no layout is part of."""


def check_layout(flags: Mapping[str, Any], layout: Mapping[str, int]) -> None:
    """Raise UsageError where the model cannot be spread that way, as pretrain_smlp.py would."""
    from megatron_smlp.arguments import check_model

    for name, size in layout.items():
        if size < 1:
            raise UsageError(f"--target-{name.replace('_', '-')} {size}: give 1 or more.")
    if all(size == 1 for size in layout.values()):
        return  # one process holds any model
    args = argparse.Namespace(
        **flags, **layout, micro_batch_size=1, context_parallel_size=1, explicit_flags={}
    )
    check_model(args)
    tensor, pipeline = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    if flags["num_layers"] % pipeline:
        raise UsageError(
            f"--target-pipeline-model-parallel-size {pipeline} does not divide --num-layers "
            f"{flags['num_layers']}: choose a divisor."
        )
    if flags["padded_vocab_size"] % tensor:
        raise UsageError(
            f"--target-tensor-model-parallel-size {tensor} does not divide the padded vocabulary "
            f"{flags['padded_vocab_size']}: choose a divisor."
        )


def copy(
    checkpoint: TorchDistCheckpoint,
    run: Path,
    layout: Mapping[str, int],
) -> int:
    """Write the whole state for another layout; the number of tensors.

    Random number states belong to ranks of the old layout and are left out, as Megatron leaves
    them out where it loads another layout.

    Raises:
        UsageError: the optimizer state is tied to the layout that saved it.
    """
    names = list(checkpoint.all_specs)
    for name in names:
        if name.startswith("optimizer.") and not name.startswith(ANY_LAYOUT):
            raise UsageError(
                f"{checkpoint.folder} was saved with --optimizer-checkpoint data_parallel "
                f"({name}), which no other layout can load: give --drop-optimizer."
            )
    common = dict(checkpoint.common)
    common.pop("rerun_state_machine", None)
    common["args"] = argparse.Namespace(**{**vars(checkpoint.args), **layout, "no_save_rng": True})
    with TorchDistWriter(iteration_folder(run, checkpoint.iteration)) as writer:
        for name, tensor in Progress(checkpoint.all_specs).over(_read(checkpoint, names)):
            writer.add(name, tensor)
        for name in checkpoint.objects:
            if not name.startswith(NOT_WEIGHTS):
                writer.add_object(name, checkpoint.read_object(name))
        writer.add_object(COMMON, [common])
    finish(run, checkpoint.flags, iteration=checkpoint.iteration)
    return len(names)


def _read(checkpoint: TorchDistCheckpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, checkpoint.read(name)
