"""A plugin's token router in its host: the number of experts per token, and skipped steps."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from support.launches import REPOSITORY
from support.routers import make_router
from unit.plugins.test_checks import TWO

from megatron_smlp import plugin_files
from megatron_smlp.plugin_weights import alike_on_ranks
from megatron_smlp.routers.hosted import update_rules
from megatron_smlp.routers.statistics import RouterCounter

pytestmark = pytest.mark.usefixtures("megatron", "registry")


def test_a_rule_gives_as_many_experts_as_it_says(tmp_path: Path):
    path, tokens = tmp_path / "two.py", torch.randn(4, 1, 3)
    path.write_text(TWO, encoding="utf-8")
    plugin_files.load(str(path))
    router = make_router("two", num_experts=3)
    assert router(tokens)[1].sum(dim=1).tolist() == [2] * 4
    router.kind.experts_per_token = 1
    with pytest.raises(ValueError, match=r"Two\.choose gives a token 2 experts, but experts_per_t"):
        router(tokens)


def test_a_skipped_step_leaves_nothing_in_a_rule():
    """Neither of its scores nor of the lowest of them."""
    plugin_files.load(str(REPOSITORY / "plugins" / "threshold.py"))
    rules, batches = [], torch.randn(2, 4, 1, 2)
    for skipped in (torch.full((4, 1, 2), torch.nan), None):
        router = make_router("threshold", num_experts=2)
        for batch in (batches[0], skipped, skipped, batches[1]):
            if batch is not None:
                router(batch)
                update_rules([router], skipped=batch is skipped)
        rules.append(router.rule)
    assert rules[0].bound.isfinite().all()
    assert torch.equal(rules[0].bound, rules[1].bound)


def test_counting_keeps_no_graph_of_a_rules_own_parameters():
    """Else it grows with each batch, and the statistics cannot be taken."""
    plugin_files.load(str(REPOSITORY / "tests" / "support" / "mixed_plugin.py"))
    router = make_router("tempered", num_experts=3)
    router.counter = RouterCounter(3, torch.device("cpu"))
    weights, _ = router(torch.randn(4, 1, 3))
    assert weights.requires_grad
    assert not router.counter.pop(training=True).requires_grad


def test_weights_that_a_rule_leaves_unread_have_a_gradient(tmp_path: Path):
    """Megatron counts gradients where reductions overlap with the backward pass."""
    path = tmp_path / "first.py"
    path.write_text(
        "from megatron_smlp.plugins import TokenRouter, register\n@register('first')\n"
        "class First(TokenRouter):\n"
        "    def choose(self, scores):\n        return scores.argmax(dim=1, keepdim=True)\n"
        "    def weigh(self, scores, chosen):\n        return scores.new_ones(chosen.shape)\n",
        encoding="utf-8",
    )
    plugin_files.load(str(path))
    router, tokens = make_router("first", num_experts=3), torch.randn(4, 1, 3)
    weights, _ = router(tokens)
    weights.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in router.parameters())
    assert not router.eval()(tokens)[0].requires_grad


def test_statistics_in_a_part_of_a_rule_stay_fp32(tmp_path: Path):
    path = tmp_path / "counted.py"
    path.write_text(
        "import torch\nfrom megatron_smlp.plugins import TokenRouter, register\n"
        "class Mean(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('mean', torch.full((3,), 1 / 3))\n"
        "@register('counted')\nclass Counted(TokenRouter):\n"
        "    def __init__(self, **host):\n        super().__init__(**host)\n"
        "        self.part = Mean()\n",
        encoding="utf-8",
    )
    plugin_files.load(str(path))
    rule = make_router("counted", num_experts=3).rule.bfloat16()
    assert torch.equal(rule.part.mean, torch.full((3,), 1 / 3))


def test_draws_are_alike_on_ranks_that_choose_for_the_same_tokens():
    config = SimpleNamespace(sequence_parallel=True)
    drawn = []
    for rank in (0, 1):
        model_parallel_cuda_manual_seed(7, tp_rank=rank, ep_rank=0, etp_rank=rank)
        with get_cuda_rng_tracker().fork():
            own = torch.rand(4)
            with alike_on_ranks(config, torch.nn.Identity()):
                drawn.append((own, torch.rand(4)))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
