"""The bias of Megatron's top-k router moves against the load, and is saved."""

from pathlib import Path

import pytest
import torch
from support.in_process import pretrained
from support.launches import records
from support.routers import make_router

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.routers.topk import hold_biases

BIASED = (
    "--architecture transformer --num-attention-heads 4 --token-router topk --num-experts 4 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
)


def biases(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(folder)
    names = [name for name in checkpoint.specs if name.endswith("router.expert_bias")]
    return {name: checkpoint.read(name) for name in names}


def test_training_moves_the_bias_against_the_load(tmp_path: Path):
    """By its rate in each step, in fp32 even in a bf16 model; and a resume continues with it."""
    flags = f"{BIASED} --moe-router-bias-update-rate 0.01 --bf16 --log-interval 1"
    with pretrained(f"{flags} --save {tmp_path} --train-iters 1"):
        pass
    before = dict.fromkeys(biases(tmp_path), torch.zeros(4))
    assert len(before) == 4
    for iteration in (1, 2):
        if iteration == 2:
            with pretrained(f"{flags} --save {tmp_path} --train-iters 2"):
                pass
        line = [line["routers"] for line in records(tmp_path) if "routers" in line][-1]
        after = biases(tmp_path)
        for name, router in zip(after, line, strict=True):
            moved = 0.01 * (0.25 - torch.tensor(router["load_share"])).sign()
            assert moved.any()
            assert after[name].dtype == torch.float32
            torch.testing.assert_close(after[name], before[name] + moved, rtol=0, atol=1e-8)
        before = after


@pytest.mark.usefixtures("megatron")
def test_a_step_that_is_held_back_leaves_the_bias():
    """A cast to bf16 leaves bias and loads in fp32."""
    changes = {"moe_router_topk": 2, "moe_router_pre_softmax": False}
    changes |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    router = make_router("topk", num_experts=4, **changes).bfloat16()
    router._maintain_float32_expert_bias()
    assert router.local_tokens_per_expert.dtype == router.expert_bias.dtype == torch.float32
    for skipped, left in ((False, 1), (True, 1), (False, 2)):
        with torch.no_grad():  # as the first pass of a recomputed layer
            router(torch.randn(5, 1, 4, dtype=torch.bfloat16))
            router(torch.randn(5, 1, 4, dtype=torch.bfloat16))
        router.expert_bias += 1  # as Megatron does, once the gradients are summed
        hold_biases([router], skipped=skipped)
        assert router.expert_bias.tolist() == [left] * 4
