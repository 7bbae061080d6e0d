"""Checks of a token router class on its own, in one process.

Letters: N tokens, D hidden, E experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_smlp.checking.rows import Check, Row, checked, close, gradients, outside, registered
from megatron_smlp.plugins import TokenRouter

TOKENS, EXPERTS, WIDTH = 24, 4, 8


def checks(name: str, kind: type[TokenRouter]) -> Iterator[Check]:
    """Yield the checks of one class."""
    for check in (_chooses, _alone, _gradients, _trains):
        yield partial(checked, check, name, kind)


def _built(kind: type[TokenRouter]) -> TokenRouter:
    torch.manual_seed(1)
    return registered(kind(num_experts=EXPERTS, values={})).draw()


def _scores(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(TOKENS, EXPERTS, dtype=dtype)


def _chooses(name: str, kind: type[TokenRouter]) -> Row:
    """Check that choices are experts, distinct in a row, and visited unless it may skip."""
    compared, advice = "choose: [N, E] -> experts [N, k]", ""
    rule = _built(kind).train()
    chosen, visited = rule.choices(_scores())
    k = chosen.shape[-1]
    if chosen.dtype != torch.int64 or chosen.dim() != 2 or len(chosen) != TOKENS:
        advice = f"choose returns {chosen.dtype} {list(chosen.shape)}: give <int64>[N, k]"
    elif (other := outside(chosen, EXPERTS)) is not None:
        advice = f"choose returns expert {other} of {EXPERTS}: give 0 to E - 1"
    elif any(len(set(row)) < k for row in chosen.tolist()):
        advice = "a token chooses an expert twice: choices must be distinct"
    elif (weights := rule.weigh(_scores(), chosen)).shape != chosen.shape:
        advice = f"weigh returns {list(weights.shape)} for {list(chosen.shape)} choices"
    elif not visited.all() and not kind.may_skip:
        advice = "tokens skip choices: set may_skip = True, or FLOPs and dispatch are wrong"
    elif k != rule.experts_per_token and not kind.may_skip:
        advice = f"a token has {k} choices: set experts_per_token = {k}, which dispatch uses"
    return Row(subject=name, compared=compared, apart=f"{list(chosen.shape)}", advice=advice)


def _alone(name: str, kind: type[TokenRouter]) -> Row:
    """Check that in evaluation a token is scored and routed the same alone and among others."""
    rule = _built(kind).eval()
    torch.manual_seed(2)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH)
    chosen, visited = rule.choices(rule.scores(hidden, weight))
    differing = 0
    for token in range(TOKENS):
        alone = rule.choices(rule.scores(hidden[token : token + 1], weight))
        rows = (chosen[token][visited[token]], alone[0][0][alone[1][0]])
        differing += sorted(rows[0].tolist()) != sorted(rows[1].tolist())
    return Row(
        subject=name,
        compared=f"{TOKENS} tokens together and each alone, evaluation",
        apart=f"{differing} differ",
        advice="in evaluation a token's experts depend on the rest of its batch, and so would "
        "its score: choose by its own scores where self.training is False" if differing else "",
    )  # fmt: skip


def _gradients(name: str, kind: type[TokenRouter]) -> Row:
    rule = _built(kind).train()
    scores = _scores(torch.float64).requires_grad_()
    chosen, _ = rule.choices(_scores())
    if not rule.weigh(scores, chosen).requires_grad:  # fixed weights, such as HASH's
        return close(name, "weights, which have no gradient", 0.0, 0.0, "")
    return gradients(name, lambda x: rule.weigh(x, chosen), (scores,), "weigh")


def _trains(name: str, kind: type[TokenRouter]) -> Row:
    """Check that the loss, if there is one, can be trained, and that a step's update runs."""
    rule = _built(kind).train()
    scores = _scores().requires_grad_()
    chosen, visited = rule.choices(scores.detach())
    loss, advice = rule.loss(scores, chosen), ""
    if loss is not None and (loss.dim() or not loss.isfinite() or not loss.requires_grad):
        advice = (
            f"loss returns {loss.detach().tolist()}: give a finite number <fp32>[] with gradient"
        )
    rule.update(chosen[visited].bincount(minlength=EXPERTS).float())
    return Row(
        subject=name,
        compared="loss: [], finite, with gradient; update after a step",
        apart="no loss" if loss is None else f"{loss.mean().item():.3g}",
        advice=advice,
    )
