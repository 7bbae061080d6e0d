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
    before = dict.fromkeys(biases(tmp_path), torch.zeros(4))
    assert len(before) == 4
    for iteration in (1, 2):
        if iteration == 2:
            with pretrained(f"{words} --save {tmp_path} --train-iters 2"):
                pass
        line = [line["routers"] for line in records(tmp_path) if "routers" in line][-1]
        after = biases(tmp_path)
        for name, router in zip(after, line, strict=True):
            moved = 0.01 * (0.25 - torch.tensor(router["load_share"])).sign()
            assert moved.any()
            assert after[name].dtype == torch.float32
            torch.testing.assert_close(after[name], before[name] + moved)
        before = after
