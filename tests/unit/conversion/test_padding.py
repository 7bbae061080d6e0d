"""Another padding of the vocabulary keeps the logits of real tokens, and goes back bitwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import assert_same, folder_weights, from_hf, run, save_exported, weights
from support.in_process import pretrained
from support.launches import records
from support.smlp_systems import make_model

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert

DENSE: dict[str, Any] = {"num_experts": None, "moe_ffn_hidden_size": None}
EMBEDDING = "embedding.word_embeddings.weight"
TRAINED = (
    "--architecture transformer --num-attention-heads 4 --log-interval 1 --token-router hash "
    "--num-experts 4 --untie-embeddings-and-output-weights"
)


@pytest.mark.parametrize(
    "system",
    ["transformer", "hash", "minhash", pytest.param("smlp_deterministic", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("in_one_process")
def test_there_and_back(tmp_path: Path, system: str):
    changes = {"vocab_size": 112, "unpadded_vocab_size": 101, "tiny_attention_width": 64}
    if system == "smlp_deterministic":
        changes["num_feature_experts"] = 2  # divisible by two tensor parallel ranks
    if system == "transformer":
        changes |= {**DENSE, "tie_word_embeddings": False}
    exported = save_exported(make_model(system, **changes), tmp_path / "hf")
    wider = {"make_vocab_size_divisible_by": 64, "layout": {"tensor_model_parallel_size": 2}}
    said = run(from_hf, exported, tmp_path / "a", **wider)
    assert "forward check" in said[0]
    wide = TorchDistCheckpoint(tmp_path / "a")
    assert wide.flags["padded_vocab_size"] == 128
    for name, tensor in weights(wide).items():
        if tensor.shape[0] == 128:  # new rows repeat the first row of padding
            assert torch.equal(tensor[112:], tensor[101:102].expand_as(tensor[112:])), name
    one = {"make_vocab_size_divisible_by": 1, "layout": {"tensor_model_parallel_size": 1}}
    run(convert.torch_dist_to_torch_dist, tmp_path / "a", tmp_path / "b", **one)
    assert TorchDistCheckpoint(tmp_path / "b").flags["padded_vocab_size"] == 101
    run(convert.torch_dist_to_hf, tmp_path / "b", tmp_path / "c", make_vocab_size_divisible_by=16)
    before, after = (
        {name: tensor[:101] if len(tensor) == 112 else tensor for name, tensor in whole.items()}
        for whole in map(folder_weights, (exported, tmp_path / "c"))
    )
    assert_same(before, after)


def test_a_run_goes_on_with_its_optimizer(tmp_path: Path):
    """Moments get the same rows, and new padding repeats rows that training has made unlikely."""
    flags = f"{TRAINED} --make-vocab-size-divisible-by 8 --lr-decay-style constant"
    with pretrained(f"{flags} --save {tmp_path / 'run'} --save-interval 2 --lr 1e-1"):
        old = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    wider = {"ckpt_step": 2, "make_vocab_size_divisible_by": 64, "checks": False}
    run(convert.torch_dist_to_torch_dist, tmp_path / "run", tmp_path / "wide", **wider)
    checkpoint = TorchDistCheckpoint(tmp_path / "wide")
    for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        assert checkpoint.all_specs[kind + EMBEDDING].shape[0] == 128
    flags = flags.replace("divisible-by 8", "divisible-by 64")
    with pretrained(f"{flags} --load {tmp_path / 'wide'} --log-dir {tmp_path / 'log'} --lr 1e-1"):
        new = [r["loss"] for r in records(tmp_path / "log") if "loss" in r]
    # The softmax has 24 more rows, each with the small share that a row of padding has.
    assert len(new) == 2
    assert new == pytest.approx(old[2:], rel=0.05)
