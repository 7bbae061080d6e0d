"""Norms: torch's under Megatron's signature, and one for a head that is sharded over ranks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, ProcessGroupGloo

from megatron_smlp.layers.norms import HeadLayerNorm, SumOverGroup

EPS = 1e-5


def on_ranks[T](function: Callable[[int, ProcessGroupGloo], T], *, size: int) -> list[T]:
    """Run `function(rank, group)` on as many threads as ranks, with a gloo group of their own."""
    store = HashStore()

    def rank_main(rank: int) -> T:
        return function(rank, ProcessGroupGloo(store, rank, size))

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_main, rank) for rank in range(size)]
        return [future.result(timeout=60) for future in futures]


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("size", [2, 3])
def test_a_split_head_is_normed_as_a_whole(size: int):
    """Each rank has a shard of one head's features; statistics and gradients span all shards."""
    features, shape = 12, (5, 2)
    # Not of zero mean and unit variance, where local statistics would pass for global ones.
    x = torch.randn(*shape, features) * torch.linspace(0.1, 3, features) + torch.arange(features)
    weight, bias, upstream = (
        torch.randn(features),
        torch.randn(features),
        torch.randn(*shape, features),
    )

    def norm(part: slice, group: ProcessGroupGloo | None) -> list[Tensor]:
        mine = HeadLayerNorm(
            features // (group.size() if group else 1),
            num_heads=1,
            eps=EPS,
            dtype=torch.float32,
            group=group,
        )
        with torch.no_grad():
            mine.weight.copy_(weight[part])
            mine.bias.copy_(bias[part])
        inputs = x[..., part].clone().requires_grad_()
        output = mine(inputs)
        gradients = torch.autograd.grad(
            output, [inputs, mine.weight, mine.bias], upstream[..., part]
        )
        return [output.detach(), *gradients]

    share = features // size
    shares = on_ranks(
        lambda rank, group: norm(slice(rank * share, (rank + 1) * share), group), size=size
    )
    names = ["output", "input gradient", "weight gradient", "bias gradient"]
    for name, whole, *parts in zip(names, norm(slice(None), None), *shares, strict=True):
        torch.testing.assert_close(
            torch.cat(parts, dim=-1),
            whole,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_what_is_summed_over_a_group_is_contiguous(monkeypatch: pytest.MonkeyPatch):
    """NCCL accepts nothing else, while gloo accepts anything."""
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: summed.append(x))
    x = torch.randn(3, 4).T.requires_grad_()
    SumOverGroup.apply(x, None).T.sum().backward()
    assert [each.is_contiguous() for each in summed] == [True, True]
