"""The model matches other implementations, and loops over its own equations."""

import itertools

import pytest
import torch
from g_mlp_pytorch import gMLP
from support.smlp_systems import make_ids, make_model
from torch import Tensor
from torch.nn import functional

from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _peer(model: SMLPForCausalLM) -> gMLP:
    """Return g-mlp-pytorch's causal gMLP or aMLP with the weights of our one-head model."""
    config = model.config
    peer = gMLP(
        num_tokens=config.vocab_size,
        dim=config.hidden_size,
        depth=config.num_layers,
        seq_len=config.max_position_embeddings,
        ff_mult=config.ffn_hidden_size // config.hidden_size,
        attn_dim=config.tiny_attention_width if config.architecture == "amlp" else None,
        causal=True,
    )
    with torch.no_grad():
        peer.to_embed.weight.copy_(model.model.embed_tokens.weight)
        peer.to_logits[0].load_state_dict(model.model.final_norm.state_dict())
        peer.to_logits[1].weight.copy_(model.lm_head.weight)
        peer.to_logits[1].bias.zero_()
        for layer, other in zip(model.model.layers, peer.layers, strict=True):
            block, mixer = other.fn.fn.fn, layer.mixer
            other.fn.norm.load_state_dict(layer.mixer_norm.state_dict())
            block.proj_in[0].load_state_dict(mixer.up_proj.state_dict())
            block.proj_out.load_state_dict(mixer.down_proj.state_dict())
            block.sgu.norm.load_state_dict(mixer.gate_norm.state_dict())
            block.sgu.load_state_dict(mixer.spatial.state_dict(), strict=False)
            if block.attn is not None:
                _copy_attention(mixer.tiny_attention, block.attn)
    return peer.eval()


def _copy_attention(ours, theirs) -> None:
    qkv = (ours.q_proj, ours.k_proj, ours.v_proj)
    for projection in qkv:
        projection.bias.zero_()  # theirs have none
    theirs.to_qkv.weight.copy_(torch.cat([projection.weight for projection in qkv]))
    theirs.to_out.load_state_dict(ours.out_proj.state_dict())


@pytest.mark.parametrize("architecture", ["gmlp", "amlp"])
@pytest.mark.parametrize("length", [1, 31, 40])
def test_one_head_equals_g_mlp_pytorch(architecture: str, length: int):
    model = make_model(architecture, spatial_heads=1, ffn_hidden_size=64)
    peer = _peer(model)
    ids = make_ids(2, length)
    torch.testing.assert_close(model(ids).logits, peer(ids), **TOLERANCE)


def _gate_chunks(mixer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return passed [B, T, F], and the gate before its norm and normed, each [B, T, C, f]."""
    passed, gate = functional.gelu(mixer.up_proj(hidden)).chunk(2, dim=-1)
    chunks = gate.unflatten(-1, (mixer.num_heads, -1))
    centred = chunks - chunks.mean(-1, keepdim=True)
    normed = centred / (chunks.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed.flatten(-2) * mixer.gate_norm.weight + mixer.gate_norm.bias
    return passed, chunks, normed.unflatten(-1, (mixer.num_heads, -1))


def _row(mixer, expert: int, normed: Tensor, row: int) -> Tensor:
    """normed: <float>[T, f] of one chunk -> M[row, : row + 1] v, [f]."""
    return mixer.spatial.weight[expert, row, : row + 1] @ normed[: row + 1]


def _looped_partial(mixer, hidden: Tensor, prefix: int) -> Tensor:
    passed, chunks, normed = _gate_chunks(mixer, hidden)
    gates = torch.empty_like(normed)
    num_experts = mixer.prefix_router.shape[1]
    for b, t, chunk in itertools.product(*map(range, normed.shape[:3])):
        expert, scale = chunk % num_experts, 1.0
        if t >= prefix:
            scores = torch.zeros(num_experts)
            for s in range(prefix):
                scores = scores + mixer.prefix_router[s] * chunks[b, s, chunk].mean()
            probabilities = scores.softmax(0)
            expert = int(probabilities.argmax())
            scale = probabilities[expert] * num_experts
        mixed = scale * _row(mixer, expert, normed[b, :, chunk], t)
        gates[b, t, chunk] = mixed + mixer.spatial.bias[expert, t]
    return mixer.down_proj(passed * gates.flatten(-2))


@pytest.mark.parametrize("length", [5, 8, 9, 21])
def test_partial_prediction_equals_a_loop_over_rows_with_its_gradients(length: int):
    """P = 8: shorter than the prefix, equal, one longer, and much longer."""
    model = make_model("smlp_partial").double()
    mixer = model.model.layers[-1].mixer
    assert model.config.prefix_length == 8
    hidden = torch.randn(2, length, 32, dtype=torch.float64)
    layout, _ = model.model._layout(hidden, None, None, None)
    parameters = [mixer.spatial.weight, mixer.spatial.bias, mixer.up_proj.weight]
    if length > 8:
        parameters.append(mixer.prefix_router)
    outputs, gradients = [], []
    for output in (mixer(hidden, layout, None)[0], _looped_partial(mixer, hidden, 8)):
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), parameters))
    # The router itself computes in fp32, whatever the rest does.
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * right.abs().max())


@pytest.mark.parametrize("system", ["gmlp_toeplitz", "smlp_partial_toeplitz"])
@pytest.mark.parametrize("length", [40, 70])
def test_a_toeplitz_model_is_the_dense_one_with_its_matrices(system: str, length: int):
    """Also if the sequence is longer than T = 40, when each token reads 40."""
    model = make_model(system).double()
    dense = make_model(
        system, toeplitz=False, max_position_embeddings=length, prefix_fraction=8.5 / length
    ).double()
    state = dict(model.state_dict())
    for name in [name for name in state if "spatial.weight" in name]:
        vectors = state[name]
        matrices = vectors.new_zeros(len(vectors), length, length)
        for t in range(length):
            for s in range(max(0, t - 39), t + 1):
                matrices[:, t, s] = vectors[:, t - s]
        bias = name.replace("weight", "bias")
        state |= {name: matrices, bias: state[bias].expand(-1, length)}
    dense.load_state_dict(state)
    ids = make_ids(2, length)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, **TOLERANCE)
