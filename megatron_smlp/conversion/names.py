"""The names of tensors in a Megatron checkpoint and in our Hugging Face model.

One table, read in both directions. A Megatron checkpoint holds whole tensors under global names,
whatever layout saved them, so there is one row a kind of tensor and nothing about ranks. Only the
queries, keys and values need more than a new name: Megatron keeps them in one tensor, by groups.

Letters: D hidden, n heads, g key/value groups, d head width, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.conversion.recipes import Recipe, same

OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "embedding.word_embeddings.fingerprints": "model.embed_tokens.fingerprints",
    "embedding.word_embeddings.norm.weight": "model.embed_tokens.norm.weight",
    "embedding.word_embeddings.norm.bias": "model.embed_tokens.norm.bias",
    "embedding.word_embeddings.proj.weight": "model.embed_tokens.proj.weight",
    "embedding.position_embeddings.weight": "model.embed_positions.weight",
    "decoder.final_layernorm.weight": "model.final_norm.weight",
    "decoder.final_layernorm.bias": "model.final_norm.bias",
    "output_layer.weight": "lm_head.weight",
}

# Within one layer: `decoder.layers.N.` and `model.layers.N.` are left out. What is not here keeps
# its name within the slot: `self_attention.spatial.weight` is `mixer.spatial.weight`.
SLOTS = {"self_attention.": "mixer.", "mlp.": "channel."}
IN_LAYER = {
    "input_layernorm.weight": "mixer_norm.weight",
    "input_layernorm.bias": "mixer_norm.bias",
    "self_attention.linear_proj.weight": "mixer.out_proj.weight",
    "self_attention.linear_proj.bias": "mixer.out_proj.bias",
    "self_attention.linear_fc1.weight": "mixer.up_proj.weight",
    "self_attention.linear_fc1.bias": "mixer.up_proj.bias",
    "self_attention.norm.weight": "mixer.gate_norm.weight",
    "self_attention.norm.bias": "mixer.gate_norm.bias",
    "self_attention.tiny_attention.linear_proj.weight": "mixer.tiny_attention.out_proj.weight",
    "self_attention.tiny_attention.linear_proj.bias": "mixer.tiny_attention.out_proj.bias",
    "self_attention.router.weight": "mixer.prefix_router",
    "self_attention.linear_fc2.weight": "mixer.down_proj.weight",
    "self_attention.linear_fc2.bias": "mixer.down_proj.bias",
    "pre_mlp_layernorm.weight": "channel_norm.weight",
    "pre_mlp_layernorm.bias": "channel_norm.bias",
    "mlp.linear_fc1.weight": "channel.up_proj.weight",
    "mlp.linear_fc1.bias": "channel.up_proj.bias",
    "mlp.linear_fc2.weight": "channel.down_proj.weight",
    "mlp.linear_fc2.bias": "channel.down_proj.bias",
    "mlp.shared_experts.linear_fc1.weight": "channel.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "channel.shared_experts.down_proj.weight",
    "mlp.experts.experts.linear_fc1.weight": "channel.experts.up_proj",
    "mlp.experts.experts.linear_fc2.weight": "channel.experts.down_proj",
}
QKV = "self_attention.linear_qkv."
QKV_PARTS = ("mixer.q_proj.", "mixer.k_proj.", "mixer.v_proj.")
TINY_QKV = "self_attention.tiny_attention.linear_qkv."
TINY_QKV_PARTS = tuple(f"mixer.tiny_attention.{part}_proj." for part in "qkv")


@dataclass(frozen=True)
class HeadShape:
    """Layout of Megatron's fused tensor: g groups of n / g queries, one key, one value."""

    groups: int
    queries: int
    """Queries of one group: n / g."""
    width: int
    """d."""

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> HeadShape:
        """Return the layout that the model flags of a checkpoint make."""
        heads = flags["num_attention_heads"]
        groups = flags["num_query_groups"] if flags["group_query_attention"] else heads
        return cls(groups, heads // groups, flags["kv_channels"])


def huggingface_names(name: str) -> tuple[str, ...]:
    """Return the Hugging Face name of a Megatron tensor, or three for queries, keys, values.

    Raises:
        KeyError: no row of the table has this name.
    """
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    layer, rest = _split_layer(name)
    for fused, parts in ((QKV, QKV_PARTS), (TINY_QKV, TINY_QKV_PARTS)):
        if rest.startswith(fused):
            kind = rest.removeprefix(fused)
            return tuple(f"model.layers.{layer}.{part}{kind}" for part in parts)
    return (f"model.layers.{layer}.{_within_layer(rest)}",)


def to_huggingface(name: str, heads: HeadShape) -> dict[str, Recipe]:
    """Return recipes for the Hugging Face tensors that one Megatron tensor becomes.

    Raises:
        KeyError: no row of the table has this name.
    """
    targets = huggingface_names(name)
    if len(targets) == 1:
        return {targets[0]: Recipe((name,), same)}
    return {
        target: Recipe((name,), partial(_part, name=name, number=number, heads=heads))
        for number, target in enumerate(targets)
    }


def to_megatron(name: str, heads: HeadShape) -> Recipe:
    """Return the recipe for the Megatron tensor of this name.

    Raises:
        KeyError: no row of the table has this name.
    """
    sources = huggingface_names(name)
    if len(sources) == 1:
        return Recipe(sources, same)
    return Recipe(sources, _stacked if _is_tiny(name) else partial(join_qkv, heads=heads))


def _within_layer(name: str) -> str:
    for slot, theirs in SLOTS.items():
        if name not in IN_LAYER and name.startswith(slot):
            return theirs + name.removeprefix(slot)
    return IN_LAYER[name]


def _is_tiny(name: str) -> bool:
    return f".{TINY_QKV}" in name


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _part(fused: Tensor, *, name: str, number: int, heads: HeadShape) -> Tensor:
    if _is_tiny(name):
        return fused.chunk(3)[number].contiguous()
    return split_qkv(fused, heads)[number].contiguous()


def _split_layer(name: str) -> tuple[int, str]:
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        raise KeyError(name)
    number, _, rest = name.removeprefix(prefix).partition(".")
    return int(number), rest


def split_qkv(fused: Tensor, heads: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """Split [g (n/g + 2) d, ...] into queries [n d, ...], keys [g d, ...], values [g d, ...]."""
    grouped = fused.unflatten(0, (heads.groups, heads.queries + 2, heads.width))
    parts = grouped.split([heads.queries, 1, 1], dim=1)
    queries, keys, values = (part.flatten(0, 2) for part in parts)
    return queries, keys, values


def join_qkv(queries: Tensor, keys: Tensor, values: Tensor, heads: HeadShape) -> Tensor:
    """Undo `split_qkv`."""
    counts = (heads.queries, 1, 1)
    grouped = [
        part.unflatten(0, (heads.groups, count, heads.width))
        for part, count in zip((queries, keys, values), counts, strict=True)
    ]
    return torch.cat(grouped, dim=1).flatten(0, 2).contiguous()
