"""Conventions of transformers: configuration, saving, initial values, checkpointing, losses."""

import json
import weakref

import pytest
import torch
from support.smlp_systems import SYSTEMS, make_config, make_ids, make_model
from torch.nn import functional

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_saved_model_is_the_same_model(system: str, tmp_path):
    model = make_model(system)
    model.save_pretrained(tmp_path)
    loaded = SMLPForCausalLM.from_pretrained(tmp_path).eval()
    ids = make_ids(2, 19)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # Not bitwise: a tensor in a mapped file is aligned to 8 bytes, and BLAS rounds accordingly.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    for name in ("architecture", "token_router", "feature_router", "moe_layer_freq", "num_experts"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    shared = getattr(loaded.model.embed_tokens, "weight", None)
    assert (loaded.lm_head.weight is shared) == loaded.config.tie_word_embeddings
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "smlp"


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradient_checkpointing_changes_no_gradient(system: str):
    model = make_model(system).train()
    ids = make_ids(2, 21)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(7)  # GShard draws
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_loss_is_the_shifted_cross_entropy_and_training_adds_the_routers():
    model = make_model("switch")
    ids = make_ids(2, 15)
    output = model(ids, labels=ids)
    expected = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.aux_loss is None
    trained = model.train()(ids, labels=ids)
    logits = trained.logits[:, :-1].flatten(0, 1)
    entropy = functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert trained.aux_loss > 0
    torch.testing.assert_close(trained.loss, entropy + trained.aux_loss)


@pytest.mark.parametrize(("partial_loss", "first"), [("suffix", 9), ("all", 1)])
def test_partial_prediction_trains_on_targets_behind_the_prefix(partial_loss: str, first: int):
    """P = 8: the first target that counts is token 9, predicted at position 8."""
    model = make_model("smlp_partial", partial_loss=partial_loss).train()
    ids = make_ids(2, 20)
    output = model(ids, labels=ids)
    logits = output.logits[:, first - 1 : -1].flatten(0, 1)
    expected = functional.cross_entropy(logits, ids[:, first:].flatten()) + output.aux_loss
    torch.testing.assert_close(output.loss, expected)
    whole = model.eval()(ids, labels=ids)
    logits = whole.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(whole.loss, functional.cross_entropy(logits, ids[:, 1:].flatten()))


def test_samples_within_the_prefix_train_on_what_they_have():
    """P = 8: each sample of a batch is treated separately; the others' labels begin at token 9."""
    model = make_model("smlp_partial").train()
    ids = make_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2] = -100
    labels[2, 3:6] = ids[2, 3:6]  # an answer within the prefix
    output = model(ids, attention_mask=mask, labels=labels)
    targets = labels.clone()
    targets[0, :9] = -100
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, targets[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected + output.aux_loss)
    assert model(ids[:, :8], labels=ids[:, :8]).loss.isfinite()


@pytest.mark.parametrize("asked", [False, True])
@torch.no_grad()
def test_states_of_layers_are_kept_for_those_who_ask(asked: bool):
    model = make_model("gmlp", num_layers=6)
    made, alive = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: made.append(weakref.ref(output[0])))
    model.model.final_norm.register_forward_hook(
        lambda *_: alive.extend(state for state in made if state() is not None)
    )
    model(make_ids(2, 12), output_hidden_states=asked)
    assert len(alive) == (6 if asked else 1)


def test_tuples_hidden_states_and_logits_to_keep():
    model = make_model("gmlp")
    ids = make_ids(2, 12)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    columns, rows = torch.tensor([[1, 5, 7], [2, 3, 11]]), torch.arange(2)[:, None]
    for kept, expected in (
        (2, output.logits[:, -2:]),
        (columns[0], output.logits[:, columns[0]]),
        (columns, output.logits[rows, columns]),
        (ids % 2 == 0, output.logits[ids % 2 == 0]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, output.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


PARTIAL = {"architecture": "smlp", "feature_router": "partial"}
CHUNKED = {"architecture": "smlp", "feature_router": "deterministic", "num_feature_experts": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gmpl"}, "architecture=gmpl: must be one of transformer, gmlp"),
        ({"token_router": "top2"}, "token_router=top2: must be one of none, switch"),
        ({"feature_router": "partial"}, "feature_router=partial is for architecture=smlp"),
        ({"architecture": "transformer", "toeplitz": True}, "toeplitz=True is for architecture="),
        ({"spatial_heads": 0}, "spatial_heads=0: must divide the gate width"),
        ({"spatial_heads": 5}, "spatial_heads=5: must divide the gate width"),
        ({"architecture": "transformer", "num_attention_heads": 5}, "must divide hidden_size = 32"),
        ({"token_router": "switch", "num_experts": None}, "num_experts=None"),
        ({"token_router": "gshard", "num_experts": 1}, "num_experts=1: must be 2 or more"),
        ({"architecture": "smlp", "num_dense_layers": 4}, "between 0 and num_layers=3"),
        (PARTIAL | {"prefix_fraction": 1.5}, "prefix_fraction=1.5: must lie between 0 and 1"),
        (CHUNKED | {"num_feature_chunks": 6}, "=6: must equal num_feature_experts=4"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_config("gmlp", **changes)


def test_other_names_of_sizes():
    config = SMLPConfig(num_hidden_layers=5, seq_length=77)
    assert (config.num_layers, config.max_position_embeddings) == (5, 77)


def test_the_prefix_is_the_floor_of_the_written_fraction():
    """In binary, 0.29 x 100 is less than 29."""
    config = make_config("smlp_partial", prefix_fraction=0.29, max_position_embeddings=100)
    assert config.prefix_length == 29
