"""Parameter counts match built models exactly; FLOPs match torch's FLOP counter."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.in_process import build_model
from support.smlp_systems import SYSTEMS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_smlp.accounting.costs import (
    ModelShape,
    forward_tflops_per_1024_tokens,
    model_cost,
    training_flops_per_token,
)
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM
from megatron_smlp.options import MODEL_FLAGS

LENGTH = 128


def _config(system: str) -> SMLPConfig:
    return SMLPConfig(
        **{
            "token_router": "none",
            "vocab_size": 512,
            "hidden_size": 128,
            "ffn_hidden_size": 384,
            "num_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": LENGTH,
            "num_experts": 4,
            "moe_ffn_hidden_size": 256,
            "tiny_attention_width": 16,
            **SYSTEMS[system],
        }
    )


def _namespace(config: SMLPConfig) -> argparse.Namespace:
    """Return the same model under Megatron's names."""
    return argparse.Namespace(
        **{name: getattr(config, facts.hf) for name, facts in MODEL_FLAGS.items() if facts.hf},
        num_query_groups=config.num_query_groups,
        kv_channels=config.hidden_size // config.num_attention_heads,
        group_query_attention=config.num_query_groups is not None,
        moe_router_topk=config.moe_router_topk,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        quick_geglu=False,
        bias_swiglu_fusion=False,
        window_size=None,
    )


@pytest.mark.parametrize("window", [0, 5, 126, 127, 500])
@pytest.mark.parametrize("is_text", [False, True])
def test_attention_reads_its_window_alone(window: int, is_text: bool):
    """Text: as in a study's file, which no parser of Megatron's has read."""
    args = _namespace(_config("transformer"))
    whole = model_cost(ModelShape.from_args(args))
    args.window_size = f"{window},0" if is_text else (window, 0)
    cost = model_cost(ModelShape.from_args(args))
    pairs = sum(min(position, window) + 1 for position in range(LENGTH))
    unread = 3 * 2 * 2 * 128 * (LENGTH * (LENGTH + 1) // 2 - pairs)  # layers, products, D
    assert whole.flops - cost.flops == unread
    assert cost.square_flops == whole.square_flops


@pytest.mark.parametrize("window", ["-1,0", "(-1, 0)", (-1, 0)])
def test_an_infinite_window_is_none(window: Any):
    args = _namespace(_config("transformer"))
    whole = model_cost(ModelShape.from_args(args))
    args.window_size = window
    assert model_cost(ModelShape.from_args(args)) == whole


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_built_model_has_these_parameters_and_does_these_flops(system: str):
    config = _config(system)
    cost = model_cost(ModelShape.from_args(_namespace(config)))
    model = SMLPForCausalLM(config).eval()
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(config.vocab_size, (2, LENGTH))
    # The math kernel, so that the counter sees each product of attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert abs(counter.get_total_flops() / (2 * cost.square_flops) - 1) < 0.01
    # Active parameters exclude the experts that a token does not visit.
    expert = (2 + config.swiglu) * config.hidden_size * config.expert_width
    num_moe = sum(config.has_token_moe(index) for index in range(config.num_layers))
    visited = {"gshard": 2, "topk": config.moe_router_topk}.get(config.token_router, 1)
    idle = config.num_experts - visited
    assert cost.parameters - cost.active_parameters == num_moe * idle * expert


@pytest.mark.usefixtures("megatron")
def test_zeros_are_those_of_a_built_model(parse: Callable[..., Any]):
    """Dense matrices and those of experts have zeros; Toeplitz matrices have none."""
    smlp = "--architecture smlp --num-dense-layers 1 --feature-router partial "
    smlp += "--num-feature-experts 4"
    found = []
    for flags in (smlp, "--architecture gmlp --spatial-heads 2", f"{smlp} --toeplitz"):
        args = parse(flags)
        weights = {
            parameter
            for name, parameter in build_model(args).named_parameters()
            if name.endswith("spatial.weight")
        }
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert model_cost(ModelShape.from_args(args)).zero_parameters == zeros
        found.append(zeros)
    assert found == [13 * 16 * 15 // 2, 8 * 16 * 15 // 2, 0]


def test_the_papers_convention_gives_the_papers_figure():
    """24 layers of width 1024 at T = 1024 and V = 50,257: 0.827 TFLOPs."""
    config = SMLPConfig(
        architecture="transformer",
        vocab_size=50257,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_layers=24,
        num_attention_heads=16,
    )
    shape = ModelShape.from_args(_namespace(config))
    paper, needed = forward_tflops_per_1024_tokens(model_cost(shape), shape)
    assert round(paper, 3) == 0.827
    saved = 24 * 4 * 1024 * (1024 * 1023 // 2) / 1e12
    assert abs(paper - needed - saved) < 1e-9
    assert training_flops_per_token(model_cost(shape), shape)[1] == pytest.approx(
        3 * needed * 1e12 / 1024
    )
