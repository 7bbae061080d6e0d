"""--use-mup is Megatron's muP, for dense Transformers: its rates at D = 32 with a base of 8."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import run
from support.in_process import MINIMAL, prepare_megatron
from support.runs import forget_run

from megatron_smlp.conversion import convert
from megatron_smlp.errors import UsageError
from megatron_smlp.training.events import Listener

TRANSFORMER = "--architecture transformer --num-attention-heads 4"
SCALED = f"{TRANSFORMER} --use-mup --mup-base-hidden-size 8 --mup-base-head-dim 4"
TIMES = 4  # 32 / 8
RATE, EPSILON = 1e-3, 1e-8


class Start(Listener):
    """Records each parameter's maximum learning rate and epsilon when the run is built."""

    def built(self, parts: Any) -> None:
        model = parts.model[0].module
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.groups = {
            names[id(parameter)]: (group["max_lr"], group["eps"])
            for group in parts.optimizer.param_groups
            for parameter in group["params"]
        }


def is_hidden(name: str) -> bool:
    return name.endswith("weight") and ".linear_" in name


def test_hidden_matrices_have_a_lower_rate_and_an_export_is_refused(tmp_path: Path):
    """The model in transformers has no such factors."""
    from pretrain_smlp import patched_arguments, train

    seen = Start()
    flags = f"{MINIMAL} {SCALED} --train-iters 1 --save {tmp_path / 'run'}"
    prepare_megatron()
    try:
        train(patched_arguments(flags.split()), listeners=[seen])
    finally:
        forget_run()
        torch.distributed.destroy_process_group()
    assert {is_hidden(name) for name in seen.groups} == {True, False}
    for name, group in seen.groups.items():
        times = TIMES if is_hidden(name) else 1
        assert group == pytest.approx((RATE / times, EPSILON / times)), name
    with pytest.raises(UsageError, match="--use-mup True is not supported"):
        run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)


@pytest.mark.parametrize(
    "flags",
    [
        "--architecture amlp --use-mup --mup-base-hidden-size 8",
        f"{SCALED} --token-router switch --num-experts 2",
        f"{SCALED} --optimizer muon",
        f"{SCALED} --decoupled-lr 1e-3",
        f"{SCALED} --input-projection minhash",
        f"{TRANSFORMER} --use-mup",
    ],
)
def test_it_is_for_dense_transformers_and_adam(parse: Callable[..., Any], flags: str):
    with pytest.raises(UsageError, match="--use-mup"):
        parse(flags)
