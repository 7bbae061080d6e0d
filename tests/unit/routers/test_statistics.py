"""Router statistics, on examples small enough to count by hand."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import checkpoint
from support.in_process import layer_config
from support.launches import REPOSITORY
from support.routers import SIX, make_router, probable
from torch import nn

from megatron_smlp import plugin_files
from megatron_smlp.routers.prefix import PrefixRouter
from megatron_smlp.routers.statistics import RouterKey, RouterLoad, RouterStatistics

pytestmark = pytest.mark.usefixtures("megatron")

LOSS_OF_SIX = 2 * (4 / 6 * 0.6 + 2 / 6 * 0.4)
"""E sum f P with f = (4/6, 2/6) and P = (3.6/6, 2.4/6)."""
GATE_OF_SIX = (0.7 + 0.9 + 0.6 + 0.8 + 0.8 + 0.6) / 6


def counted(router: nn.Module) -> RouterStatistics:
    statistics = RouterStatistics()
    statistics.attach([router])
    return statistics


def load_of(statistics: RouterStatistics, *, training: bool, kind: str = "token") -> RouterLoad:
    loads = statistics.take(training=training)
    assert list(loads) == [RouterKey(1, kind)]
    return loads[RouterKey(1, kind)]


class TestSwitch:
    def test_everything(self):
        """Capacity ceil(1 * 6 / 2) = 3, and four of six tokens want expert 0: one is dropped."""
        router = make_router("switch", num_experts=2, moe_train_capacity_factor=1.0)
        statistics = counted(router)
        router(probable(SIX))
        load = load_of(statistics, training=True)
        assert load.load_share == pytest.approx((4 / 6, 2 / 6))
        assert (load.load_share_min, load.load_share_max) == pytest.approx((2 / 6, 4 / 6))
        assert load.entropy == pytest.approx(0.918296, rel=1e-5)
        assert load.drop_rate == pytest.approx(1 / 6)
        assert load.mean_gate == pytest.approx(GATE_OF_SIX)
        assert load.aux_loss == pytest.approx(LOSS_OF_SIX)
        assert load.z_loss is None
        assert load.choices == 6

    def test_z_loss_is_without_its_coefficient(self):
        """Scores log p + 3: their log-sum-exp is 3."""
        router = make_router("switch", num_experts=2, moe_z_loss_coeff=0.001)
        statistics = counted(router)
        router(probable(SIX) + 3)
        assert load_of(statistics, training=True).z_loss == pytest.approx(9)

    def test_micro_batches_add_up_until_they_are_taken(self):
        """Six tokens, then two: shares over all eight, the loss a mean over the micro-batches."""
        router = make_router("switch", num_experts=2)
        statistics = counted(router)
        router(probable(SIX))
        router(probable([[0.2, 0.8], [0.4, 0.6]]))
        load = load_of(statistics, training=True)
        assert load.load_share == pytest.approx((4 / 8, 4 / 8))
        assert load.aux_loss == pytest.approx((LOSS_OF_SIX + 2 * 1 * 0.7) / 2)
        assert load.choices == 8
        assert statistics.take(training=True) == {}


class TestGShard:
    def test_a_second_choice_that_is_not_used_is_not_counted(self, monkeypatch):
        """Draws of 0.5: used where 2 g2 / (g1 + g2) > 0.5 (here g1 + g2 = 1): tokens 0, 2, 5."""
        router = make_router("gshard", num_experts=2, moe_train_capacity_factor=0.5)
        monkeypatch.setattr(router, "draw", lambda count, device: torch.full((count,), 0.5))
        statistics = counted(router)
        router(probable(SIX))
        load = load_of(statistics, training=True)
        assert load.choices == 9
        assert load.load_share == pytest.approx((5 / 9, 4 / 9))
        # Three slots an expert. Expert 0: tokens 0, 1, 2; 4 and then 5 are dropped. Expert 1:
        # 3 and 5, then 0 as a second choice; 2 is dropped.
        assert load.drop_rate == pytest.approx(3 / 9)
        assert load.aux_loss == pytest.approx(LOSS_OF_SIX)


class TestBaseAndHash:
    def test_base_is_even_in_training_and_what_it_is_in_evaluation(self):
        router = make_router("base", num_experts=2)
        statistics = counted(router)
        tokens = torch.tensor([[3.0, 0.0], [5.0, 0.0], [1.0, 0.0], [4.0, 3.5]])[:, None]
        router(tokens)
        router.eval()(tokens)
        trained, evaluated = (load_of(statistics, training=training) for training in (True, False))
        assert trained.load_share == (0.5, 0.5)
        assert trained.entropy == pytest.approx(1)
        assert evaluated.load_share == (1, 0)
        assert str(evaluated.entropy) == "0.0", "and not -0.0"
        gate = torch.tensor([3.0, 5.0, 1.0, 4.0]).sigmoid().mean().item()
        assert evaluated.mean_gate == pytest.approx(gate)
        assert trained.closed_rate == evaluated.closed_rate == 0
        assert trained.aux_loss is trained.z_loss is None
        assert trained.drop_rate == 0

    def test_balance_hides_an_expert_that_its_gate_closes(self):
        """The first two lose least with expert 1. Sigmoid(-6) is under 0.01, sigmoid(-4) is not."""
        router = make_router("base", num_experts=2)
        statistics = counted(router)
        router(torch.tensor([[1.0, -4.0], [2.0, -6.0], [3.0, -9.0], [9.0, -4.0]])[:, None])
        load = load_of(statistics, training=True)
        assert load.load_share == (0.5, 0.5)
        assert load.closed_rate == 0.25


class TestTopK:
    def test_everything(self):
        """Statistics are over all choices, and so is the balance loss: E sum_e f_e P_e."""
        three = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.35, 0.4]]
        changes = {"moe_router_topk": 2, "moe_router_pre_softmax": False}
        router = make_router("topk", num_experts=3, **changes, moe_aux_loss_coeff=0.01)
        statistics = counted(router)
        router(probable(three))
        load = load_of(statistics, training=True)
        assert load.choices == 6
        assert load.load_share == pytest.approx((1 / 6, 3 / 6, 2 / 6))
        assert load.mean_gate == pytest.approx((5 / 8 + 6 / 9 + 8 / 15) / 3)
        shares = torch.tensor([1 / 6, 3 / 6, 2 / 6])
        assert load.aux_loss == pytest.approx(3 * (shares * torch.tensor(three).mean(0)).sum())
        assert load.drop_rate == 0


class TestARuleThatSkips:
    @pytest.fixture
    def router(self, registry: Any) -> Any:
        """Return a plugin's rule, in evaluation: a token visits the experts with scores over 0."""
        plugin_files.load(str(REPOSITORY / "plugins" / "threshold.py"))
        return make_router("threshold", num_experts=2).eval()

    def test_the_gate_is_that_of_the_first_expert_visited(self, router: Any):
        """The first token visits only its second expert; the last visits none."""
        statistics = counted(router)
        router(torch.tensor([[-1.0, 2.0], [1.0, 3.0], [-1.0, -2.0]])[:, None])
        load = load_of(statistics, training=False)
        assert load.load_share == pytest.approx((1 / 3, 2 / 3))
        gates = torch.tensor([2.0, 1.0]).sigmoid().sum().item()
        assert load.mean_gate == pytest.approx(gates / 3)

    def test_no_expert_that_is_visited_is_no_report(self, router: Any):
        statistics = counted(router)
        router(-torch.ones(3, 1, 2))
        assert statistics.take(training=False) == {}


def prefix_router(**changes: Any) -> PrefixRouter:
    """Return P = 1, two experts, W_r = (1, 0): the mean of a chunk is the log odds of expert 0."""
    router = PrefixRouter(
        layer_config(**changes),
        layer_number=1,
        prefix_length=1,
        num_experts=2,
        loss_coeff=0.01,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    router.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    return router


CHUNKS = torch.tensor([[0.7, 0.6], [0.2, 0.9]])
"""Probabilities of expert 0, for the chunks of two samples."""


def chunk_means(length: int = 3) -> torch.Tensor:
    return (CHUNKS / (1 - CHUNKS)).log().expand(length, 2, 2)


class TestFeatureRouter:
    def test_everything(self):
        router = prefix_router()
        statistics = counted(router)
        router(chunk_means())
        load = load_of(statistics, training=True, kind="feature")
        assert load.load_share == pytest.approx((3 / 4, 1 / 4))
        assert load.aux_loss == pytest.approx(2 * (3 / 4 * 0.6 + 1 / 4 * 0.4))
        assert load.mean_gate == pytest.approx(2 * (0.7 + 0.6 + 0.8 + 0.9) / 4)
        assert load.drop_rate == 0
        assert load.choices == 4


class TestFeatureRouterInTraining:
    @pytest.mark.parametrize("per_token", [False, True])
    def test_gradient_of_the_balance_loss(self, per_token: bool):
        """There is only the attached loss; Megatron divides by the tokens if it counts them."""
        router, means = prefix_router(calculate_per_token_loss=per_token), chunk_means()
        (router(means).scale * 0).sum().backward()
        weight = torch.tensor([[1.0, 0.0]], requires_grad=True)
        probabilities = (means[0, ..., None] * weight[0]).softmax(dim=-1)
        share = torch.tensor([3 / 4, 1 / 4])
        loss = 0.01 * 2 * (share * probabilities.mean(dim=(0, 1))).sum()
        (loss * means.shape[0] * means.shape[1] if per_token else loss).backward()
        torch.testing.assert_close(router.weight.grad, weight.grad)
        assert weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["token", "feature"])
def test_a_pass_that_is_repeated_for_its_gradient_is_counted_once(kind: str):
    router = prefix_router() if kind == "feature" else make_router("switch", num_experts=2)
    statistics = counted(router)
    means = chunk_means() if kind == "feature" else probable(SIX)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        weights = router(hidden).scale if kind == "feature" else router(hidden)[0]
        return hidden.sum() * weights.sum()

    checkpoint(layer, False, means.clone().requires_grad_()).backward()
    choices = {"token": 6, "feature": 4}[kind]
    assert load_of(statistics, training=True, kind=kind).choices == choices
