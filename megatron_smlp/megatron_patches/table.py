"""The one table of everything patched in Megatron and torch on every device, with or without CUDA.

platform/cpu.py adds what a machine without CUDA needs; nothing else in the project patches them.
Whatever starts Megatron (the training entry point, the evaluation) calls `apply` once. Rows that
do not apply to the whole process are installed and reverted by a context manager in their module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Extent = Literal["process", "run", "import", "agent"]


@dataclass(frozen=True)
class Patches:
    """What one module of this folder replaces."""

    module: str
    contract: str
    """The test that fails if a later Megatron no longer has what is replaced."""
    targets: Mapping[str, str]
    """What is wrong with each original, by the name under which Megatron or torch looks it up."""
    extent: Extent = "process"
    """Where they apply: in the whole process, during a run, while Megatron is imported, or in a
    launcher's agent, which does not train."""


_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer"
_SAVING = "megatron.core.dist_checkpointing"
_WRITER = f"{_SAVING}.strategies.filesystem_async"
_TORCH = "torch.distributed.checkpoint"
_NEEDS_APEX = "expects Adam's step count where Apex keeps it, and torch does not"
_EACH_NORM = "without Apex has a GPU's host wait for the norm of each tensor"
_EACH_TENSOR = "without Apex makes a temporary of each tensor"
_ALONE = "fails on rank 0 while the others wait"

PATCHES = (
    Patches(
        "late_compile",
        "unit/platform/test_late_compile.py",
        {"torch.compile": "imports a compiler, for seconds, that most runs never call"},
        extent="import",
    ),
    Patches(
        "compiled_helpers",
        "contract/test_compiled_helpers.py",
        {
            "megatron.core.datasets.utils.compile_helpers": "runs make, though the wheel carries "
            "the compiled module, and ends the first rank",
        },
    ),
    Patches(
        "cross_entropy",
        "contract/test_cross_entropy.py",
        {
            "megatron.core.tensor_parallel.vocab_parallel_cross_entropy": "reads and writes the "
            "fp32 logits a dozen times where one CPU holds the whole vocabulary",
        },
    ),
    Patches(
        "tensor_lists",
        "contract/test_tensor_lists.py",
        {
            f"{_OPTIMIZER}.clip_grads.l2_norm_impl": _EACH_NORM,
            "megatron.training.utils.common_utils.multi_tensor_l2norm": _EACH_NORM,
            f"{_OPTIMIZER}.clip_grads.multi_tensor_scale_impl": _EACH_TENSOR,
            f"{_OPTIMIZER}.optimizer.multi_tensor_scale_impl": _EACH_TENSOR,
            f"{_OPTIMIZER}.optimizer._multi_tensor_copy_this_to_that": "copies each weight alone",
        },
    ),
    Patches(
        "torch_adam",
        "contract/test_optimizer_checkpoints.py",
        {
            f"{_DISTRIBUTED}.state_dict": _NEEDS_APEX,
            f"{_DISTRIBUTED}.load_state_dict": _NEEDS_APEX,
            f"{_DISTRIBUTED}._set_main_param_and_optimizer_states": _NEEDS_APEX,
        },
    ),
    Patches(
        "bucket_padding",
        "contract/test_optimizer_checkpoints.py",
        {
            f"{_DISTRIBUTED}.sharded_param_state_fully_reshardable": "looks for moments behind "
            "padding that it has left out",
        },
    ),
    Patches(
        "safe_loading",
        "unit/checkpoints/test_safe_loading.py",
        {
            f"{_TORCH}.FileSystemReader.read_metadata": "unpickles anything",
            f"{_TORCH}.FileSystemReader.read_data": "fails without the name of the file",
            f"{_TORCH}.DefaultLoadPlanner.load_bytes": "unpickles anything",
            f"{_SAVING}.serialization.load_common": "unpickles anything",
        },
    ),
    Patches(
        "checkpoint_files",
        "contract/test_checkpointing_seams.py",
        {
            f"{_SAVING}.serialization.save_config": _ALONE,
            f"{_WRITER}.FileSystemWriterAsync.write_preloaded_data": "forgets an error's text",
            f"{_WRITER}.FileSystemWriterAsync.finish": _ALONE,
            f"{_WRITER}.get_write_results_queue": "starts a process that outlives a killed run",
        },
        extent="run",
    ),
    Patches(
        "elastic_agent",
        "contract/test_elastic_agent.py",
        {
            "torch.distributed.launcher.api.LocalElasticAgent": "starts again what fails, and "
            "gives ranks 30 s to save",
            "torch.distributed.elastic.rendezvous.dynamic_rendezvous."
            "_BackendRendezvousStateHolder._sanitize": "takes a node for dead whose clock differs; "
            "starts again for one that waits for a complete round",
        },
        extent="agent",
    ),
)


def apply() -> None:
    """Install the patches that apply to the whole process; a second call is a no-op."""
    for patches in PATCHES:
        if patches.extent == "process":
            importlib.import_module(f"megatron_smlp.megatron_patches.{patches.module}").apply()
