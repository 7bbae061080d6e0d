"""Recomputing activations in the backward pass happens, and gives the same gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.in_process import build_model

pytestmark = pytest.mark.usefixtures("megatron")

ARCHITECTURES = {
    "transformer": "--architecture transformer --num-attention-heads 4",
    "gmlp": "--architecture gmlp --spatial-heads 4",
    "toeplitz": "--architecture gmlp --spatial-heads 2 --toeplitz",
    "smlp": "--architecture smlp --num-dense-layers 2 --feature-router deterministic "
    "--num-feature-experts 4 --token-router switch --num-experts 2",
    "base": "--architecture gmlp --token-router base --num-experts 2",
}
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
EXPERTS = f"{SELECTIVE} --recompute-modules core_attn moe"
RECOMPUTE = {"full": FULL, "selective": SELECTIVE, "selective_experts": EXPERTS}
CORES = ("core_attention", "spatial")  # what `core_attn` recomputes: the T x T part of a mixer


def _gradients(args: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a training step, and how often the mixers' cores ran."""
    torch.manual_seed(7)
    model = build_model(args).train()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    cores = [m for name, m in model.named_modules() if name.rpartition(".")[2] in CORES]
    assert len(cores) == args.num_layers
    for core in cores:
        core.register_forward_hook(count)
    tokens = torch.randint(args.vocab_size, (2, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}, calls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_gradients(parse: Callable[..., Any], architecture: str):
    plain, calls = _gradients(parse(ARCHITECTURES[architecture]))
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0 or "expert" in name, name  # an expert may get no token
    for how, recompute in RECOMPUTE.items():
        again, more_calls = _gradients(parse(f"{ARCHITECTURES[architecture]} {recompute}"))
        assert more_calls == 2 * calls, how
        assert set(again) == set(plain)
        for name, gradient in plain.items():
            torch.testing.assert_close(
                again[name], gradient, msg=lambda text, at=(how, name): f"{at}: {text}"
            )
