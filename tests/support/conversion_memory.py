"""Measure the memory of conversions: this process's peak above its usage before each.

    python -m support.conversion_memory FOLDER

Makes a model of each kind with random weights, a few hundred megabytes large, in FOLDER and
converts it in all directions. Small conversions of the same kind come first, so that libraries are
not counted. Prints a JSON object: name of a conversion -> bytes.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.conversions import from_hf, run
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.conversion import convert, huggingface
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.platform.allocator import return_large_blocks

SHARD = 20_000_000
SMALL: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 256, "num_layers": 2}
SMALL |= {"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64}
MOE: dict[str, Any] = {"architecture": "smlp", "feature_router": "deterministic"}
MOE |= {"num_feature_experts": 2, "num_dense_layers": 1, "token_router": "base"}
# Their largest tensors: the embedding, and one layer's stack of experts.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformer": (
        {"architecture": "transformer"},
        {
            "hidden_size": 1024,
            "ffn_hidden_size": 4096,
            "num_layers": 6,
            "num_attention_heads": 16,
            "vocab_size": 25_600,
        },
    ),
    "smlp": (
        {**MOE, "num_experts": 4},
        {
            "hidden_size": 512,
            "ffn_hidden_size": 1024,
            "num_layers": 4,
            "vocab_size": 12_800,
            "num_experts": 16,
            "moe_ffn_hidden_size": 2048,
        },
    ),
}


def drawn(specs: dict[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    for name, spec in specs.items():
        if not spec.dtype.is_floating_point:
            yield name, torch.zeros(spec.shape, dtype=spec.dtype)
        elif name.endswith("norm.weight"):
            yield name, torch.ones(spec.shape, dtype=spec.dtype)
        else:
            yield name, torch.randn(spec.shape, dtype=spec.dtype) * 0.02


def write_exported(folder: Path, **flags: Any) -> dict[str, Spec]:
    config = SMLPConfig(**flags)
    tensors = huggingface.build(config).state_dict()
    expected = huggingface.expected_shapes(huggingface.build(config))
    specs = {name: Spec(tuple(tensors[name].shape), tensors[name].dtype) for name in expected}
    folder.mkdir(parents=True)
    huggingface.write(folder, config, specs, drawn(specs), shard_limit=SHARD, tokenizer=None)
    return specs


class Peak:
    """The peak of this process's memory since this object was made."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = _memory("VmRSS")

    def bytes(self) -> int:
        return _memory("VmHWM") - self.before


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(kind + ":")]
    return int(line.split()[1]) * 1024


def measure(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes of each conversion's peak, the largest tensor and the whole model."""
    specs = write_exported(folder / "hf", **flags)
    pairs: dict[str, tuple[Any, str, str]] = {
        "hf to torch_dist": (from_hf, "hf", "run"),
        "torch_dist to hf": (convert.torch_dist_to_hf, "run", "again"),
        "torch_dist to torch_dist": (convert.torch_dist_to_torch_dist, "run", "rewritten"),
    }
    peaks = {}
    for name, (work, load, save) in pairs.items():
        peak = Peak()
        run(work, folder / load, folder / save, shard_limit=SHARD)
        peaks[name] = peak.bytes()
    largest = max(spec.nbytes for spec in specs.values())
    total = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    return {"peaks": peaks, "largest": largest, "model": total, "shard": SHARD}


def main(folder: Path) -> None:
    return_large_blocks()
    found = {}
    for kind, (flags, large) in KINDS.items():
        measure(folder / f"small {kind}", {**SMALL, **flags})
        found[kind] = measure(folder / kind, {**SMALL, **flags, **large})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
