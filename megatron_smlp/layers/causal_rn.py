"""CausalRN, causal relation networks (Cui et al., arXiv 2406.16168), in Megatron's `self_attention`
slot. The LN in front and the residual around it are the slot's.

    a = n(x W1),  b = n(x W2)                                     x = LN(input);  W1, W2: D x F
    linear      y_t = n( exp(a_t) * (1/t) sum over s <= t of exp(b_s) ) W3             W3: F x D
    quadratic   y_t = n( (1/t) sum over s <= t of exp(n(a_t + b_s)) ) W3             t = 1, 2, ...

n is LN without weights. The linear variant is the quadratic one without the inner n, whose sum then
factorises: its cost grows with T, not with T^2.

The linear one is computed as n(exp(z_t - max over features of z_t)), z_t = a_t + log of the mean:
n takes a common factor out again, so that the maximum gets no gradient.

Differences from the source (docs/decisions/0070): one head; the input's LN has weights. W3 starts
smaller by sqrt(2 layers), as all projections to the residual here; input positions are learned.

Tensor parallelism shards the F features; the sums behind n go over all ranks.

Letters: T sequence, B batch, D hidden, F --relation-width, tp tensor parallel size; F' = F / tp.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smlp.layers.norms import SumOverGroup, centred, normalised
from megatron_smlp.layers.projections import (
    check_heads,
    column_projection,
    row_projection,
    two_projections,
)
from megatron_smlp.layers.token_mixer import TokenMixer
from megatron_smlp.ops.relation_mix import WIDEST, relation_mix
from megatron_smlp.ops.running_sums import log_running_mean


def causal_rn_spec(
    config: TransformerConfig, backend: BackendSpecProvider, *, options: Any, **_: Any
) -> ModuleSpec:
    """Return the spec of a layer's CausalRN."""
    return ModuleSpec(
        module=CausalRN,
        params={
            "width": options.relation_width or config.hidden_size,
            "quadratic": options.causal_rn_kind == "quadratic",
        },
        submodules=two_projections(backend),
    )


def check_flags(args: Any) -> None:
    """Check the width and how it is cut, of Megatron's namespace.

    Raises:
        ValueError: see `check_heads`; or the quadratic one is so wide that its sums may overflow.
    """
    flag = "--relation-width" if args.relation_width else "--hidden-size"
    width = args.relation_width or args.hidden_size
    if args.causal_rn_kind == "quadratic" and width > WIDEST:
        raise ValueError(
            f"{flag} {width} with --causal-rn-kind quadratic, whose exponentials may overflow from "
            f"{WIDEST + 1} on: give --relation-width {WIDEST} or less, or --causal-rn-kind linear."
        )
    check_heads(args, "one head", 1, width=width, width_flag=flag, mixer="CausalRN")


class CausalRN(TokenMixer):
    """See the top of the file.

    Args:
        width: F.
        quadratic: whether the sum over pairs is normalised inside.
    """

    has_halves = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        layer_number: int = 1,
        *,
        width: int,
        quadratic: bool,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_attention_arguments: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.width, self.quadratic = width, quadratic
        self.split_group = self.tp_group if self.tp_group.size() > 1 else None
        self.linear_fc1 = column_projection(
            submodules.linear_fc1,
            config,
            2 * width,
            name="fc1",
            tp_group=self.tp_group,
            stride=2,  # [W1 | W2]: each half is sharded by itself
        )
        self.linear_fc2 = row_projection(
            submodules.linear_fc2, config, width, name="fc2", tp_group=self.tp_group
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: <float>[T', B, D] (normed; [T'/tp, B, D] under sequence parallel).

        Returns:
            y without the bias of W3, the same shape and dtype; the bias: [D] or None.
        """
        both, _ = self.linear_fc1(hidden_states)
        a, b = (self._normalised(part) for part in both.chunk(2, dim=-1))
        mixed = self._pairwise(a, b) if self.quadratic else self._factorised(a, b)
        return self.linear_fc2(self._normalised(mixed).to(both.dtype))

    def _normalised(self, x: Tensor) -> Tensor:
        return normalised(x, eps=self.config.layernorm_epsilon, group=self.split_group)

    def _factorised(self, a: Tensor, b: Tensor) -> Tensor:
        """Map a, b: <fp32>[T', B, F'] to exp(a) times the mean of exp(b), up to a token's
        factor."""
        exponents = a + log_running_mean(b)
        largest = exponents.detach().amax(dim=-1, keepdim=True)
        if self.split_group is not None:
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=self.split_group
            )
        return (exponents - largest).exp()

    def _pairwise(self, a: Tensor, b: Tensor) -> Tensor:
        """Map a, b: <fp32>[T', B, F'] to the mean of exp(n(a_t + b_s)), up to a factor per token.

        |a_t + b_s|^2 = |a_t|^2 + |b_s|^2 + 2 a_t b_s: the variance of a pair is a product.
        """
        a, b = (centred(part, self.split_group) for part in (a, b))
        rows, columns = (part.square().sum(-1).T for part in (a, b))
        products = torch.einsum("tbf,sbf->bts", a, b)
        squares = rows[:, :, None] + columns[:, None] + 2 * products
        if self.split_group is not None:
            squares = SumOverGroup.apply(squares, self.split_group)
        variance = (squares / self.width).clamp(min=0)
        return relation_mix(a, b, torch.rsqrt(variance + self.config.layernorm_epsilon))
