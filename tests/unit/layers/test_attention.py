"""Our attention core against Megatron's own, which builds the T x T scores."""

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support.in_process import layer_config
from torch import Tensor

from megatron_smlp.layers.attention import CausalCoreAttention

pytestmark = pytest.mark.usefixtures("megatron")

TOKENS, BATCH, HEADS, WIDTH = 13, 3, 4, 6


def _core(kind: type[DotProductAttention], **changes: object) -> DotProductAttention:
    core = kind(
        layer_config(num_attention_heads=HEADS, hidden_size=HEADS * WIDTH, **changes),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )
    return core.train()


def _gradients(core: DotProductAttention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = core(*inputs, attention_mask=None)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


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


def test_dropout_is_for_training_only():
    core = _core(CausalCoreAttention, attention_dropout=0.5)
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    assert not torch.equal(core(q, k, v, None), core(q, k, v, None))
    core.eval()
    assert torch.equal(core(q, k, v, None), core(q, k, v, None))


def test_masks_other_than_causal_are_refused():
    core = _core(CausalCoreAttention)
    q, k, v = torch.randn(3, TOKENS, BATCH, HEADS, WIDTH)
    with pytest.raises(ValueError, match="Only the causal mask is supported"):
        core(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(ValueError, match="attention bias need Transformer Engine"):
        core(q, k, v, None, attention_bias=torch.zeros(TOKENS, TOKENS))


@pytest.mark.parametrize("changes", [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}])
def test_what_it_cannot_do_is_refused_when_the_layer_is_built(changes: dict[str, object]):
    with pytest.raises(ValueError, match=r"--window-size and --softmax-type .* Leave them out"):
        _core(CausalCoreAttention, **changes)
