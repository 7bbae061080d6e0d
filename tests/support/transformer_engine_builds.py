"""Build models on Transformer Engine's stand-in, and record its constructors' arguments.

    PYTHONPATH=tests:tests/support/transformer_engine_stub \\
      python tests/support/transformer_engine_builds.py cases.json recorded.json

`cases.json`: name -> {"flags": ..., "world": processes}. This process is rank 0, in fake process
groups. Tensors are on the CPU, as in the rest of the suite; flags are resolved as on a CUDA device,
where Transformer Engine runs.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformer_engine.record import CALLS

from megatron_smlp.platform import cpu


def start(world: int) -> None:
    """Start a fake group of `world` processes, of which this is the first."""
    os.environ.update(RANK="0", WORLD_SIZE=str(world), CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def build(flags: list[str]) -> dict[str, Any]:
    """Parse flags, build the model, and describe it and its checkpoint."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.in_process import build_model, prepare_megatron

    from megatron_smlp.flags.parse import parse_arguments

    prepare_megatron()
    args = parse_arguments(flags)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    model = build_model(args)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    return {
        "calls": [list(call) for call in CALLS],
        "parameters": {name: list(value.shape) for name, value in model.named_parameters()},
        "saved": sorted(model.sharded_state_dict(metadata=metadata)),
    }


def plain(value: Any) -> Any:
    """Return a value for JSON: a group's size, or the string of anything else."""
    return value.size() if isinstance(value, torch.distributed.ProcessGroup) else str(value)


def forget() -> None:
    """Clear the state of a build before the next one."""
    from megatron.core import parallel_state
    from support.in_process import forget_arguments

    forget_arguments()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    CALLS.clear()


def record(case: dict[str, Any]) -> dict[str, Any]:
    """Return what was built, or the error in one line."""
    try:
        start(case["world"])
        return build(case["flags"].split())
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        forget()


if __name__ == "__main__":
    cpu.apply()
    cpu.needed = lambda: False
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recorded = {name: record(case) for name, case in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(recorded, default=plain), encoding="utf-8")
