"""GPT-2 from transformers becomes a Megatron checkpoint that computes the same and trains on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import from_gpt2, from_hf, megatron_logits, run
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.errors import UsageError

pytestmark = pytest.mark.usefixtures("in_one_process")

SIZES = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
SIZES |= {"bos_token_id": 100, "eos_token_id": 100}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "exact gelu, other width": {"activation_function": "gelu", "n_inner": 48},
    "untied": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}


def save_gpt2(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.transformer.ln_f.weight.fill_(2.0)  # not its initial value
    model.save_pretrained(folder)
    return folder


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str):
    folder = save_gpt2(tmp_path / "gpt2", **VARIANTS[variant])
    said = run(from_gpt2, folder, tmp_path / "run")
    assert "forward check" in said[0]
    tokens = torch.randint(101, (3, 16))
    logits, expected = megatron_logits(tmp_path / "run", tokens), their_logits(folder, tokens)
    torch.testing.assert_close(logits[..., :101], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("untied", [False, True])
def test_padding_is_unlikely(tmp_path: Path, untied: bool):
    """It repeats the token whose mean logit is lowest, since softmax counts padding."""
    folder = save_gpt2(tmp_path / "gpt2", tie_word_embeddings=not untied)
    run(from_gpt2, folder, tmp_path / "run")
    theirs, ours = load_file(folder / "model.safetensors"), TorchDistCheckpoint(tmp_path / "run")
    embedding = theirs["transformer.wte.weight"]
    output = theirs["lm_head.weight"] if untied else embedding
    least = output[(output @ theirs["transformer.ln_f.bias"]).argmin()].expand(27, -1)
    name = "output_layer.weight" if untied else "embedding.word_embeddings.weight"
    assert torch.equal(ours.read(name), torch.cat([output, least]))
    if untied:
        rest = ours.read("embedding.word_embeddings.weight")
        assert torch.equal(rest[:101], embedding)


def test_older_files(tmp_path: Path):
    """As GPT-2 was first published: no prefix, and tensors for masks and the output layer."""
    folder = save_gpt2(tmp_path / "gpt2")
    tokens = torch.randint(101, (2, 16))
    expected = their_logits(folder, tokens)
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    older["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    older["lm_head.weight"] = older["wte.weight"]
    file, metadata = folder / "model.safetensors", {"format": "pt"}
    save_file({name: tensor.clone() for name, tensor in older.items()}, file, metadata=metadata)
    run(from_hf, folder, tmp_path / "run")  # which detects the format
    logits = megatron_logits(tmp_path / "run", tokens)[..., :101]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    older["lm_head.weight"] = older["wte.weight"] + 1
    save_file(older, file, metadata=metadata)
    with pytest.raises(UsageError, match=r"lm_head\.weight, which is not transformer\.wte\.weight"):
        run(from_gpt2, folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu' cannot be imported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 5}, "num_attention_heads=5: must divide hidden_size = 32"),
        ({"n_layer": "many"}, "n_layer"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    folder = save_gpt2(tmp_path / "gpt2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        run(from_gpt2, folder, tmp_path / "run")
