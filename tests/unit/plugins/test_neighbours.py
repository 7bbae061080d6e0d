"""AFT and CausalRN (plugins/) match their equations, pair by pair: outputs and every gradient."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from support.launches import REPOSITORY
from torch import Tensor

from megatron_smlp import plugin_files, plugins

BATCH, WIDTH, EPS = 2, 5, 1e-5


@pytest.fixture(autouse=True)
def loaded(registry: plugins.Registry) -> dict[str, ModuleType]:

    for name in ("aft", "causal_rn"):
        plugin_files.load(str(REPOSITORY / "plugins" / f"{name}.py"))
    return {name: sys.modules[name] for name in ("aft", "causal_rn")}


def made(name: str, *, length: int, width: int = WIDTH, **values: Any) -> plugins.Mixer:
    kind = plugins.register.token_mixers[name]
    mixer = kind(width=width, length=length, values=values).draw().double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return mixer


def assert_same(mixer: plugins.Mixer, equation: Any, *inputs: Tensor, rtol: float = 1e-9) -> None:
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    wanted = [*leaves, *mixer.parameters()]
    upstream = torch.randn(mixer(*leaves).shape).double()
    for ours, theirs in zip(
        (mixer(*leaves), *torch.autograd.grad(mixer(*leaves), wanted, upstream)),
        (equation(*leaves), *torch.autograd.grad(equation(*leaves), wanted, upstream)),
        strict=True,
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def aft(qkv: Tensor, weight: Tensor) -> Tensor:
    """Compute AFT: for each feature, a softmax over all tokens up to the own one."""
    query, key, value = qkv.unbind(-1)
    count = key.shape[1]
    exponents = weight[:count, :count, None] + key[:, None]  # [B, T, T, F]
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    shares = exponents.masked_fill(later[..., None], -torch.inf).softmax(dim=2)
    return query.sigmoid() * (shares * value[:, None]).sum(dim=2)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("kind", ["full", "simple"])
@pytest.mark.parametrize("count", [1, 63, 130])
def test_aft_is_its_equation(kind: str, count: int, scale: float):
    mixer = made("aft", length=130, aft_kind=kind)
    weight = torch.zeros(130, 130) if kind == "simple" else mixer.positions.weight
    with torch.no_grad():
        weight.mul_(scale)
    qkv = torch.randn(BATCH, count, WIDTH, 3).double() * torch.tensor([1.0, scale, 1.0])
    assert_same(mixer, lambda x: aft(x, weight), qkv)


def n(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()


def causal_rn(left: Tensor, right: Tensor, *, quadratic: bool) -> Tensor:
    a, b, rows = n(left), n(right), []
    for t in range(a.shape[1]):
        if quadratic:
            pairs = [torch.exp(n(a[:, t] + b[:, s])) for s in range(t + 1)]
            rows.append(n(sum(pairs) / (t + 1)))
            continue
        mean = torch.exp(a[:, t]) * sum(torch.exp(b[:, s]) for s in range(t + 1)) / (t + 1)
        # n ignores its scale, except for eps: the mixer scales the largest feature to 1.
        rows.append(n(mean / mean.amax(-1, keepdim=True)))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("block", [1, 300, 2**21])
def test_causal_rn_is_its_equation(
    kind: str, count: int, block: int, loaded: dict[str, ModuleType], monkeypatch
):
    monkeypatch.setattr(loaded["causal_rn"], "BLOCK", block)
    mixer = made("causal_rn", length=33, width=8, causal_rn_kind=kind)
    inputs = torch.randn(2, BATCH, count, 8).double()
    equation = lambda a, b: causal_rn(a, b, quadratic=kind == "quadratic")  # noqa: E731
    assert_same(mixer, equation, *inputs, rtol=1e-8)


def test_a_width_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"--relation-width 6401 .*from 6401 on"):
        made("causal_rn", length=4, width=6401, causal_rn_kind="quadratic")


def test_flops_of_a_causal_product_are_its_triangles():
    from megatron_smlp.accounting.plugin_costs import counted

    count, width = 12, 8
    kind = plugins.register.token_mixers["aft"]
    full = counted(kind, features=width, length=count, values={})
    assert full.flops == 2 * count * count * 2 * width
    assert full.flops - full.above == count * (count + 1) * 2 * width
