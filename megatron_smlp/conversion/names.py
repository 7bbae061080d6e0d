"""Map tensor names between Megatron checkpoints and models of transformers: one table per model.

Each table is read in both directions. A Megatron checkpoint holds whole tensors under global names,
whatever layout saved them, so there is one row per kind of tensor and nothing about ranks. Only
what Megatron fuses needs more than a new name: queries, keys and values, by groups, and the two
projections of SwiGLU, concatenated.

Letters: D hidden, n heads, g key/value groups, d head width, V padded vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.conversion.recipes import Recipe, same
from megatron_smlp.errors import UsageError

QKV = "self_attention.linear_qkv"
TINY = "self_attention.tiny_attention.linear_"


@dataclass(frozen=True)
class Names:
    """Megatron's modules -> another model's; a tensor's last word, such as `bias`, is kept."""

    outside: Mapping[str, str]
    layers: str
    """The prefix of a layer's number, in place of `decoder.layers`."""
    in_layer: Mapping[str, tuple[str, ...]]
    """Within a layer: a module, or a tensor's whole name; several values are parts of a tensor."""
    slots: Mapping[str, str] = field(default_factory=dict)
    """Parts of a layer within which all other names are kept."""

    def of(self, name: str) -> tuple[str, ...]:
        """Return the other model's names for one of Megatron's tensors, or for its parts.

        Raises:
            KeyError: no row of the table has this name.
        """
        module, _, kind = name.rpartition(".")
        if module in self.outside:
            return (f"{self.outside[module]}.{kind}",)
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            raise KeyError(name)
        start, rest = f"{self.layers}.{match[1]}.", match[2]
        if rest in self.in_layer:
            return (start + self.in_layer[rest][0],)
        module, _, kind = rest.rpartition(".")
        if module in self.in_layer:
            return tuple(f"{start}{part}.{kind}" for part in self.in_layer[module])
        slot, _, inner = rest.partition(".")
        return (f"{start}{self.slots[slot]}.{inner}",)

    def export_plan(self, names: Iterable[str], flags: Mapping[str, Any]) -> dict[str, Recipe]:
        """Return recipes for the other model's tensors from a Megatron checkpoint's `names`.

        Raises:
            UsageError: the other model has no equivalent of a name.
        """
        plan: dict[str, Recipe] = {}
        for name in names:
            try:
                targets = self.of(name)
            except KeyError as error:
                raise UsageError(
                    f"the checkpoint's tensor {name} is unknown to the target model."
                ) from error
            heads = HeadShape.of(flags) if QKV in name else None
            for number, target in enumerate(targets):
                part = partial(_part, number=number, count=len(targets), heads=heads)
                plan[target] = Recipe((name,), same if len(targets) == 1 else part)
        return plan

    def import_plan(self, names: Iterable[str], flags: Mapping[str, Any]) -> dict[str, Recipe]:
        """Return recipes for a Megatron checkpoint's `names` from the other model's tensors."""
        join = partial(join_qkv, heads=HeadShape.of(flags))
        plan = {}
        for name in names:
            sources = self.of(name)
            make = same if len(sources) == 1 else join if QKV in name else _stacked
            plan[name] = Recipe(sources, make)
        return plan


OURS = Names(
    outside={
        "embedding.word_embeddings": "model.embed_tokens",
        "embedding.word_embeddings.norm": "model.embed_tokens.norm",
        "embedding.word_embeddings.proj": "model.embed_tokens.proj",
        "embedding.position_embeddings": "model.embed_positions",
        "decoder.final_layernorm": "model.final_norm",
        "output_layer": "lm_head",
    },
    layers="model.layers",
    in_layer={
        "input_layernorm": ("mixer_norm",),
        QKV: tuple(f"mixer.{part}_proj" for part in "qkv"),
        "self_attention.q_layernorm": ("mixer.q_norm",),
        "self_attention.k_layernorm": ("mixer.k_norm",),
        "self_attention.linear_proj": ("mixer.out_proj",),
        "self_attention.linear_fc1": ("mixer.up_proj",),
        "self_attention.linear_fc2": ("mixer.down_proj",),
        "self_attention.norm": ("mixer.gate_norm",),
        "self_attention.router.weight": ("mixer.prefix_router",),
        f"{TINY}qkv": tuple(f"mixer.tiny_attention.{part}_proj" for part in "qkv"),
        f"{TINY}proj": ("mixer.tiny_attention.out_proj",),
        "pre_mlp_layernorm": ("channel_norm",),
        "mlp.linear_fc1": ("channel.up_proj",),
        "mlp.linear_fc2": ("channel.down_proj",),
        "mlp.shared_experts.linear_fc1": ("channel.shared_experts.up_proj",),
        "mlp.shared_experts.linear_fc2": ("channel.shared_experts.down_proj",),
        "mlp.experts.experts.linear_fc1.weight": ("channel.experts.up_proj",),
        "mlp.experts.experts.linear_fc2.weight": ("channel.experts.down_proj",),
    },
    slots={"self_attention": "mixer", "mlp": "channel"},
)


@dataclass(frozen=True)
class HeadShape:
    """Layout of Megatron's fused QKV tensor: g groups of n / g queries, one key, one value."""

    groups: int
    queries: int
    """Queries of one group: n / g."""
    width: int
    """d."""

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> HeadShape:
        """Return the layout that follows from a checkpoint's model flags."""
        heads = flags["num_attention_heads"]
        groups = flags["num_query_groups"] if flags["group_query_attention"] else heads
        return cls(groups, heads // groups, flags["kv_channels"])


def _part(fused: Tensor, *, number: int, count: int, heads: HeadShape | None) -> Tensor:
    parts = split_qkv(fused, heads) if heads else fused.chunk(count)
    return parts[number].contiguous()


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


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
