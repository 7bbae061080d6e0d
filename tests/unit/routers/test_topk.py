"""Megatron's own top-k router in the table: its choices by hand, and its flags."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.routers import make_router, probable
from torch import nn

from megatron_smlp.errors import UsageError
from megatron_smlp.routers.statistics import RouterStatistics

THREE = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.35, 0.4]]
"""Probabilities of three tokens; their two best experts are 0 and 1, 1 and 2, 2 and 1."""
TOP_2 = {"moe_router_topk": 2, "moe_router_pre_softmax": False}
WORDS = "--architecture transformer --num-attention-heads 4 --token-router topk --num-experts 4"
BIASED = f"{WORDS} --moe-router-score-function sigmoid --moe-router-enable-expert-bias"


@pytest.mark.usefixtures("megatron")
class TestByHand:
    def test_what_is_counted(self):
        """All choices, and the balance loss over them: E sum_e f_e P_e."""
        router = make_router("topk", num_experts=3, **TOP_2, moe_aux_loss_coeff=0.01)
        statistics = RouterStatistics()
        statistics.attach([nn.Sequential(router)])
        router(probable(THREE))
        (load,) = statistics.take(training=True).values()
        assert load.choices == 6
        assert load.load_share == pytest.approx((1 / 6, 3 / 6, 2 / 6))
        assert load.mean_gate == pytest.approx((5 / 8 + 6 / 9 + 8 / 15) / 3)
        means = torch.tensor(THREE).mean(dim=0)
        expected = 3 * (torch.tensor([1 / 6, 3 / 6, 2 / 6]) * means).sum().item()
        assert load.aux_loss == pytest.approx(expected)
        assert load.drop_rate == 0


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ("--moe-router-topk 5", "--num-experts 4 is too few"),
        ("--moe-router-topk 0", "--moe-router-topk 0: give how many"),
        (
            "--moe-router-load-balancing-type sinkhorn",
            "sinkhorn does not work here: give aux_loss or",
        ),
        ("--moe-router-score-function sqrtsoftplus", "give softmax or sigmoid"),
        ("--moe-router-enable-expert-bias", "needs --moe-router-score-function sigmoid"),
        ("--moe-router-bias-update-rate 0.1", "needs --moe-router-enable-expert-bias"),
        ("--moe-router-topk-scaling-factor 0", "scaling-factor 0: must be over 0"),
        ("--moe-train-capacity-factor 1", "is for --token-router switch or gshard, not topk"),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_what_is_refused(parse: Callable[..., Any], flags: str, refusal: str):
    with pytest.raises(UsageError, match=refusal):
        parse(f"{WORDS} {flags}")


@pytest.mark.usefixtures("megatron")
def test_a_loss_beside_a_bias_is_asked_for(parse: Callable[..., Any]):
    with pytest.raises(UsageError, match=r"--moe-aux-loss-coeff .* needs"):
        parse(f"{BIASED} --moe-aux-loss-coeff 0.1")
    assert parse(BIASED).moe_aux_loss_coeff == 0
    args = parse(f"{BIASED} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1")
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("aux_loss", 0.1)


@pytest.mark.usefixtures("megatron")
def test_other_routers_have_no_shared_expert(parse: Callable[..., Any]):
    words = WORDS.replace("topk", "switch")
    with pytest.raises(UsageError, match="is for --token-router topk, not switch"):
        parse(f"{words} --moe-shared-expert-intermediate-size 8")
