"""The model with transformers' own tools: Trainer, autocast, offloading, new tokens, old names."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import REPOSITORY, run_command
from support.smlp_systems import SYSTEMS, VOCABULARY, make_config, make_ids, make_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_smlp.hf import SMLPConfig, SMLPModel
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM, SMLPHashRouter


def trainer(model: Any, ids: torch.Tensor, folder: Path, **options: Any) -> Trainer:
    """Return a Trainer with eight equal rows, so that a loss does not depend on which it draws."""
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids[:1].expand(8, -1)]
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_the_trainer_evaluates_and_predicts(tmp_path: Path):
    model = make_model("smlp_partial")
    ids = make_ids(1, 30)
    expected = model(ids, labels=ids).loss.item()
    its = trainer(model, ids, tmp_path)
    assert its.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert its.predict(its.eval_dataset).predictions.shape == (8, 30, VOCABULARY)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_trainers_loss_is_the_models(tmp_path: Path, accumulation: int):
    """Partial prediction has no loss on its prefix; a mean over all labels would be too small."""
    model = make_model("smlp_partial").train()
    model.config.hidden_dropout = 0.0
    ids = make_ids(1, 30).expand(2, -1)
    expected = model(ids, labels=ids).loss.item()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    done = trainer(model, ids, tmp_path, max_steps=1, learning_rate=0.0, **options).train()
    assert done.training_loss == pytest.approx(expected, rel=1e-5)


def check_smoothed_labels(model: Any, folder: Path) -> None:
    ids = make_ids(1, 12)
    its = trainer(model, ids, folder, label_smoothing_factor=0.1)
    logprobs = model(ids).logits[0, :-1].log_softmax(dim=-1)
    expected = 0.9 * nn.functional.nll_loss(logprobs, ids[0, 1:]) - 0.1 * logprobs.mean()
    assert its.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_smoothed_labels_are_the_next_tokens(tmp_path: Path):
    check_smoothed_labels(make_model("gmlp"), tmp_path)


def test_the_trainer_refuses_packed_rows(tmp_path: Path):
    """It drops columns that `forward` does not name, and would mix the documents."""
    its = trainer(make_model("gmlp"), make_ids(1, 12), tmp_path)
    for row in its.eval_dataset:
        row["position_ids"] = torch.arange(12) % 6
    with pytest.raises(ValueError, match="packed documents would mix"):
        its.evaluate()


@pytest.mark.parametrize("system", SYSTEMS)
def test_autocast_trains_and_routes_in_fp32(system: str):
    model = make_model(system).train()
    ids = make_ids(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert output.loss.isfinite()
    model.eval()
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(".router") and not isinstance(module, SMLPHashRouter):
            module.register_forward_hook(lambda _, __, routing: seen.append(routing.weights))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert bool(seen) == (model.config.token_router not in ("none", "hash"))
    assert all(weights.dtype == torch.float32 for weights in seen)


@torch.no_grad()
def test_the_old_name_of_a_cache():
    model, ids = make_model("smlp_deterministic"), make_ids(2, 12)
    whole = model(ids).logits
    first = model(ids[:, :11], use_cache=True)
    with pytest.warns(FutureWarning, match="past_key_values"):
        last = model(ids[:, 11:], past_key_values=first.cache).logits
    torch.testing.assert_close(last[:, 0], whole[:, 11], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_offloaded_weights(system: str):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_model(system), make_ids(2, 30)
    expected = model(ids).logits
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(offloaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [VOCABULARY - 10, VOCABULARY + 7])
@torch.no_grad()
def test_a_vocabulary_of_another_size(tmp_path: Path, size: int):
    model, ids = make_model("hash"), make_ids(2, 12).clamp(max=size - 8)
    model.config.unpadded_vocab_size = VOCABULARY - 3
    model.generation_config.suppress_tokens = [VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1]
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    common = min(size, VOCABULARY)
    torch.testing.assert_close(model(ids).logits[..., :common], before[..., :common])
    assert model(torch.tensor([[size - 1]])).logits.shape[-1] == size
    assert model.generation_config.suppress_tokens is None
    tables = {m.table for m in model.modules() if isinstance(m, SMLPHashRouter)}
    assert all(torch.equal(table, next(iter(tables))) for table in tables)
    model.save_pretrained(tmp_path)
    loaded = SMLPForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.unpadded_vocab_size is None
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_positions_and_masks_that_mean_something_else():
    model, ids = make_model("gmlp"), make_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    padded = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, padded)
    packed = torch.arange(12).remainder(6)[None]
    with pytest.raises(ValueError, match="packed documents would mix"):
        model(ids, position_ids=packed)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 12, 12\]"):
        model(ids, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\]"):
        model(ids, attention_mask=mask[:, :5])


@torch.no_grad()
def test_outputs_that_the_configuration_asks_for():
    model, ids = make_model("gmlp"), make_ids(1, 4)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == model.config.num_layers + 1
    for module in (model, model.model):
        assert isinstance(module(ids, return_dict=False), tuple)
    model.config.return_dict = False
    for module in (model, model.model):
        assert isinstance(module(ids), tuple)
        assert not isinstance(module(ids, return_dict=True), tuple)
    assert torch.equal(model.model(ids)[0], model(ids, return_dict=True).hidden_states[-1])
    assert model.generate(ids, max_new_tokens=2).shape == (1, 6)


class Rounded(nn.Module):
    """An int8 projection like those with which quantizers replace an nn.Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().char(), requires_grad=False)
        self.bias = layer.bias

    def values(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.values(), self.bias)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_projections_are_quantised(system: str):
    """Every module of exactly class nn.Linear is replaced; full passes and steps still agree."""
    model, ids = make_model(system), make_ids(1, 30)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in model.modules())
    rounded = {name: Rounded(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.copy_(rounded[name].values())
    expected = model(ids).logits
    for name, module in rounded.items():
        model.set_submodule(name, module)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    cache = model(ids[:, :29], use_cache=True).cache
    last = model(ids[:, 29:], cache=cache).logits
    torch.testing.assert_close(last, expected[:, 29:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_on_two_devices():
    """Runs in a process of its own: with the CPU platform active, "cuda" is the CPU."""
    pytest.importorskip("accelerate")
    run_command(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "tests" / "support" / "two_devices.py")],
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )


def test_a_vocabulary_of_strings_keeps_its_size():
    with pytest.raises(ValueError, match="fingerprints of its tokenizer's strings"):
        make_model("minhash").resize_token_embeddings(VOCABULARY + 3)


@pytest.mark.parametrize(
    ("new", "multiple", "size", "padding"),
    [
        (VOCABULARY - 5, None, VOCABULARY - 5, []),  # five of the ten padding rows got a token
        (VOCABULARY - 9, 8, 96, [92, 93, 94, 95]),
        (VOCABULARY, None, VOCABULARY, []),  # as many rows as there are: all of them are used
        (VOCABULARY - 9, 101, 101, list(range(92, 101))),  # as many rows, one of them a new token
        (VOCABULARY + 2, 8, 104, [103]),
        (None, 8, 104, list(range(91, 104))),
    ],
)
def test_tokens_that_take_the_place_of_padding(
    tmp_path: Path, new: int | None, multiple: int | None, size: int, padding: list[int]
):
    model = make_model("hash", unpadded_vocab_size=VOCABULARY - 10)
    model.resize_token_embeddings(new, multiple, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = SMLPForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == size
    assert (loaded.generation_config.suppress_tokens or []) == padding
    assert loaded.config.unpadded_vocab_size == (padding[0] if padding else None)


@pytest.mark.parametrize("unpadded", [VOCABULARY - 10, VOCABULARY, None])
def test_a_new_model_suppresses_padding(tmp_path: Path, unpadded: int | None):
    model = SMLPForCausalLM(make_config("gmlp", unpadded_vocab_size=unpadded))
    padding = list(range(unpadded or VOCABULARY, VOCABULARY))
    assert (model.generation_config.suppress_tokens or []) == padding
    drawn = model.generate(make_ids(4, 3) % 90, max_new_tokens=30, do_sample=True)
    assert drawn.max() < (unpadded or VOCABULARY)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written.get("suppress_tokens", []) == padding


def test_a_folders_code_is_not_run(tmp_path: Path):
    """With this package the Auto classes use ours, whatever code is in the folder."""
    model = make_model("gmlp")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise RuntimeError")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is SMLPForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is SMLPModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is SMLPConfig
