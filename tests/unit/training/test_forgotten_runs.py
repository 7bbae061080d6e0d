"""Many runs in one process, as the tests have them: none keeps its model behind its end."""

import gc

import pytest
import torch
from support.in_process import pretrained
from torch._subclasses import FakeTensor

FLAGS = "--architecture transformer --num-attention-heads 4 --train-iters 1 --num-layers 2"


def live_tensors() -> tuple[int, int]:
    """Their number and their bytes, with garbage that no collection is going to look at.

    The compiler's fake tensors, which an earlier test may have left, hold no memory.
    """
    gc.unfreeze()
    tensors = [
        found
        for found in gc.get_objects()
        if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor)
    ]
    gc.freeze()
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("experts", ["", "--num-experts 4 --token-router switch"])
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_a_third_run_leaves_what_the_second_did(experts: str, optimizer: str) -> None:
    left = []
    for _ in range(3):
        with pretrained(f"{FLAGS} {experts} {optimizer}"):
            pass
        left.append(live_tensors())
    assert left[2] <= left[1]
