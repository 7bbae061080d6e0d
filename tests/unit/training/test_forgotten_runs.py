"""Many runs in one process, as the tests have them: none keeps its model behind its end."""

import gc

import torch
from support.in_process import pretrained
from torch._subclasses import FakeTensor

FLAGS = (
    "--architecture transformer --num-attention-heads 4 --train-iters 1 --num-layers 2 "
    "--num-experts 4 --token-router switch --use-distributed-optimizer"
)


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


def test_a_third_run_leaves_no_more_than_the_second() -> None:
    left = []
    for _ in range(3):
        with pretrained(FLAGS):
            pass
        left.append(live_tensors())
    assert left[2] <= left[1]
