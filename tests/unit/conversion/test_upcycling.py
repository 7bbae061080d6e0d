"""A dense checkpoint becomes a sparse one with the same loss at the start."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import (
    assert_same,
    from_gpt2,
    from_hf,
    megatron_logits,
    run,
    save_exported,
    weights,
)
from support.cover import slow_unless_in
from support.in_process import pretrained
from support.launches import REPOSITORY, records
from support.smlp_systems import make_config, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_smlp import plugin_files
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.huggingface import flags_of
from megatron_smlp.conversion.rewriting import check_layout
from megatron_smlp.conversion.upcycling import target_flags
from megatron_smlp.errors import UsageError
from megatron_smlp.systems import TOKEN_ROUTERS

GPT2 = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 100, "eos_token_id": 100}
DENSE: dict[str, Any] = {"num_experts": None, "moe_ffn_hidden_size": None}


def dense(folder: Path, system: str, **changes: Any) -> Path:
    exported = save_exported(make_model(system, **DENSE, **changes), folder / "hf")
    run(from_hf, exported, folder / "dense", checks=False)
    return folder / "dense"


def upcycled(source: Path, target: Path, **model: Any) -> tuple[list[str], float]:
    """Return what was printed, and the largest logit difference relative to the largest logit."""
    said = run(convert.upcycle, source, target, model=model)
    tokens = torch.randint(101, (2, 30))
    before, after = megatron_logits(source, tokens), megatron_logits(target, tokens)
    return said, float((before - after).abs().max() / before.abs().max())


ROUTERS = [name for name, rule in TOKEN_ROUTERS.items() if rule.upcycling_scale]
FAST = [("gshard", True), ("hash", True), ("switch", False)]  # base: test_some_layers_stay_dense


@pytest.mark.parametrize(
    ("router", "bias"), slow_unless_in(FAST, itertools.product(ROUTERS, (True, False)))
)
@pytest.mark.usefixtures("in_one_process")
def test_a_transformer_keeps_its_loss(tmp_path: Path, router: str, bias: bool):
    source = dense(tmp_path, "transformer", add_bias_linear=bias)
    said, difference = upcycled(source, tmp_path / "moe", token_router=router, num_experts=4)
    assert "apart" in said[0]
    assert "since" not in said[0]
    assert difference < 1e-3
    checkpoint = TorchDistCheckpoint(tmp_path / "moe")
    assert checkpoint.flags["moe_ffn_hidden_size"] == 48 + 8 * bias
    if router != "hash":
        router_weight = checkpoint.read("decoder.layers.0.mlp.router.weight")
        assert router_weight.std() > 0


@pytest.mark.usefixtures("in_one_process")
def test_some_layers_stay_dense(tmp_path: Path):
    source = dense(tmp_path, "transformer", hidden_act="gelu_new")
    model = {"token_router": "base", "num_experts": 2, "moe_layer_freq": 2}
    _, difference = upcycled(source, tmp_path / "moe", **model)
    assert difference < 1e-3
    names = TorchDistCheckpoint(tmp_path / "moe").specs
    assert "decoder.layers.1.mlp.linear_fc1.bias" in names
    assert "decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in names


@pytest.mark.parametrize(
    ("heads", "router", "experts", "chunks", "is_exact"),
    [
        (3, "deterministic", 3, None, True),
        (1, "partial", 4, 1, True),
        (1, "partial", 3, None, False),
    ],
)
@pytest.mark.usefixtures("in_one_process")
def test_a_gmlp_becomes_an_smlp(
    tmp_path: Path, heads: int, router: str, experts: int, chunks: int | None, is_exact: bool
):
    source = dense(tmp_path, "gmlp", spatial_heads=heads)
    sparse = {"architecture": "smlp", "num_dense_layers": 1, "token_router": "base"}
    sparse |= {"feature_router": router, "num_feature_experts": experts}
    sparse |= {"num_feature_chunks": chunks} if chunks else {}
    said, difference = upcycled(source, tmp_path / "smlp", num_experts=2, **sparse)
    assert (difference < 1e-3) == is_exact
    assert ("since the gate's LayerNorm is over each of 3 chunks" in said[0]) != is_exact


def test_an_upcycled_model_trains_on(tmp_path: Path):
    base = "--architecture transformer --num-attention-heads 4 --log-interval 1 --lr 1e-2"
    with pretrained(f"{base} --save {tmp_path / 'dense'} --train-iters 2"):
        pass
    model = {"token_router": "hash", "num_experts": 4}
    run(convert.upcycle, tmp_path / "dense", tmp_path / "moe", model=model, checks=False)
    sparse = "--token-router hash --num-experts 4 --moe-ffn-hidden-size 72"
    losses = []
    for number, argv in enumerate((f"dense {base}", f"moe {base} {sparse}")):
        name, _, flags = argv.partition(" ")
        log = tmp_path / str(number)
        load = f"--load {tmp_path / name} --finetune --log-dir {log} --train-iters 2"
        with pretrained(f"{flags} {load}"):
            losses.append([r["loss"] for r in records(log) if "loss" in r])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-3)


@pytest.mark.usefixtures("in_one_process")
def test_from_folders_of_transformers(tmp_path: Path):
    exported = save_exported(make_model("transformer", **DENSE), tmp_path / "hf")
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path / "gpt2")
    model = {"token_router": "base", "num_experts": 2}
    for source, kind in ((exported, from_hf), (tmp_path / "gpt2", from_gpt2)):
        folder = tmp_path / kind.__name__
        said = run(convert.upcycle, source, folder / "once", source=kind.__name__[5:], model=model)
        assert "apart" in said[0]
        run(kind, source, folder / "first", checks=False)
        run(convert.upcycle, folder / "first", folder / "twice", checks=False, model=model)
        once, twice = (TorchDistCheckpoint(folder / name) for name in ("once", "twice"))
        assert_same(weights(once), weights(twice))
        assert once.flags == twice.flags


def test_layers_without_an_ffn_beside_others_that_have_one():
    """A plugin's first layer may have none: its biases are carried all the same."""
    for name in ("gated_conv", "conv_gating"):
        plugin_files.load(str(REPOSITORY / "plugins" / f"{name}.py"))
    flags = flags_of(make_config("gmlp", **DENSE))
    flags |= {"architecture": "conv_gating", "add_bias_linear": True}
    target = target_flags(flags, {"token_router": "hash", "num_experts": 2})
    assert target["moe_ffn_hidden_size"] == flags["ffn_hidden_size"] + 8


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "give --token-router"),
        ({"token_router": "hash"}, "requires --num-experts"),
        ({"token_router": "topk", "num_experts": 2}, "give one of switch, gshard, base, hash"),
        ({"architecture": "smlp", "token_router": "hash"}, "smlp cannot be made from transformer"),
        ({"token_router": "hash", "num_experts": 2, "moe_ffn_hidden_size": 48}, "give 49"),
        ({"token_router": "hash", "num_experts": 2, "moe_layer_freq": 0}, "--moe-layer-freq 0"),
    ],
)
def test_what_cannot_be_upcycled_is_named(model: dict[str, Any], message: str):
    flags = flags_of(make_config("transformer", **DENSE))
    with pytest.raises(UsageError, match=message):
        check_layout(target_flags(flags, model), {}, is_new=True)
