"""The bias of Megatron's top-k router moves with the load, and is kept."""

from pathlib import Path

import torch
from support.in_process import pretrained
from support.launches import records

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint

BIASED = (
    "--architecture transformer --num-attention-heads 4 --token-router topk --num-experts 4 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
)


def biases(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(folder)
    names = [name for name in checkpoint.specs if name.endswith("router.expert_bias")]
    return {name: checkpoint.read(name) for name in names}


def test_training_moves_the_bias_against_the_load(tmp_path: Path):
    """By its rate in each step, in fp32 in a model of bf16 too; and a resume goes on with it."""
    words = f"{BIASED} --moe-router-bias-update-rate 0.01 --bf16 --log-interval 1"
    with pretrained(f"{words} --save {tmp_path} --train-iters 1"):
        pass
    lines = [line["routers"] for line in records(tmp_path) if "routers" in line]
    loads = [router["load_share"] for router in lines[0]]
    moved = biases(tmp_path)
    assert len(moved) == len(loads) == 4
    for bias, load in zip(moved.values(), loads, strict=True):
        expected = 0.01 * (0.25 - torch.tensor(load)).sign()
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, expected)
        assert bias.any()
    with pretrained(f"{words} --save {tmp_path} --train-iters 2"):
        pass
    for name, bias in biases(tmp_path).items():
        assert set((bias - moved[name]).mul(100).round().tolist()) <= {-1.0, 0.0, 1.0}
