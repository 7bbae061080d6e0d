"""Checks of a feature router class on its own, in one process.

Letters: B batch, P prefix length, C chunks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_smlp.checking.rows import (
    Check,
    Row,
    checked,
    close,
    gradients,
    outside,
    registered,
    wrong,
)
from megatron_smlp.plugins import FeatureRouter, weights_of

BATCH, PREFIX, CHUNKS, EXPERTS = 3, 6, 8, 4


def checks(name: str, kind: type[FeatureRouter]) -> Iterator[Check]:
    """Yield the checks of one class."""
    for check in (_chooses, _apart, _gradients):
        yield partial(checked, check, name, kind)


def _built(kind: type[FeatureRouter]) -> FeatureRouter:
    torch.manual_seed(1)
    rule = registered(kind(num_experts=EXPERTS, prefix_length=PREFIX, values={}))
    for weight in weights_of(rule.draw()):
        torch.nn.init.normal_(weight.weight)  # initial values near 0 would hide their effect
    return rule.double()


def _means() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(BATCH, PREFIX, CHUNKS, dtype=torch.float64)


def _chooses(name: str, kind: type[FeatureRouter]) -> Row:
    """Check the shapes, and that choices are experts."""
    compared, advice = "scores: [B, P, C] -> [B, C, E]; choose and weigh: [B, C]", ""
    rule = _built(kind)
    scores = rule.scores(_means())
    experts = rule.choose(scores.detach())
    weights = rule.weigh(scores, experts)
    if scores.shape != (BATCH, CHUNKS, EXPERTS):
        advice = f"scores returns {list(scores.shape)}: give [B, C, E]"
    elif experts.dtype != torch.int64 or experts.shape != (BATCH, CHUNKS):
        advice = f"choose returns {experts.dtype} {list(experts.shape)}: give <int64>[B, C]"
    elif (other := outside(experts, EXPERTS)) is not None:
        advice = f"choose returns expert {other} of {EXPERTS}: give 0 to E - 1"
    elif weights.shape != experts.shape:
        advice = f"weigh returns {list(weights.shape)}: give [B, C]"
    return Row(subject=name, compared=compared, apart=f"{list(scores.shape)}", advice=advice)


@torch.no_grad()
def _apart(name: str, kind: type[FeatureRouter]) -> Row:
    """Check that a sample and a chunk get the same scores alone and among others."""
    rule = _built(kind).eval()
    means = _means()
    whole = rule.scores(means)
    samples = torch.cat([rule.scores(row[None]) for row in means])
    halves = torch.cat([rule.scores(part) for part in means.chunk(2, dim=-1)], dim=1)
    return close(
        name,
        "each sample alone, and halves of the chunks, as on two ranks",
        max((samples - whole).abs().max().item(), (halves - whole).abs().max().item()),
        1e-12,
        "the scores of a chunk depend on other samples or chunks: score each by itself, or the "
        "model changes with the batch and the tensor parallel size",
    )


def _gradients(name: str, kind: type[FeatureRouter]) -> Row:
    rule, means = _built(kind), _means().requires_grad_()
    experts = rule.choose(rule.scores(means).detach())

    def weights(means: Tensor, *_: Tensor) -> Tensor:
        return rule.weigh(rule.scores(means), experts)

    if not weights(means).requires_grad:
        advice = "weigh's result has no gradient: nothing would train the rule"
        return wrong(name, "weights' gradients", advice)
    return gradients(name, weights, (means, *rule.parameters()), "weigh")
