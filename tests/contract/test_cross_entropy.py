"""Our CPU cross entropy over the whole vocabulary equals Megatron's, and its model calls ours."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch.nn import functional

from megatron_smlp.megatron_patches import cross_entropy
from megatron_smlp.platform.one_process import one_process


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with one_process():
        cross_entropy.apply()
        yield


@pytest.mark.parametrize(("elements", "chunks"), [(2**18, 1), (500, 5), (1, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_megatrons(
    dtype: torch.dtype, elements: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some rows at a time are in fp32: 21, five, and one."""
    monkeypatch.setattr(cross_entropy, "ELEMENTS", elements)
    values = 5 * torch.randn(7, 3, 100)
    target, weights = torch.randint(100, (7, 3)), torch.rand(7, 3)
    called = []
    torchs = functional.cross_entropy

    def noted(*args: object, **kwargs: object) -> torch.Tensor:
        called.append(args)
        return torchs(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "cross_entropy", noted)
    results = []
    for function in (tensor_parallel.vocab_parallel_cross_entropy, vocab_parallel_cross_entropy):
        logits = values.to(dtype, copy=True).requires_grad_()
        loss = function(logits.clone(), target)  # Megatron's works in place
        (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
        results.append((loss, gradient))
    assert len(called) == chunks
    (our_loss, our_gradient), (loss, gradient) = results
    assert our_loss.dtype == loss.dtype == torch.float32
    assert our_loss.shape == loss.shape == (7, 3)
    assert our_gradient.dtype == gradient.dtype == dtype
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-6)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(our_gradient, gradient, rtol=rounding, atol=1e-6)


def test_megatrons_fused_one_is_the_same_in_bf16() -> None:
    """configs/paper use it on a GPU; here it is uncompiled. Its gradient is always bf16."""
    values = (5 * torch.randn(7, 3, 100)).bfloat16()
    target = torch.randint(100, (7, 3))
    results = []
    with torch.compiler.set_stance("force_eager"):
        for function in (fused_vocab_parallel_cross_entropy, _with_group):
            logits = values.clone().requires_grad_()
            loss = function(
                logits.clone(), target, parallel_state.get_tensor_model_parallel_group()
            )
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            results.append((loss, gradient))
        wide = torch.randn(7, 3, 100, requires_grad=True)
        group = parallel_state.get_tensor_model_parallel_group()
        loss = fused_vocab_parallel_cross_entropy(wide.clone(), target, group)
        (rounded,) = torch.autograd.grad(loss.sum(), wide)
    torch.testing.assert_close(results[0], results[1], rtol=2**-8, atol=1e-6)
    assert torch.equal(rounded, rounded.bfloat16().float())


def _with_group(logits: torch.Tensor, target: torch.Tensor, group: object) -> torch.Tensor:
    return tensor_parallel.vocab_parallel_cross_entropy(logits, target, tp_group=group)


def test_label_smoothing_stays_megatrons() -> None:
    logits, target = torch.randn(4, 2, 10), torch.randint(10, (4, 2))
    ours = tensor_parallel.vocab_parallel_cross_entropy(logits.clone(), target, 0.1)
    assert torch.equal(ours, vocab_parallel_cross_entropy(logits.clone(), target, 0.1))


def test_megatrons_model_looks_for_it_there() -> None:
    source = inspect.getsource(language_module.LanguageModule.compute_language_model_loss)
    assert "tensor_parallel.vocab_parallel_cross_entropy(" in source
    assert language_module.tensor_parallel is tensor_parallel
    assert list(inspect.signature(vocab_parallel_cross_entropy).parameters) == [
        "vocab_parallel_logits",
        "target",
        "label_smoothing",
        "tp_group",
    ]
