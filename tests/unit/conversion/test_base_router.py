"""BASE through a conversion: what it reads, and its prices, in the precision that they are kept."""

from pathlib import Path

import pytest
import torch
from support.conversions import assert_same, folder_weights, from_hf, run, weights
from support.in_process import pretrained
from transformers import AutoModelForCausalLM

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert

TRAINED = (
    "--architecture gmlp --token-router base --num-experts 4 --bf16 --lr 1e-2 --base-eval prices "
    "--base-gate price --untie-embeddings-and-output-weights"
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
    config = model.config
    assert (config.base_eval, config.base_gate) == ("prices", "price")
    assert config.base_routing_input == "residual"
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
