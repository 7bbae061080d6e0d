"""Turn a dense model's weights into those of a sparse one that computes the same function.

Every expert starts as a copy, and the router is new. docs/decisions/0033 derives what follows.

    router   weight of the chosen expert at the start      copies are multiplied by
    switch   max softmax(h W) = 1/E                        E
    base     sigmoid(h w_e) = 1/2                          2
    gshard   g1 / (g1 + g2) + g2 / (g1 + g2) = 1           1
    hash     1                                             1

W is drawn so small that these weights hold to 1e-4; which expert a token chooses depends on its
direction alone.

Experts have no bias; a dense FFN may have one. LN's output x^ sums to zero over the D features, so
with a norm of weight 1 and bias 1 (before: a, c) the sum of h' = x^ + 1 is D for every token:

    A (a x^ + c) + b  =  (A a + (A c + b - A a 1) 1' / D) h'

and one more hidden unit, which is the same for every token, carries the output's bias.

Letters: D hidden, Z dense FFN width, X expert width, E experts, T tokens, h spatial heads.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Spec, main_dtype
from megatron_smlp.conversion.recipes import Plan, Recipe, same
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.defaults import AUX_LOSS_COEFF
from megatron_smlp.routers.hash_table import random_table
from megatron_smlp.systems import (
    ARCHITECTURES,
    FEATURE_ROUTERS,
    TOKEN_ROUTERS,
    experts_of_a_token,
)

EXTRA_WIDTH = 8
"""Hidden units beyond those of the dense FFN; one of them carries its bias."""
ROUTER_SCORE = {"norm": 1e-4, "residual": 1e-6}
"""Standard deviation of a router's scores for features of variance 1, by what it reads; features of
a residual stream are larger."""
STD = 0.02
SEED = 20220314


def target_flags(flags: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sparse model's flags.

    Args:
        flags: the dense model's.
        changes: flags of the new model from the command line.

    Raises:
        UsageError: the source is already sparse, or cannot become such a model.
    """
    if flags["token_router"] != "none" or flags["architecture"] == "smlp" or flags["num_experts"]:
        raise UsageError("--upcycle: the checkpoint's model is already sparse.")
    target = {**flags, **changes}
    pair = flags["architecture"], target["architecture"]
    if pair[0] != pair[1] and pair != ("gmlp", "smlp"):
        raise UsageError(
            f"--architecture {pair[1]} cannot be made from {pair[0]}; gmlp can become smlp; any "
            "architecture gets token experts by --token-router."
        )
    if target["token_router"] == "none" and target["feature_router"] == "none":
        raise UsageError("--upcycle: give --token-router, or --architecture smlp --feature-router.")
    if target["token_router"] != "none":
        _add_experts(target)
    _check_spatial(flags, target)
    return target


def _add_experts(target: dict[str, Any]) -> None:
    if not target["num_experts"]:
        raise UsageError(f"--token-router {target['token_router']} requires --num-experts.")
    if TOKEN_ROUTERS[target["token_router"]].upcycling_scale is None:
        known = ", ".join(name for name, rule in TOKEN_ROUTERS.items() if rule.upcycling_scale)
        raise UsageError(
            f"--token-router {target['token_router']} cannot be made from a dense model: its "
            f"weights depend on scores that start at random; give one of {known}."
        )
    architecture, count = ARCHITECTURES[target["architecture"]], target["num_layers"]
    layers = architecture.layers or (lambda *_: ("", architecture.channel))
    has_ffn = any(layers(number, count)[1] == "mlp" for number in range(count))
    has_bias = has_ffn and target["add_bias_linear"]
    if has_bias and target["normalization"] != "LayerNorm":
        raise UsageError(
            f"--normalization {target['normalization']} and biases: experts have no bias, and "
            "only LayerNorm's zero sum can carry one."
        )
    if target["swiglu"] and has_ffn:
        raise UsageError("--swiglu: only GELU models can be upcycled.")
    dense = target["ffn_hidden_size"]
    fewest = dense + has_bias if has_ffn else 1
    default = dense + EXTRA_WIDTH * has_bias
    width = target["moe_ffn_hidden_size"] = target["moe_ffn_hidden_size"] or default
    if width < fewest:
        raise UsageError(
            f"--moe-ffn-hidden-size {width}: the dense FFN has {dense} units"
            f"{' and a bias, which takes one more' if has_bias else ''}; give {fewest} or more."
        )
    target["moe_router_topk"] = experts_of_a_token(target["token_router"], topk=1)
    # The values of a run that is not given them.
    has_loss = TOKEN_ROUTERS[target["token_router"]].has_balance_loss
    target["moe_aux_loss_coeff"] = AUX_LOSS_COEFF if has_loss else 0.0
    target["moe_router_load_balancing_type"] = "aux_loss" if has_loss else "none"
    target["moe_token_drop_policy"] = "position"


def _check_spatial(flags: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    heads, experts = flags["spatial_heads"], target["num_feature_experts"]
    rule = FEATURE_ROUTERS.get(target["feature_router"])
    if rule and rule.plugin:
        raise UsageError(
            f"--feature-router {target['feature_router']}: a plugin's rule cannot be started from "
            "a dense model; give deterministic or partial."
        )
    if target["feature_router"] == "partial" and heads > 1:
        raise UsageError(
            f"--feature-router partial: any chunk may choose any expert, so all experts start as "
            f"one matrix, but this model has {heads} (--spatial-heads): use deterministic."
        )
    if target["feature_router"] != "none" and experts % heads:
        raise UsageError(
            f"--num-feature-experts {experts}: give a multiple of the dense model's "
            f"--spatial-heads {heads}, whose matrices are copied."
        )


def why_not_exact(flags: Mapping[str, Any], target: Mapping[str, Any]) -> str | None:
    """Return why the sparse model's loss starts at another value; None if it does not."""
    if target["feature_router"] == "none":
        return None
    chunks = target["num_feature_chunks"] or target["num_feature_experts"]
    if chunks == flags["spatial_heads"]:
        return None
    return (
        f"the gate's LayerNorm is over each of {chunks} chunks now, and was over each of "
        f"{flags['spatial_heads']} heads"
    )


def plan(
    source: Mapping[str, Spec],
    expected: Mapping[str, tuple[int, ...]],
    target: Mapping[str, Any],
) -> Plan:
    """Return recipes for the sparse model's tensors, `expected`, from the dense model's."""
    recipes = _Recipes(source, expected, target, main_dtype(source))
    return {name: recipes.of(name) for name in expected}


@dataclass(frozen=True)
class _Recipes:
    source: Mapping[str, Spec]
    expected: Mapping[str, tuple[int, ...]]
    target: Mapping[str, Any]
    dtype: torch.dtype

    def of(self, name: str) -> Recipe:
        layer = ".".join(name.split(".")[:3]) + "."
        part = name.removeprefix(layer)
        if part.startswith("mlp.router."):
            return self._router(name)
        if part.startswith("mlp.experts."):
            return self._experts(name, layer)
        if part.startswith("pre_mlp_layernorm."):
            return self._norm(name, layer)
        if part.startswith("self_attention.router.") and name not in self.source:
            return self._drawn(name, std=ROUTER_SCORE["norm"] / math.sqrt(self.expected[name][0]))
        if part.startswith("self_attention.spatial."):
            heads, experts = self.source[name].shape[0], self.expected[name][0]
            return Recipe((name,), same if heads == experts else partial(_copied, experts=experts))
        return Recipe((name,), same)

    def _router(self, name: str) -> Recipe:
        shape = self.expected[name]
        if name.endswith(".table"):
            return Recipe((), partial(_table, self.target))
        if name.endswith(".prices"):
            return Recipe((), partial(torch.zeros, shape))
        is_base = self.target["token_router"] == "base"
        score = ROUTER_SCORE[self.target["base_routing_input"] if is_base else "norm"]
        make = partial(_router, shape=shape, dtype=self.dtype, score=score, seed=_seed(name))
        return Recipe((), make)

    def _experts(self, name: str, layer: str) -> Recipe:
        shape, is_first = self.expected[name], "linear_fc1" in name
        ffn, norm = f"{layer}mlp.linear_fc{1 if is_first else 2}.", f"{layer}pre_mlp_layernorm."
        if f"{ffn}weight" not in self.source:  # there was no FFN: the experts add nothing yet
            return self._drawn(name, std=STD if is_first else 0.0)
        names: tuple[str, ...] = (f"{ffn}weight", f"{ffn}bias")
        if is_first:
            names += (f"{norm}weight", f"{norm}bias")
            make = partial(_expert_fc1, shape=shape, seed=_seed(name))
        else:
            scale_of = TOKEN_ROUTERS[self.target["token_router"]].upcycling_scale
            assert scale_of is not None, "refused before"
            make = partial(
                _expert_fc2, shape=shape, scale=scale_of(shape[0]), unit=_unit(self.target)
            )
        return Recipe(names if f"{ffn}bias" in self.source else names[:1], make)

    def _norm(self, name: str, layer: str) -> Recipe:
        becomes_moe = f"{layer}mlp.experts.experts.linear_fc1.weight" in self.expected
        if f"{layer}mlp.linear_fc1.weight" not in self.source:
            value = float(name.endswith("weight"))
        elif f"{layer}mlp.linear_fc1.bias" in self.source and becomes_moe:
            value = 1.0
        else:
            return Recipe((name,), same)
        return Recipe((), partial(torch.full, self.expected[name], value, dtype=self.dtype))

    def _drawn(self, name: str, *, std: float) -> Recipe:
        shape = self.expected[name]
        return Recipe((), partial(_normal, shape, self.dtype, std=std, seed=_seed(name)))


def _seed(name: str) -> int:
    return SEED + zlib.crc32(name.encode())


def _unit(flags: Mapping[str, Any]) -> float:
    """Return the activation function's value at 1."""
    from megatron_smlp.model import activation

    return float(activation(flags)(torch.ones((), device="cpu", dtype=torch.float64)))


def _copied(heads: Tensor, *, experts: int) -> Tensor:
    """Copy heads, [h, ...] -> [E, ...]: each makes E / h adjacent experts."""
    return heads.repeat_interleave(experts // len(heads), dim=0)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, *, std: float, seed: int) -> Tensor:
    values = torch.zeros(shape, dtype=dtype)
    if std and not values.is_meta:
        values.normal_(std=std, generator=torch.Generator().manual_seed(seed))
    return values


def _router(*, shape: tuple[int, ...], dtype: torch.dtype, score: float, seed: int) -> Tensor:
    """Draw rows that sum to zero: what all tokens have in common favors no expert."""
    steps = torch.finfo(dtype)
    least = 4 * steps.smallest_normal * steps.eps  # fp16 rounds smaller values to zeros
    std = max(score / math.sqrt(shape[1]), least)
    weight = _normal(shape, torch.float32, std=std, seed=seed)
    return (weight - weight.mean(dim=1, keepdim=True)).to(dtype)


def _table(flags: Mapping[str, Any]) -> Tensor:
    with torch.device("cpu"):
        return random_table(
            num_experts=flags["num_experts"],
            vocab_size=flags["padded_vocab_size"],
            seed=flags["hash_seed"],
        )


def _expert_fc1(weight: Tensor, *biased: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """weight: <float>[Z, D]; biased: b [Z], a [D], c [D]. Returns <float>[E, X, D]."""
    dense = len(weight)
    # Rows beyond those of the dense FFN start at random and do not reach the output yet.
    rows = _normal(shape[1:], weight.dtype, std=STD, seed=seed).to(weight.device)
    rows[:dense] = _folded(weight, *biased).to(weight.dtype) if biased else weight
    if biased:
        rows[dense] = 1 / weight.shape[1]
    return rows.expand(shape).contiguous()


def _folded(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    whole = weight.double()
    scaled = whole * norm_weight.double()
    constant = whole @ norm_bias.double() + bias.double() - scaled.sum(dim=1)
    return scaled + constant[:, None] / weight.shape[1]


def _expert_fc2(
    weight: Tensor, *biased: Tensor, shape: tuple[int, ...], scale: float, unit: float
) -> Tensor:
    """weight: <float>[D, Z]; biased: [D]. Returns <float>[E, D, X]."""
    dense = weight.shape[1]
    columns = weight.new_zeros(shape[1:])
    columns[:, :dense] = weight * scale
    for bias in biased:
        columns[:, dense] = bias * (scale / unit)
    return columns.expand(shape).contiguous()
