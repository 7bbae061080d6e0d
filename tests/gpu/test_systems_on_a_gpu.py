"""Every system on one GPU against the same run on the CPU, which the rest of the suite holds.

    make test-gpu

Same weights (drawn on the CPU), same data, bf16. Nothing of the CPU platform may be active where
CUDA is.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.launches import launch, run_command, steps
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NUM_STEPS = 5
TOLERANCE = 0.02  # relative; bf16 rounds to 3 digits, and GEMMs add up in another order
MODEL = f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-layers 4 --hidden-size 64
    --ffn-hidden-size 256 --seq-length 64 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 2 --global-batch-size 8 --num-workers 0 --lr 1e-3 --bf16
    --use-cpu-initialization --log-interval 1 --eval-iters 0 --train-iters {NUM_STEPS}
"""
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
ATTENTION = "--architecture transformer --num-attention-heads 4"
SMLP = f"--architecture smlp --num-dense-layers 2 --num-feature-experts 4 {EXPERTS}"
SYSTEMS = {
    "transformer": ATTENTION,
    "gshard": f"{ATTENTION} --token-router gshard {EXPERTS}",
    "switch": f"{ATTENTION} --token-router switch {EXPERTS} --moe-train-capacity-factor 1.25",
    "base": f"{ATTENTION} --token-router base {EXPERTS}",
    "hash": f"{ATTENTION} --token-router hash {EXPERTS}",
    "gmlp": "--architecture gmlp",
    "amlp": "--architecture amlp --tiny-attention-width 16",
    "smlp_deterministic": f"{SMLP} --feature-router deterministic --token-router base",
    "smlp_partial": f"{SMLP} --feature-router partial --token-router base",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("gpu")
    runs = {name: f"{MODEL} {flags}" for name, flags in SYSTEMS.items()}
    launch(runs, processes=1, folder=folder / "gpu")
    launch(runs, processes=1, folder=folder / "cpu", CUDA_VISIBLE_DEVICES="")
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_and_gradient_norms_are_the_cpus(results: Path, system: str):
    gpu, cpu = (steps(results / device / system) for device in ("gpu", "cpu"))
    assert len(gpu) == len(cpu) == NUM_STEPS
    for ours, expected in zip(gpu, cpu, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=5 * TOLERANCE)


def test_the_cpu_platform_does_nothing():
    code = (
        "import torch; before = torch.cuda.current_device, torch.empty\n"
        "from megatron_smlp.platform import cpu; cpu.apply()\n"
        "assert (torch.cuda.current_device, torch.empty) == before"
    )
    run_command([sys.executable, "-c", code], **os.environ)


@pytest.mark.parametrize("length", [63, 1000, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_triangular_product_and_its_gradients(length: int, dtype: torch.dtype):
    from megatron_smlp.ops.causal_mix import causal_mix, causal_mix_reference

    weight = torch.randn(2, length, length, dtype=torch.float64) / length**0.5
    _assert_like_the_cpu(causal_mix, causal_mix_reference, weight, dtype)


@pytest.mark.parametrize("length", [63, 1000, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_toeplitz_product_and_its_gradients(length: int, dtype: torch.dtype):
    from megatron_smlp.ops.toeplitz_mix import toeplitz_mix, toeplitz_mix_reference

    weight = torch.randn(2, length, dtype=torch.float64) / length**0.5
    _assert_like_the_cpu(toeplitz_mix, toeplitz_mix_reference, weight, dtype)


def _assert_like_the_cpu(
    product: Callable[[Tensor, Tensor], Tensor],
    reference: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    dtype: torch.dtype,
) -> None:
    length = weight.shape[1]
    values, gradient = (torch.randn(2, length, 48, dtype=torch.float64) for _ in range(2))
    expected = _with_gradients(reference, weight, values, gradient)
    on_gpu = (tensor.to("cuda", dtype) for tensor in (weight, values, gradient))
    rounding = 2e-2 if dtype == torch.bfloat16 else 2e-3  # TF32 is allowed to multiply
    for ours, exact in zip(_with_gradients(product, *on_gpu), expected, strict=True):
        # A sum of many terms rounds relative to the largest, not to itself.
        scale = exact.abs().max().item()
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=rounding, atol=rounding * scale)


def _with_gradients(
    product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, values: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    weight, values = weight.requires_grad_(), values.requires_grad_()
    output = product(weight, values)
    return output.detach(), *torch.autograd.grad(output, (weight, values), gradient)


def test_balanced_assignment_is_the_cpus():
    from megatron_smlp.ops.balanced_assignment import balanced_assignment

    scores = torch.randn(1000, 8)
    experts = balanced_assignment(scores.cuda())
    assert experts.device.type == "cuda"
    counts = torch.bincount(experts.cpu(), minlength=8)
    assert counts.min() == counts.max() == 125
    chosen = scores.gather(1, experts.cpu()[:, None]).sum()
    best = scores.gather(1, balanced_assignment(scores)[:, None]).sum()
    assert chosen >= 0.995 * best
