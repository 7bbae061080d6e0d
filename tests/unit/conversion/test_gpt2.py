"""GPT-2 of transformers becomes a Megatron checkpoint that computes the same and trains on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import from_gpt2, from_hf, run
from support.in_process import pretrained
from support.launches import records
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import megatron_model
from megatron_smlp.errors import UsageError
from megatron_smlp.platform.one_process import one_process

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 100,
    "eos_token_id": 100,
}
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
        model.transformer.ln_f.weight.fill_(2.0)  # so that there is something to unlearn
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits
    return logits


def our_logits(run_folder: Path, tokens: Tensor) -> Tensor:
    with one_process():
        checkpoint = TorchDistCheckpoint(run_folder)
        return megatron_model.logits(megatron_model.build(checkpoint.flags), checkpoint, tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    folder = save_gpt2(tmp_path / "gpt2", **VARIANTS[variant])
    said = run(from_gpt2, folder, tmp_path / "run")
    assert "forward check" in said[0]
    tokens = torch.randint(101, (3, 16))
    torch.testing.assert_close(
        our_logits(tmp_path / "run", tokens)[..., :101],
        their_logits(folder, tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("untied", [False, True])
def test_padding_is_unlikely(tmp_path: Path, untied: bool) -> None:
    """It repeats the token whose logit is lowest in the mean, where softmax counts it."""
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


def test_older_files(tmp_path: Path) -> None:
    """As GPT-2 was first published: no prefix, masks among the tensors, the output layer too."""
    folder = save_gpt2(tmp_path / "gpt2")
    tokens = torch.randint(101, (2, 16))
    expected = their_logits(folder, tokens)
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    older["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    older["lm_head.weight"] = older["wte.weight"]
    edit(folder, older)
    run(from_hf, folder, tmp_path / "run")  # which sees what it is
    logits = our_logits(tmp_path / "run", tokens)[..., :101]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    older["lm_head.weight"] = older["wte.weight"] + 1
    edit(folder, older)
    with pytest.raises(UsageError, match=r"lm_head\.weight, which is not wte\.weight"):
        run(from_gpt2, folder, tmp_path / "other")


def test_what_was_imported_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loss is that of transformers on the same tokens, and training lowers it."""
    folder = save_gpt2(tmp_path / "gpt2")
    run(from_gpt2, folder, tmp_path / "run", checks=False, divisible_by=1)
    batches = watch_batches(monkeypatch)
    words = (
        f"--use-checkpoint-args --load {tmp_path / 'run'} --save {tmp_path / 'more'} --mock-data "
        "--tokenizer-type NullTokenizer --vocab-size 101 --train-iters 20 --log-interval 1 "
        "--lr 1e-2 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 "
        "--global-batch-size 2 --eval-iters 0 --num-workers 0"
    )
    with pretrained(words, base=""):
        losses = [r["loss"] for r in records(tmp_path / "more") if "loss" in r]
    tokens, labels = batches[0]
    expected = functional.cross_entropy(
        their_logits(folder, tokens).flatten(0, 1), labels.flatten()
    )
    assert losses[0] == pytest.approx(float(expected), abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of the calls of Megatron's model from now on."""
    from megatron.core.models.gpt import GPTModel

    batches: list[tuple[Tensor, Tensor]] = []
    original = GPTModel.forward

    def forward(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append((input_ids.clone(), kwargs["labels"].clone()))
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(GPTModel, "forward", forward)
    return batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu' cannot be imported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 5}, "num_attention_heads=5 must divide hidden_size=32"),
        ({"model_type": "llama"}, "of type 'llama', not 'gpt2'"),
        ({"n_layer": "many"}, "n_layer"),
    ],
)
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        run(from_gpt2, folder, tmp_path / "run")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_wrong_tensor_is_named(tmp_path: Path, change: str) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors["score.weight" if change == "unknown" else name] = torch.ones(3, 7)
    edit(folder, tensors)
    with pytest.raises(UsageError, match=r"score\.weight" if change == "unknown" else name):
        run(from_gpt2, folder, tmp_path / "run")
