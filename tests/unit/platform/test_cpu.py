"""If CUDA is available, the CPU platform sets no flag."""

from argparse import Namespace

import pytest
import torch

from megatron_smlp.platform import cpu


def test_where_cuda_is_available_flags_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = Namespace(fp16=True, distributed_backend="nccl")
    cpu.set_flags(args)
    assert vars(args) == {"fp16": True, "distributed_backend": "nccl"}
