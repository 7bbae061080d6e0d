"""A Transformer with RoPE, RMSNorm and SwiGLU converts to transformers' Llama and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.conversions import assert_same, folder_weights, from_hf, run, weights
from support.in_process import pretrained
from support.language_models import save_tokenizer
from support.smlp_systems import make_ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.errors import UsageError
from megatron_smlp.generation import cli
from megatron_smlp.generation.language_model import load, model_of
from megatron_smlp.platform.one_process import one_process

SIZES = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
SIZES |= {"bos_token_id": None, "eos_token_id": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "tied, one group": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "biases, a key for each query": {
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
FLAGS = (
    "--architecture transformer --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --lr 1e-2 --log-interval 1"
)


def save_llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model) is LlamaForCausalLM
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("in_one_process")
def test_in_and_out_again(tmp_path: Path, variant: str):
    folder = save_llama(tmp_path / "llama", **VARIANTS[variant])
    said = run(from_hf, folder, tmp_path / "run")
    assert "forward check" in said[0]
    said = run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "again")
    assert any("forward check" in line for line in said)
    assert said[-1].endswith("as a Llama")
    assert_same(folder_weights(folder), folder_weights(tmp_path / "again"))
    tokens = make_ids(2, 40)
    expected = their_logits(folder, tokens)
    torch.testing.assert_close(their_logits(tmp_path / "again", tokens), expected)
    with torch.no_grad():
        ours = model_of(TorchDistCheckpoint(tmp_path / "run"))(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_rows_that_are_no_token_are_padding(tmp_path: Path):
    """A vocabulary that was rounded up trains on with its tokenizer."""
    folder = save_llama(tmp_path / "llama", vocab_size=272)
    assert save_tokenizer(folder) == 257
    run(from_hf, folder, tmp_path / "run")
    flags = TorchDistCheckpoint(tmp_path / "run").flags
    assert (flags["vocab_size"], flags["padded_vocab_size"]) == (257, 272)
    argv = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --save {tmp_path}/on"
    load = f"--load {tmp_path / 'run'} --use-checkpoint-args --mock-data --train-iters 1 --lr 0"
    with pretrained(f"{load} {argv} --micro-batch-size 2 --eval-iters 0", base=""):
        pass
    run(convert.torch_dist_to_hf, tmp_path / "on", tmp_path / "again")
    assert_same(folder_weights(folder), folder_weights(tmp_path / "again"))


def test_a_lower_precision_is_not_that_of_the_positions(tmp_path: Path):
    argv = ["--hf", str(save_llama(tmp_path)), "--dtype", "bfloat16"]
    numbers = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "103"]
    model = load(cli.build_parser().parse_args([*argv, *numbers])).model
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_trained_one_generates_in_transformers_and_comes_back(tmp_path: Path):
    with pretrained(f"{FLAGS} --save {tmp_path / 'run'}"):
        pass
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    checkpoint = TorchDistCheckpoint(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model) is LlamaForCausalLM
    assert not list((tmp_path / "hf").glob("*.py"))
    prompt = make_ids(2, 3) % 100
    asked = {"max_new_tokens": 8, "do_sample": False}
    with one_process():
        ours = model_of(checkpoint).generate(prompt, **asked)
    assert torch.equal(model.generate(prompt, **asked), ours)
    run(from_hf, tmp_path / "hf", tmp_path / "again")
    again = TorchDistCheckpoint(tmp_path / "again")
    assert_same(weights(checkpoint), weights(again))
    changed = {name for name, value in checkpoint.flags.items() if again.flags[name] != value}
    assert all(name.startswith("moe_") for name in changed), "there are no experts"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ],
)
def test_what_cannot_be_imported(tmp_path: Path, changes: dict[str, Any], named: str):
    folder = save_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=f"{named} is not supported"):
        run(from_hf, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_older_files_hold_more_than_weights(tmp_path: Path):
    """Tables of angles, as in Llama 1 and 2, and a copy of the tied embedding."""
    folder = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    tensors = folder_weights(folder)
    head, embedding = "lm_head.weight", tensors["model.embed_tokens.weight"]
    angles = "model.layers.1.self_attn.rotary_emb.inv_freq"
    older = {**tensors, angles: torch.ones(4), head: embedding.clone()}
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    said = run(from_hf, folder, tmp_path / "run")
    assert "forward check" in said[0]
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "again", checks=False)
    assert_same(folder_weights(tmp_path / "again"), tensors)
    older[head] += 1
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lm_head\.weight, which is not model\.embed_tokens"):
        run(from_hf, folder, tmp_path / "other")
