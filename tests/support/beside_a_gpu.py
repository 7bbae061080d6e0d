"""Run conversions on a machine that, as far as Python can tell, has a GPU and Apex.

    PYTHONPATH=tests python tests/support/beside_a_gpu.py FOLDER CHECKPOINT SYSTEM ...

CUDA claims to be available but does not start, and Apex's norm accepts only CUDA tensors: a
conversion that uses either stops with an error. Prints what the forward checks said.
"""

import sys
import types
from collections.abc import Sequence
from pathlib import Path

import torch


def pretend() -> None:
    """Fake a CUDA device that answers queries, and Apex's fused norm."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    apex, normalization, fused = (
        types.ModuleType(name)
        for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")
    )
    fused.FusedLayerNormAffineFunction = FusedNorm
    sys.modules |= {module.__name__: module for module in (apex, normalization, fused)}


class FusedNorm:
    """Apex's kernel, which has no CPU implementation."""

    @staticmethod
    def apply(x: torch.Tensor, *_: object) -> torch.Tensor:
        raise RuntimeError(f"expected a CUDA tensor, not one on {x.device}")


def convert_all(folder: Path, checkpoint: Path, systems: Sequence[str]) -> None:
    """Convert systems in both directions, and a Megatron checkpoint with rotary positions."""
    from support.conversions import convert, from_hf, run, save_exported
    from support.smlp_systems import SYSTEMS, make_model

    for system in systems:
        dense = {} if "token_router" in SYSTEMS[system] else {"num_experts": None}
        exported = save_exported(make_model(system, **dense), folder / system / "hf")
        print(system, *run(from_hf, exported, folder / system / "run"))
        print(
            system, *run(convert.torch_dist_to_hf, folder / system / "run", folder / system / "b")
        )
    print("rotary", *run(convert.torch_dist_to_torch_dist, checkpoint, folder / "rotary"))


if __name__ == "__main__":
    pretend()
    convert_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM

    assert HAVE_FUSED_LAYER_NORM, "Megatron did not see Apex"
