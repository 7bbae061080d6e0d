"""BASE through a conversion: what it reads, and its prices, in the precision that they are kept."""

import json
from pathlib import Path

import pytest
import torch
from support.conversions import assert_same, folder_weights, from_hf, run, save_exported, weights
from support.in_process import pretrained
from support.smlp_systems import make_ids, make_model
from transformers import AutoModelForCausalLM

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.huggingface import read_config
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

TRAINED = (
    "--architecture gmlp --token-router base --num-experts 4 --bf16 --lr 1e-2 --base-eval prices "
    "--untie-embeddings-and-output-weights"
)
PRICES = "model.layers.0.channel.router.prices"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run and its export; the conversion compares the logits itself."""
    folder = tmp_path_factory.mktemp("base")
    with pretrained(f"{TRAINED} --save {folder}/run"):
        pass
    said = run(convert.torch_dist_to_hf, folder / "run", folder / "hf")
    assert any("logits" in line for line in said)
    return folder


def test_prices_are_exported_as_they_are_and_evaluated_by(exported: Path):
    saved = weights(TorchDistCheckpoint(exported / "run", iteration=None))
    prices = saved["decoder.layers.0.mlp.router.prices"]
    assert prices.dtype == torch.float32
    assert prices.any()
    assert torch.equal(folder_weights(exported / "hf")[PRICES], prices)
    model = AutoModelForCausalLM.from_pretrained(exported / "hf", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert (model.config.base_eval, model.config.base_routing_input) == ("prices", "residual")
    assert torch.equal(model.get_buffer(PRICES), prices)


def test_they_come_back(exported: Path, tmp_path: Path):
    run(from_hf, exported / "hf", tmp_path / "back")
    before, after = (
        weights(TorchDistCheckpoint(folder, iteration=None))
        for folder in (exported / "run", tmp_path / "back")
    )
    model_only = {name: value for name, value in before.items() if name in after}
    assert_same(model_only, after)
    assert "decoder.layers.0.mlp.router.prices" in after


def test_an_older_folder_reads_the_norm_and_has_no_prices(tmp_path: Path):
    model = make_model("base", base_routing_input="norm", base_prices="none")
    folder = save_exported(model, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    for name in ("base_routing_input", "base_prices", "base_eval", "gshard_second_expert"):
        del values[name]
    (folder / "config.json").write_text(json.dumps(values))
    assert read_config(folder).base_routing_input == "norm"
    for router, second in (("gshard", "raw"), ("switch", "paper")):
        config = SMLPConfig.from_dict(values | {"token_router": router})
        assert (config.gshard_second_expert, config.base_routing_input) == (second, "residual")
    ids = make_ids(2, 9)
    again = SMLPForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    run(from_hf, folder, tmp_path / "run")
    flags = TorchDistCheckpoint(tmp_path / "run", iteration=None).flags
    assert (flags["base_routing_input"], flags["base_prices"]) == ("norm", "none")
    other = make_model("base", base_prices="none")
    other.load_state_dict(model.state_dict())
    assert (other(ids).logits - model(ids).logits).abs().max() > 1e-3
