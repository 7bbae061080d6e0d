"""Consumed FLOPs count the choices that were sent, in both conventions, also after a resume."""

from pathlib import Path

import pytest
from support.in_process import pretrained
from support.launches import records

from megatron_smlp.accounting.costs import ModelShape, choice_flops, choices_per_token, model_cost
from megatron_smlp.options import ModelOptions
from megatron_smlp.routers.statistics import RouterKey, RouterLoad
from megatron_smlp.systems import LayerSlots
from megatron_smlp.training.spent_flops import Compute

TOKENS = 64  # in a step: 4 samples of 16
GSHARD = """
    --architecture transformer --num-attention-heads 4 --token-router gshard --num-experts 4
    --moe-layer-freq 2 --moe-train-capacity-factor 0.5 --global-batch-size 4 --log-interval 2
"""


def load(choices: float, drop_rate: float = 0.0) -> RouterLoad:
    return RouterLoad((0.5, 0.5), drop_rate, 0.5, None, None, None, choices)


@pytest.fixture
def shape() -> ModelShape:
    """Return a shape with two token MoEs, each with two choices a token."""
    slots = [LayerSlots("attention", channel, 2) for channel in ("token_moe", "token_moe", "mlp")]
    return ModelShape(
        slots=tuple(slots),
        hidden_size=8,
        ffn_hidden_size=16,
        seq_length=10,
        padded_vocab_size=32,
        attention_width=8,
        key_value_width=8,
        num_experts=4,
        options=ModelOptions(token_router="gshard"),
        moe_ffn_hidden_size=12,
        moe_router_topk=2,
    )


def test_only_what_was_sent_counts(shape: ModelShape):
    compute, cost = Compute(shape), model_cost(shape)
    whole, choice = 3 * cost.flops / shape.seq_length, 3 * choice_flops(shape)
    assert choices_per_token(shape) == 4
    keys = [RouterKey(layer, "token") for layer in (1, 2)]
    feature = {RouterKey(1, "feature"): load(999)}
    first = compute.add(
        dict(zip(keys, [load(20), load(15, 0.2)], strict=True)) | feature, tokens=10
    )
    assert first == pytest.approx(whole - 0.8 * choice)
    second = compute.add(dict(zip(keys, [load(40), load(40)], strict=True)), tokens=30)
    assert second == pytest.approx(whole)
    spent = compute.spent(30)
    assert spent["consumed_flops"] == pytest.approx(30 * whole - 8 * choice)
    above = 3 * (cost.square_flops - cost.flops) / shape.seq_length
    assert spent["consumed_square_flops"] == pytest.approx(30 * (whole + above) - 8 * choice)
    third = compute.add({}, tokens=40)  # the routers sent nothing
    assert third == pytest.approx(whole - 4 * choice)
    resumed = Compute(shape)
    resumed.resume(compute.unsent, tokens=40)
    assert resumed.spent(40) == pytest.approx(compute.spent(40))


def test_a_run_counts_its_own_choices(tmp_path: Path):
    """GShard draws few second experts, and the capacity limit drops others."""
    with pretrained(f"{GSHARD} --log-dir {tmp_path}"):
        lines = [line for line in records(tmp_path) if "loss" in line]
    choice = 3 * 2 * (2 * 32 * 64)  # of matrices of 32 x 64
    unsent = [
        sum(2 * 2 * TOKENS - r["choices"] * (1 - r["drop_rate"]) for r in line["routers"])
        for line in lines
    ]
    assert min(unsent) > TOKENS / 4
    steps = [lines[0]["consumed_flops"], lines[1]["consumed_flops"] - lines[0]["consumed_flops"]]
    whole = [spent + count * choice for spent, count in zip(steps, unsent, strict=True)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-5)
    for line in lines:
        flops = line["tokens_per_second"] * steps[lines.index(line)] / (2 * TOKENS) / 1e12
        assert line["tflops_per_device"] == pytest.approx(flops, rel=1e-5)


def test_data_that_is_skipped_is_not_spent(tmp_path: Path):
    flags = GSHARD.replace("--log-interval 2", "--log-interval 1")
    with pretrained(f"{flags} --iterations-to-skip 2 3 --log-dir {tmp_path}"):
        lines = [line for line in records(tmp_path) if "loss" in line]
    assert [line["consumed_tokens"] for line in lines] == [TOKENS, 2 * TOKENS]
    assert [line["consumed_samples"] for line in lines] == [4, 16]
    step = lines[1]["consumed_flops"] - lines[0]["consumed_flops"]
    speed = lines[1]["tokens_per_second"] * step / TOKENS / 1e12
    assert lines[1]["tflops_per_device"] == pytest.approx(speed, rel=1e-5)


def test_a_run_goes_on_counting_in_another_folder(tmp_path: Path):
    """The checkpoint holds the number of choices that the routers have not sent so far."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    with pretrained(f"{GSHARD} --save {whole} --save-interval 2"):
        pass
    with pretrained(f"{GSHARD} --load {whole} --ckpt-step 2 --save {other}"):
        pass
    spent = [
        [line["consumed_flops"] for line in records(run) if "loss" in line]
        for run in (whole, other)
    ]
    assert spent[1] == pytest.approx(spent[0][1:])
