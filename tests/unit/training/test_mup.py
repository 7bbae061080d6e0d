"""--use-mup is Megatron's muP, for dense Transformers: what it scales at D = 32 of a base of 8."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import run
from support.in_process import MINIMAL, prepare_megatron, pretrained
from support.runs import forget_run
from torch import Tensor

from megatron_smlp.conversion import convert
from megatron_smlp.errors import UsageError
from megatron_smlp.training.events import Listener

TRANSFORMER = "--architecture transformer --num-attention-heads 4"
SCALED = f"{TRANSFORMER} --use-mup --mup-base-hidden-size 8 --mup-base-head-dim 4"
TIMES = 4  # 32 / 8
RATE, EPSILON = 1e-3, 1e-8


class Start(Listener):
    """What a run begins with."""

    def built(self, parts: Any) -> None:
        model = parts.model[0].module
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.groups = {
            names[id(parameter)]: (group["max_lr"], group["eps"])
            for group in parts.optimizer.param_groups
            for parameter in group["params"]
        }
        self.scale = model.decoder.layers[0].self_attention.core_attention.softmax_scale
        tokens = torch.arange(16)[None]
        raw: list[Tensor] = []
        hook = model.output_layer.register_forward_hook(lambda *call: raw.append(call[-1][0]))
        self.logits, self.raw = model(tokens, tokens, None), raw[0].transpose(0, 1)
        hook.remove()


def start(words: str) -> Start:
    from pretrain_smlp import patched_arguments, train

    seen = Start()
    prepare_megatron()
    try:
        train(patched_arguments([*MINIMAL.split(), *words.split()]), listeners=[seen])
        return seen
    finally:
        forget_run()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def scaled() -> Start:
    return start(SCALED)


@pytest.fixture(scope="module")
def plain() -> Start:
    return start(TRANSFORMER)


def is_hidden(name: str) -> bool:
    return name.endswith("weight") and ".linear_" in name


def test_hidden_matrices_begin_smaller(scaled: Start, plain: Start):
    assert any(map(is_hidden, plain.weights))
    for name, weight in plain.weights.items():
        smaller = math.sqrt(TIMES) if is_hidden(name) else 1
        torch.testing.assert_close(scaled.weights[name] * smaller, weight, msg=name)


def test_hidden_matrices_have_a_lower_rate(scaled: Start, plain: Start):
    assert set(plain.groups.values()) == {(RATE, EPSILON)}
    assert scaled.groups.keys() == plain.groups.keys()
    for name, group in scaled.groups.items():
        times = TIMES if is_hidden(name) else 1
        assert group == pytest.approx((RATE / times, EPSILON / times)), name


def test_scores_are_those_of_the_base_at_its_heads_width(scaled: Start, plain: Start):
    assert (plain.scale, scaled.scale) == pytest.approx((8**-0.5, 4**0.5 / 8))


def test_logits_are_smaller(scaled: Start, plain: Start):
    torch.testing.assert_close(plain.logits, plain.raw)
    torch.testing.assert_close(scaled.logits * TIMES, scaled.raw)


@pytest.mark.parametrize(
    "words",
    [
        "--architecture amlp --use-mup --mup-base-hidden-size 8",
        f"{SCALED} --token-router switch --num-experts 2",
        f"{SCALED} --optimizer sgd",
        f"{SCALED} --decoupled-lr 1e-3",
        f"{SCALED} --input-projection minhash",
        f"{TRANSFORMER} --use-mup",
    ],
)
def test_it_is_for_dense_transformers_and_adam(parse: Callable[..., Any], words: str):
    with pytest.raises(UsageError, match="--use-mup"):
        parse(words)


def test_an_export_is_refused(tmp_path: Path):
    """transformers' model has no such factors."""
    with pretrained(f"{SCALED} --train-iters 1 --save {tmp_path / 'run'}"):
        pass
    with pytest.raises(UsageError, match="--use-mup True has no equal"):
        run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)
