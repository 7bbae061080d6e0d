"""Our attention core matches Megatron's own, which materializes the T x T scores."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support.in_process import layer_config
from support.launches import launch_calls
from torch import Tensor

from megatron_smlp import plugin_weights
from megatron_smlp.layers import attention
from megatron_smlp.layers.attention import CausalCoreAttention
from megatron_smlp.layers.tiny_attention import TinyAttention
from megatron_smlp.training.forward import other_documents

pytestmark = pytest.mark.usefixtures("megatron")

TOKENS, BATCH, HEADS, WIDTH = 13, 3, 4, 6


def _core(
    kind: type[DotProductAttention], layer_number: int = 1, **changes: object
) -> DotProductAttention:
    core = kind(
        layer_config(num_attention_heads=HEADS, hidden_size=HEADS * WIDTH, **changes),
        layer_number=layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )
    return core.train()


def _gradients(core: DotProductAttention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = core(*inputs, attention_mask=None)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def test_within_documents_it_is_attention_of_each_alone():
    """An end-of-document token belongs to the document that it ends."""
    tokens = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])
    query, key, value = torch.randn(3, TOKENS, 1, HEADS, WIDTH)
    core = _core(CausalCoreAttention)
    whole = core(query, key, value, attention_mask=other_documents(tokens, 0))
    starts = [0, 3, 7, 8, TOKENS]
    for first, last in itertools.pairwise(starts):
        part = slice(first, last)
        alone = core(query[part], key[part], value[part], attention_mask=None)
        torch.testing.assert_close(whole[part], alone)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_megatrons_own_core(groups: int):
    """Outputs and gradients, with as many key/value groups as heads and with fewer."""
    query = torch.randn(TOKENS, BATCH, HEADS, WIDTH)
    key, value = torch.randn(2, TOKENS, BATCH, groups, WIDTH)
    upstream = torch.randn(TOKENS, BATCH, HEADS * WIDTH)
    ours = _gradients(
        _core(CausalCoreAttention, num_query_groups=groups), [query, key, value], upstream
    )
    peers = _gradients(
        _core(DotProductAttention, num_query_groups=groups), [query, key, value], upstream
    )
    for name, a, b in zip(("output", "query", "key", "value"), ours, peers, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_scaling_by_layers_changes_no_score():
    """Megatron divides by the layer's number before the softmax, and multiplies in it."""
    flags = {"layer_number": 3, "apply_query_key_layer_scaling": True}
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    theirs = _core(DotProductAttention, **flags)(q, k, v, None)
    torch.testing.assert_close(_core(CausalCoreAttention, **flags)(q, k, v, None), theirs)
    torch.testing.assert_close(_core(CausalCoreAttention)(q, k, v, None), theirs)


def test_dropout_is_for_training_only():
    core = _core(CausalCoreAttention, attention_dropout=0.5)
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    assert not torch.equal(core(q, k, v, None), core(q, k, v, None))
    core.eval()
    assert torch.equal(core(q, k, v, None), core(q, k, v, None))


class Tracker:
    """Records the names under which random numbers are drawn."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        self.names.append(name)
        yield


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "drawn"),
    [(1, False, []), (2, False, ["model-parallel-rng"]), (2, True, [])],
)
def test_heads_of_each_rank_draw_apart(
    tp: int, sequence_parallel: bool, drawn: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Under sequence parallelism Megatron runs the whole layer on the rank's own numbers."""
    tracker = Tracker()
    monkeypatch.setattr(attention, "get_cuda_rng_tracker", lambda: tracker)
    core = _core(CausalCoreAttention, attention_dropout=0.5)
    core.config.tensor_model_parallel_size = tp
    core.config.sequence_parallel = sequence_parallel
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    core(q, k, v, None)
    core.eval()(q, k, v, None)
    assert tracker.names == drawn


@pytest.mark.parametrize(
    ("sequence_parallel", "drawn"), [(False, []), (True, ["data-parallel-rng"])]
)
def test_one_head_on_all_ranks_draws_alike(
    sequence_parallel: bool, drawn: list[str], monkeypatch: pytest.MonkeyPatch
):
    tracker = Tracker()
    monkeypatch.setattr(plugin_weights, "get_cuda_rng_tracker", lambda: tracker)
    config = layer_config(attention_dropout=0.5)
    config.sequence_parallel = sequence_parallel
    group = ProcessGroupCollection.use_mpu_process_groups().tp
    head = TinyAttention(config, width=8, out_features=48, tp_group=group)
    x = torch.randn(TOKENS, BATCH, config.hidden_size)
    head(x)
    head.eval()(x)
    assert tracker.names == drawn


def test_initial_values_do_not_depend_on_the_tensor_parallel_size():
    """Nor do the random numbers drawn after them."""

    def drawn(*, tp: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        group = SimpleNamespace(size=lambda: tp, rank=lambda: rank)
        head = TinyAttention(layer_config(), width=8, out_features=48, tp_group=group)
        return head.linear_qkv.weight, head.linear_proj.weight, torch.rand(1)

    whole, *parts = drawn(tp=1, rank=0), drawn(tp=2, rank=0), drawn(tp=2, rank=1)
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    for part in parts:
        assert torch.equal(part[0], whole[0])
        assert torch.equal(part[2], whole[2])


def test_masks_other_than_causal_are_refused():
    core = _core(CausalCoreAttention)
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    with pytest.raises(ValueError, match="Only the causal mask is supported"):
        core(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(ValueError, match="attention bias need Transformer Engine"):
        core(q, k, v, None, attention_bias=torch.zeros(TOKENS, TOKENS))


@pytest.mark.parametrize("changes", [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}])
def test_what_it_cannot_do_is_refused_when_the_layer_is_built(changes: dict[str, object]):
    with pytest.raises(ValueError, match=r"--window-size and --softmax-type .* Omit them"):
        _core(CausalCoreAttention, **changes)


def test_replicated_heads_get_one_gradient(tmp_path: Path):
    """Two ranks whose attention gradients differ, as on a GPU by rounding, keep equal weights."""
    launch_calls(_train_apart, str(tmp_path), processes=2, log=tmp_path / "log")
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def _train_apart(folder: str) -> None:
    import os

    from support.in_process import MINIMAL

    from megatron_smlp.layers import tiny_attention
    from pretrain_smlp import main

    rank = int(os.environ["RANK"])
    plain, make, heads = tiny_attention.attend, TinyAttention.__init__, []

    def apart(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        if q.requires_grad:
            q.register_hook(lambda gradient: gradient * (1 + 0.1 * rank))
        return plain(q, k, v, **settings)  # type: ignore[arg-type]

    def made(self: TinyAttention, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]
        heads.append(self)

    tiny_attention.attend = apart  # type: ignore[assignment]
    TinyAttention.__init__ = made  # type: ignore[assignment,method-assign]
    flags = "--architecture amlp --tensor-model-parallel-size 2 --init-method-std 0.5"
    main([*MINIMAL.split(), *flags.split(), "--log-dir", folder])
    torch.save([head.linear_qkv.weight.detach() for head in heads], Path(folder, f"{rank}.pt"))
