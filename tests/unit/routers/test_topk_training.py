"""The bias of Megatron's top-k router moves with the load, and is kept."""

from pathlib import Path

import pytest
import torch
from support.conversions import run
from support.in_process import pretrained
from support.launches import records
from transformers import AutoModelForCausalLM

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert

BIASED = (
    "--architecture transformer --num-attention-heads 4 --token-router topk --num-experts 4 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
)

MIXERS = {
    "mixer": "--architecture mixer --spatial-heads 2 --mixer-expansion",
    "toeplitz": "--architecture mixer --toeplitz",
    "causal_rn": "--architecture causal_rn",
    "aft": "--architecture aft",
}


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


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_trains_with_every_mixer_and_is_exported(tmp_path: Path, mixer: str):
    """Every token has its two experts, and the export computes what was trained."""
    words = f"{MIXERS[mixer]} --token-router topk --num-experts 4 --moe-layer-freq 2 --lr 1e-2"
    with pretrained(f"{words} --log-interval 1 --save {tmp_path / 'run'}"):
        lines = [line for line in records(tmp_path / "run") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [(r["layer"], r["choices"]) for r in lines[0]["routers"]] == [(1, 64), (3, 64)]
    said = run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    assert any("forward check" in line for line in said)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    prompt = torch.tensor([[1, 2, 3]])
    text = model.generate(prompt, max_new_tokens=5, do_sample=False)
    without = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(text, without)
