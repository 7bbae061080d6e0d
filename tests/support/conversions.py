"""Small checkpoints and exported folders of every system to convert, with weights that matter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Source, Spec
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import cli, convert, megatron_model
from megatron_smlp.conversion.huggingface import expected_shapes, write
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM
from megatron_smlp.platform.one_process import one_process


def save_exported(model: SMLPForCausalLM, folder: Path) -> Path:
    """Write a folder as `--to hf` does."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    tensors = {name: state[name] for name in expected_shapes(model)}
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    write(folder, model.config, specs, tensors.items(), shard_limit=10**9, tokenizer=None)
    return folder


def run(kind: Any, load: Path, save: Path, **changes: Any) -> list[str]:
    """Run one conversion and return its messages."""
    said: list[str] = []
    options = cli.build_parser().parse_args(
        ["--load", str(load), "--save", str(save), "--to", "hf"]
    )
    vars(options).update(layout={}, model={}, shard_limit=10**9)
    assert changes.keys() <= vars(options).keys()
    vars(options).update(changes)
    kind(options, said.append)
    return said


def from_hf(options: argparse.Namespace, say: convert.Say) -> None:
    """Convert as `--from hf --to torch_dist` does."""
    options.source = "hf"
    convert.to_torch_dist(options, say)


def from_gpt2(options: argparse.Namespace, say: convert.Say) -> None:
    """Convert as `--from gpt2 --to torch_dist` does."""
    options.source = "gpt2"
    convert.to_torch_dist(options, say)


def weights(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.specs}


def folder_weights(folder: Path) -> dict[str, Tensor]:
    return weights(SafetensorsFolder(folder))


def megatron_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return a checkpoint's logits <fp32>[B, T, V], computed by Megatron's model."""
    with one_process():
        checkpoint = TorchDistCheckpoint(folder)
        return megatron_model.logits(megatron_model.build(checkpoint.flags), checkpoint, tokens)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check bitwise equality, including names and dtypes."""
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
