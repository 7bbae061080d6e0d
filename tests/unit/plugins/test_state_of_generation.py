"""A plugin's state in generation: new tokens alone give the same text as without a cache."""

from typing import Any

import pytest
import torch
from support.launches import REPOSITORY
from support.smlp_systems import VOCABULARY, make_ids
from torch import Tensor

from megatron_smlp import plugin_files
from megatron_smlp.hf.configuration_smlp import SMLPConfig

LAYERS = 3


@pytest.fixture
def model(registry: Any) -> Any:
    from megatron_smlp.hf.modeling_plugin import SMLPPluginForCausalLM

    plugin_files.load(str(REPOSITORY / "plugins" / "gated_conv.py"))
    layers = [["gated_conv", "mlp"]] * LAYERS
    plugin = {"files": {}, "options": {"taps": 4}, "layers": layers}
    config = SMLPConfig(
        architecture="gated_conv", plugin=plugin, num_layers=LAYERS, hidden_size=16,
        ffn_hidden_size=32, vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    built = SMLPPluginForCausalLM(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
    return built.eval()


@pytest.fixture
def lengths_seen(registry: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects T' of each call of the first layer's mixer."""
    seen: list[int] = []
    mixer = model.model.layers[0].mixer.mixer
    mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    return seen


def test_a_step_reads_the_new_token_alone(model: Any, lengths_seen: list[int]):
    ids = make_ids(2, 9)
    without = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    lengths_seen.clear()
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), without)
    assert lengths_seen == [9] + [1] * 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_several_lengths(model: Any, side: str):
    ids, lengths = make_ids(3, 9), (9, 2, 5)
    mask = torch.stack([(torch.arange(9) < n) for n in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **given)[:, 9:]
    for row, alone in enumerate(mask.bool()):
        expected = model.generate(ids[row : row + 1, alone], use_cache=False, **given)
        assert torch.equal(together[row], expected[0, -8:])


@torch.no_grad()
def test_more_tokens_of_some_samples(model: Any):
    """A sample that has no token in a chunk keeps its state."""
    ids = make_ids(2, 10)
    whole = model(ids).logits
    out = model(ids[:, :4], use_cache=True)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    out = model(ids[:, 4:7], attention_mask=mask, cache=out.cache)
    last = torch.stack([ids[0, 7], ids[1, 4]])[:, None]
    logits = model(last, attention_mask=torch.cat([mask, mask[:, :1]], 1), cache=out.cache).logits
    expected = torch.stack([whole[0, 7], whole[1, 4]])
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_row_of_padding_alone(model: Any):
    ids, mask = make_ids(2, 6), torch.tensor([[0] * 5, [1] * 5])
    out = model(ids[:, :5], attention_mask=mask, use_cache=True)
    mask = torch.cat([mask, torch.ones(2, 1)], dim=1).long()
    logits = model(ids[:, 5:], attention_mask=mask, cache=out.cache).logits
    for row, alone in enumerate((ids[:1, 5:], ids[1:])):
        expected = model(alone).logits[0, -1:]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


def test_beams_take_their_states_along(model: Any):
    ids = make_ids(2, 6)
    given: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))


def test_gradients_come_without_a_state(model: Any):
    model.train()
    ids: Tensor = make_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mixer.mixer.kernel.weight.grad.abs().sum() > 0
