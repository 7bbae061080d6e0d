"""torch_dist <-> Hugging Face: the same logits and the same bits, for every system."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import assert_same, folder_weights, from_hf, run, save_exported, weights
from support.cover import slow_unless_in
from support.in_process import pretrained
from support.launches import REPOSITORY
from support.smlp_systems import SYSTEMS, make_model
from transformers import AutoModelForCausalLM

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import checkpoint_of
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.errors import CheckpointError
from megatron_smlp.flags.parse import build_parser
from megatron_smlp.hf.modeling_smlp import SMLPPartialPrediction

TRAINED = (
    "--architecture smlp --num-dense-layers 1 --num-layers 3 --feature-router partial "
    "--num-feature-experts 2 --num-feature-chunks 4 --num-experts 4 --token-router hash "
    "--moe-ffn-hidden-size 40 --swiglu --untie-embeddings-and-output-weights --bf16 --lr 1e-2 "
    "--log-interval 1"
)
ALTERNATING = (
    f"--plugin {REPOSITORY}/plugins/alternating.py --architecture alternating --num-layers 4 "
    "--num-attention-heads 4 --group-query-attention --num-query-groups 2 --qk-layernorm --swiglu "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --lr 1e-2"
)
BASE = (
    "--architecture gmlp --token-router base --num-experts 4 --bf16 --lr 1e-2 --base-eval prices "
    "--base-gate price --untie-embeddings-and-output-weights"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that Megatron wrote after real steps, with padding and a tensor per expert."""
    folder: Path = tmp_path_factory.mktemp("trained")
    with pretrained(f"{TRAINED} --save {folder}"):
        return folder


# Every kind of tensor once; test_padding.py converts some of the other systems there and back too.
FAST = (
    *("gshard", "gmlp", "gmlp_heads", "amlp_rope", "smlp_deterministic", "smlp_partial", "mixer"),
    *("mixer_routed", "minhash_routed", "modern_moe", "grouped"),
)


def changed(system: str) -> dict[str, Any]:
    """Return changes that a conversion could get wrong: untied output, padding, no bias."""
    if "token_router" in SYSTEMS[system]:
        return {"unpadded_vocab_size": 101}
    changes = {"unpadded_vocab_size": 101, "num_experts": None, "moe_ffn_hidden_size": None}
    if system == "transformer":
        changes |= {"tie_word_embeddings": False, "unpadded_vocab_size": 97}
    return changes | ({"add_bias_linear": False} if system == "gmlp" else {})


@pytest.mark.parametrize("system", slow_unless_in(FAST, SYSTEMS))
@pytest.mark.usefixtures("in_one_process")
def test_to_megatron_and_back(tmp_path: Path, system: str):
    model = make_model(system, **changed(system))
    exported = save_exported(model, tmp_path / "hf")
    said = run(from_hf, exported, tmp_path / "run")
    assert "forward check" in said[0]
    said = run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "again")
    assert any("forward check" in line for line in said)
    assert_same(folder_weights(exported), folder_weights(tmp_path / "again"))
    ours, theirs = (
        (folder / "config.json").read_text() for folder in (exported, tmp_path / "again")
    )
    assert ours == theirs


def test_a_trained_checkpoint_comes_back_bitwise(trained: Path, tmp_path: Path):
    run(convert.torch_dist_to_hf, trained, tmp_path / "hf", shard_limit=20_000)
    run(from_hf, tmp_path / "hf", tmp_path / "again")
    before, after = TorchDistCheckpoint(trained), TorchDistCheckpoint(tmp_path / "again")
    assert_same(weights(before), weights(after))
    assert checkpoint_of(tmp_path / "again") == after.folder
    assert integrity.verify(after.folder) == []
    assert before.specs["embedding.word_embeddings.weight"].dtype == torch.bfloat16
    changed = {name for name, value in before.flags.items() if after.flags[name] != value}
    assert not changed


def test_attention_in_the_layers_of_a_plugin_keeps_what_it_has(tmp_path: Path):
    with pretrained(f"{ALTERNATING} --train-iters 1 --save {tmp_path / 'run'}"):
        pass
    said = run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    assert any("forward check: logits" in line for line in said)
    run(from_hf, tmp_path / "hf", tmp_path / "again")
    ours, theirs = (TorchDistCheckpoint(tmp_path / name) for name in ("run", "again"))
    assert_same(weights(ours), weights(theirs))
    for name in ("num_query_groups", "qk_layernorm", "swiglu", "normalization"):
        assert ours.flags[name] == theirs.flags[name] != build_parser().get_default(name)


def test_the_forward_check_reaches_what_partial_prediction_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model("smlp_partial", seq_length=160, prefix_fraction=0.6)
    exported = save_exported(model, tmp_path / "hf")
    of_prefix = SMLPPartialPrediction._of_prefix
    monkeypatch.setattr(SMLPPartialPrediction, "_of_prefix", lambda *given: -of_prefix(*given))
    with pytest.raises(CheckpointError, match="logits of 2 x 112 tokens differ by"):
        run(from_hf, exported, tmp_path / "run")


def test_prices_of_base_stay_in_fp32(tmp_path: Path):
    with pretrained(f"{BASE} --train-iters 2 --save {tmp_path / 'run'}"):
        pass
    said = run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    assert any("logits" in line for line in said)
    before = weights(TorchDistCheckpoint(tmp_path / "run"))
    prices, name = before["decoder.layers.0.mlp.router.prices"], "layers.0.channel.router.prices"
    assert prices.dtype == torch.float32
    assert prices.any()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert (model.config.base_eval, model.config.base_gate) == ("prices", "price")
    assert torch.equal(model.model.get_buffer(name), prices)
    run(from_hf, tmp_path / "hf", tmp_path / "back")
    assert_same(before, weights(TorchDistCheckpoint(tmp_path / "back")))
