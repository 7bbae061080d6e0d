"""Attention in blocks of rows matches torch's SDPA in outputs and gradients; when it is used."""

import pytest
import torch
from torch import Tensor

from megatron_smlp.ops import causal_attention
from megatron_smlp.ops.causal_attention import attend, attention_in_blocks

BATCH, HEADS, WIDTH = 2, 4, 6


def _inputs(
    tokens: int, *, groups: int = HEADS, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return q, k, v and the gradient of y in Megatron's layout: tokens first."""
    sizes = (HEADS, groups, groups, HEADS)
    return [torch.randn(tokens, BATCH, n, WIDTH).to(dtype).permute(1, 2, 0, 3) for n in sizes]


def _results(way: object, inputs: list[Tensor], **options: object) -> list[Tensor]:
    *operands, upstream = inputs
    operands = [x.detach().requires_grad_() for x in operands]
    output = way(*operands, scale=0.3, **options)
    return [output.detach(), *torch.autograd.grad(output, operands, upstream)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 300, 512])
def test_blocks_equal_sdpa(tokens: int, groups: int):
    inputs = _inputs(tokens, groups=groups)
    for ours, theirs in zip(
        _results(attention_in_blocks, inputs), _results(attend, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_close_as_rounded_scores_are():
    """The error is at most a few times half a unit in a score's last place, 2^-9 of it."""
    inputs = [2 * x for x in _inputs(200, dtype=torch.bfloat16)]
    exact = _results(attend, [x.double() for x in inputs])
    for ours, theirs in zip(_results(attention_in_blocks, inputs), exact, strict=True):
        error = torch.linalg.vector_norm(ours.double() - theirs)
        assert error < 8 * 2**-9 * torch.linalg.vector_norm(theirs)


def _is_in_blocks(monkeypatch: pytest.MonkeyPatch, tokens: int, **options: object) -> bool:
    called = []
    with monkeypatch.context() as patch:
        blocks = causal_attention.attention_in_blocks
        patch.setattr(
            causal_attention,
            "attention_in_blocks",
            lambda *a, **k: called.append(1) or blocks(*a, **k),
        )
        attend(*_inputs(tokens)[:3], **options)
    return bool(called)


def test_training_on_short_sequences_is_in_blocks(monkeypatch: pytest.MonkeyPatch):
    longest = causal_attention.LONGEST
    assert _is_in_blocks(monkeypatch, longest, training=True)
    assert not _is_in_blocks(monkeypatch, longest + 1, training=True)
    assert not _is_in_blocks(monkeypatch, longest, training=False, dropout=0.5)
    assert not _is_in_blocks(monkeypatch, longest, training=True, dropout=0.5)


def test_a_forward_pass_rounds_alike_with_and_without_gradients():
    """Recomputation runs it both ways."""
    operands = [x.requires_grad_() for x in _inputs(64, dtype=torch.bfloat16)[:3]]
    with torch.no_grad():
        first = attend(*operands, training=True)
    assert torch.equal(attend(*operands, training=True), first)


def test_autocast_does_not_round_what_is_not_rounded():
    operands = _inputs(64, dtype=torch.float32)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*operands, training=True).dtype == torch.float32
