"""RMSNorm computed some rows at a time matches torch's: outputs and gradients."""

import pytest
import torch
from torch.nn import functional

from megatron_smlp.ops import rms_norm

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("elements", [1, 100, 2**17], ids=["rows of one", "ragged", "at once"])
def test_it_is_torchs(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rms_norm, "ELEMENTS", elements)
    x = (3 * torch.randn(3, 7, 24)).to(dtype).transpose(0, 1).requires_grad_()
    weight = torch.randn(24).to(dtype).requires_grad_()
    direction = torch.randn(3, 7, 24).to(dtype).transpose(0, 1)
    ours = rms_norm.RowwiseRMSNorm.apply(x, weight, 0.1)
    torchs = functional.rms_norm(x, (24,), weight, 0.1)
    assert ours.dtype == dtype
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(ours, torchs, **close)
    mine, theirs = (torch.autograd.grad(y, [x, weight], direction) for y in (ours, torchs))
    torch.testing.assert_close(mine, theirs, **close)
