"""Token routers on examples small enough to compute by hand: choices, weights, drops, losses."""

import math

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from support.in_process import layer_config
from support.routers import SIX, make_router, probable
from torch import Tensor

from megatron_smlp.routers.draws import sample_keys
from megatron_smlp.routers.gshard import attach_samples
from megatron_smlp.systems import token_router_class

pytestmark = pytest.mark.usefixtures("megatron")


def experts_of(routing_map: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in routing_map]


class TestScores:
    """Properties of all rules with scores."""

    def test_scores_are_fp32_whatever_the_models_precision(self):
        router = make_router("switch", num_experts=64, params_dtype=torch.bfloat16)
        router.weight.data.normal_()
        hidden = torch.randn(7, 2, 64, dtype=torch.bfloat16)
        scores = router.gating(hidden)
        assert (router.weight.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
        exact = hidden.double() @ router.weight.double().T
        torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


class TestGShard:
    @pytest.mark.parametrize("second", [0.05, 0.2, 0.45])
    @pytest.mark.parametrize("rule", ["paper", "all", "raw"])
    def test_how_often_the_second_expert_is_used(self, rule: str, second: float):
        """paper: 2 g2 / (g1 + g2), at most 1; raw: 2 g2."""
        router = make_router("gshard", num_experts=3, gshard_second_expert=rule)
        count, third = 20_000, min(0.1, second / 2)
        row = [1 - second - third, second, third]
        probs, routing_map = router(probable([row]).expand(count, 1, 3))
        assert routing_map[:, 0].all()
        used = routing_map[:, 1].float().mean().item()
        expected = {"paper": min(1, 2 * second / (1 - third)), "all": 1, "raw": 2 * second}[rule]
        assert used == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))
        torch.testing.assert_close(probs[:, 0], torch.full((count,), row[0] / (row[0] + second)))

    def test_a_draw_belongs_to_a_token_of_a_layer(self):
        """Layers draw different numbers; a recomputed pass draws the same, also out of order."""
        router, even = make_router("gshard", num_experts=2), torch.full((40, 2, 2), 0.0)
        even[..., 1] = -2.0  # g2 / (g1 + g2) = 0.12
        seen: list[list[list[int]]] = []

        def noted(hidden: Tensor) -> Tensor:
            probs, routing_map = router(hidden)
            seen.append(experts_of(routing_map))
            return hidden * probs.sum(1).view(40, 2, 1)

        outputs = []
        for first in (0, 2):
            attach_samples(router, sample_keys(seed=1, first=first, count=2, device=even.device))
            outputs.append(checkpoint(noted, False, even.clone().requires_grad_()))
        for output in outputs:
            output.sum().backward()
        assert seen[:2] == seen[2:]
        assert seen[0] != seen[1]
        router.set_layer_number(2)
        assert experts_of(router(even)[1]) != seen[1]

    @pytest.mark.parametrize(
        ("factor", "num_tokens", "slots"), [(0.5, 5, 2), (1.0, 7, 6), (1.1, 6, 5), (0.1, 3, 1)]
    )
    def test_slots(self, factor: float, num_tokens: int, slots: int):
        """ceil(2 c ceil(N / 3)): an uneven share is rounded up before the multiplication."""
        assert make_router("gshard", num_experts=3).capacity(factor, num_tokens) == slots

    def test_first_choices_take_slots_before_second_ones(self):
        """Capacity ceil(2 * 0.5 * ceil(6 / 2)) = 3, while all six tokens request both experts."""
        router = make_router("gshard", num_experts=2, moe_eval_capacity_factor=0.5).eval()
        probs, routing_map = router(probable(SIX))
        # Expert 0: first choices 0, 1, 2 fill it. Expert 1: 3 and 5 first, then 0 as a second one.
        assert experts_of(routing_map) == [[0, 1], [0], [0], [1], [], [1]]
        torch.testing.assert_close(probs[0], torch.tensor([0.7, 0.3]))
        torch.testing.assert_close(probs[1], torch.tensor([0.9, 0.0]))


class TestBase:
    def test_scores_that_are_not_finite_do_not_stop_the_step(self):
        router = make_router("base", num_experts=2)
        _, routing_map = router(torch.full((4, 1, 2), torch.nan))
        assert routing_map.sum(0).tolist() == [2, 2]

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_starts_orthogonal(self, precision: torch.dtype):
        config = layer_config(
            hidden_size=32, num_moe_experts=8, add_bias_linear=False, params_dtype=precision
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        weight = token_router_class("base")(config=config, pg_collection=groups).weight
        assert weight.dtype == precision
        gram = weight.float() @ weight.float().T
        torch.testing.assert_close(gram, 0.01 * torch.eye(8), rtol=0, atol=2e-4)


class TestHash:
    def test_no_parameters_and_a_table_that_is_saved(self):
        router = make_router("hash", num_experts=4)
        assert not list(router.parameters())
        sharded = router.sharded_state_dict(prefix="router.")
        assert list(sharded) == ["router.table"]
        assert sharded["router.table"].global_shape == (40,)
        assert sharded["router.table"].allow_shape_mismatch, "padding depends on the layout"

    def test_without_ids_is_refused(self):
        with pytest.raises(ValueError, match="--token-router hash routes by token ids"):
            make_router("hash", num_experts=4)(torch.randn(5, 3, 4))
