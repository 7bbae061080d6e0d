"""Token MoE (tMoE): Megatron-Core's MoELayer with FFN experts, in the `mlp` slot.

    y = sum over the chosen experts e of  w_e * f_e(h)  + f(h),     f_e(h) = GELU(h A_e) B_e,
    h = LN(x),  f the shared expert (--moe-shared-expert-intermediate-size), if there is one

The router chooses e and w_e, from h as in the papers of Switch and GShard, or from x as in BASE's
(routers/base.py). It plugs into MoELayer's router slot; dispatch (token_dispatch.py), expert
parallelism and experts build on Megatron's. Experts and routers have no bias, as in the equations:
w_e would scale an expert's bias too.

Letters: n tokens that reached the experts of this rank, D hidden, Z moe_ffn_hidden_size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_smlp.layers.projections import await_parameters, two_projections
from megatron_smlp.layers.token_dispatch import replace_dispatcher

_LOGGER = logging.getLogger(__name__)

ROWS = 64
"""An expert's rows are padded to a multiple of this on a CPU, in 16 bits."""


def token_moe_builder(
    config: TransformerConfig, backend: BackendSpecProvider, *, router: Any = TopKRouter
) -> Any:
    """Return a builder for the `mlp` slot.

    Args:
        router: fills MoELayer's router slot; called with config, pg_collection, is_mtp_layer.
            Defaults to Megatron's, as under a bare `--spec` in its own script.
    """
    submodules = MoESubmodules(
        experts=partial(_experts, backend.grouped_mlp_modules(config.moe_grouped_gemm)),
        router=partial(_router, router),
        shared_experts=partial(_shared_experts, two_projections(backend)),
    )
    skips = getattr(router, "draws", False) or getattr(router, "skips", False)
    return partial(_layer, submodules, skips)


def _layer(
    submodules: MoESubmodules, skips: bool, *, config: TransformerConfig, **kwargs: Any
) -> MoELayer:
    if config.cuda_graph_impl != "none":
        # Layers that route are in no CUDA graph; the dispatcher must not wait as if they were.
        config = copy.copy(config)
        config.cuda_graph_impl = "none"
    if skips or _has_capacity(config):
        # From an expert capacity, Megatron's dispatcher infers that not every token is sent k
        # times. Only Megatron's top-k router would drop tokens by it.
        config = copy.copy(config)
        config.moe_expert_capacity_factor = float(config.num_moe_experts)
    kind = ResidualRoutedMoELayer if _routes_on_residual(config) else MoELayer
    layer = kind(config, submodules=submodules, **kwargs)
    if isinstance(layer.experts, Experts) and getattr(config, "token_dispatch", "") != "megatron":
        replace_dispatcher(layer, kwargs["pg_collection"])
    return layer


def _routes_on_residual(config: TransformerConfig) -> bool:
    """Return whether the router reads x instead of h."""
    is_base = getattr(config, "token_router", "none") == "base"
    return is_base and getattr(config, "base_routing_input", "residual") == "residual"


class ResidualRoutedMoELayer(MoELayer):
    """A layer that is called with x: its router reads x, its experts, the shared one too, read h.

    The norm stays where all layers, and their checkpoints, have it: SlottedLayer lends it.
    """

    norm: Callable[[Tensor], Tensor]

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pass h to the dispatcher, after routing; hidden_states: <float>[T or T / TP, B, D]"""
        return super().preprocess(self.norm(hidden_states), probs, routing_map)

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """hidden_states: <float>[T or T / TP, B, D] -> f(h), or None."""
        if self.use_shared_expert:
            hidden_states = self.norm(hidden_states)
        shared: Tensor | None = super().shared_experts_compute(hidden_states)
        return shared


def _has_capacity(config: TransformerConfig) -> bool:
    """Return whether the router drops tokens that find no slot at their expert."""
    factors = ("moe_train_capacity_factor", "moe_eval_capacity_factor")
    return any(getattr(config, name, None) is not None for name in factors)


class Experts(SequentialMLP):
    """Megatron's experts with w_e applied to all their outputs at once.

    Megatron multiplies each expert's hidden layer by w_e, in fp32. Without a bias the result is the
    same, but it scales Z / D times as many elements, and saves both copies for the backward.

    On a GPU all experts run as two grouped GEMMs, which read on the device where each group ends;
    elsewhere, and where these cannot be used, the experts run one after another.
    """

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, None]:
        """hidden_states: <float>[n, D], sorted by expert; tokens_per_expert: <int>[experts of this
        rank], sum n, on either device; weights: <fp32>[n], w_e, or None if the dispatcher
        scales the outputs.

        Returns:
            w_e f_e(h): <float>[n, D] (a partial sum, if experts are tensor parallel); and
            None in place of a bias.
        """
        compute = self.grouped if self.groups_on_device(hidden_states) else self.one_by_one
        output = compute(hidden_states, tokens_per_expert)
        if weights is not None:
            output = (output * weights.unsqueeze(-1)).to(output.dtype)
        return output, None

    def groups_on_device(self, hidden_states: Tensor) -> bool:
        """Return whether the products of these tokens read the ends of groups on the device."""
        return hidden_states.is_cuda and not self.cannot_group(hidden_states.dtype)

    def one_by_one(self, hidden_states: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Return f_e(h): <float>[n, D]; the reference for `grouped`."""
        groups = hidden_states.split(tokens_per_expert.tolist())
        outputs = [
            expert(_padded(group))[0][: len(group)]
            for expert, group in zip(self.local_experts, groups, strict=True)
        ]
        return torch.cat(outputs)

    def grouped(self, hidden_states: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Return f_e(h): <float>[n, D], by two grouped GEMMs.

        Where no token reaches a rank, there may be no kernel. It then pads instead of falling back
        to `one_by_one`: all ranks of a group must produce their gradients in the same order.
        """
        if len(hidden_states) == 0:
            rows = functional.pad(hidden_states, (0, 0, 0, len(self.local_experts)))
            return self.grouped(rows, torch.ones_like(tokens_per_expert))[:0]
        counts = tokens_per_expert.to(hidden_states.device, non_blocking=True)
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = self._product(hidden_states, "linear_fc1", ends)
        return self._product(self._activated(hidden), "linear_fc2", ends)

    def _activated(self, hidden: Tensor) -> Tensor:
        """Activate the first product as Megatron's MLP does: <float>[n, Z] from [n, Z], or from
        [n, 2 Z] with --swiglu."""
        config = self.config
        activate: Callable[[Tensor], Tensor] = config.activation_func
        if not config.gated_linear_unit:
            return activate(hidden)
        if config.bias_activation_fusion and activate is functional.silu:
            return bias_swiglu_impl(hidden, None, config.activation_func_fp8_input_store, False)
        gate, linear = hidden.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
        return activate(gate) * (linear + config.glu_linear_offset)

    def _product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """x: <float>[n, in]; ends: <int32>[experts] -> <float>[n, out].

        The backward stacks the weights again: a saved copy would be as large as all experts of this
        rank, for each micro-batch in flight.
        """
        layers = [getattr(expert, name) for expert in self.local_experts]
        for layer in layers:
            await_parameters(layer)
        weights = [layer.weight for layer in layers]
        stacked = torch.stack(weights)  # [experts, out, in]
        if _leaves_empty_groups_undefined(x) and stacked.requires_grad:
            has_tokens = ends.diff(prepend=ends.new_zeros(1)) > 0
            stacked.register_hook(partial(torch.where, has_tokens[:, None, None], other=0.0))
        strides = stacked.stride()  # not the tensor itself: the graph keeps both functions

        def pack(kept: Tensor) -> Tensor | bool:
            # Of the saved x, ends and stack, only the stack has three dimensions.
            return kept.stride() == strides if kept.dim() == 3 else kept

        def unpack(kept: Tensor | bool) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            again = torch.stack([weight.detach() for weight in weights])
            return again if kept else again.mT

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            product: Tensor = functional.grouped_mm(x, stacked.mT, offs=ends)
        return product

    def cannot_group(self, dtype: torch.dtype) -> str:
        """Return why grouped GEMMs cannot run, or an empty string; log each reason once."""
        expert = self.local_experts[0]
        weight, width = expert.linear_fc1.weight, expert.linear_fc2.weight.shape[1]
        reason = ""
        if dtype != torch.bfloat16 or weight.dtype != dtype:
            reason = f"grouped GEMMs are for bfloat16, not {dtype} with weights in {weight.dtype}"
        elif width % 8 or weight.shape[1] % 8:
            sizes = f"{weight.shape[1]} and {width}"
            reason = f"grouped GEMMs need widths divisible by 8, not {sizes}"
        elif not _has_grouped_kernels():
            reason = "torch has grouped GEMM kernels only for compute capability 9 and 10"
        if reason:
            _say_once(reason)
        return reason


def _padded(group: Tensor) -> Tensor:
    """Pad the rows with zeros to a multiple of ROWS: <float>[n or more, D].

    In 16 bits a CPU's library (oneDNN) compiles a kernel for each new number of rows, which takes
    several times as long as the product, and caches the last thousand. Loads differ at every step.
    """
    if group.is_cuda or group.dtype.itemsize != 2:
        return group
    return functional.pad(group, (0, 0, 0, -len(group) % ROWS))


def _has_grouped_kernels() -> bool:
    """Return whether grouped GEMMs are kernels that read the ends of groups on the device.

    Elsewhere torch runs one product per group, and waits for the ends six times per layer.
    """
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in (9, 10)


def _leaves_empty_groups_undefined(x: Tensor) -> bool:
    """Return whether the gradient of an expert without tokens is undefined, as on Blackwell
    (https://github.com/pytorch/pytorch/issues/172439)."""
    return x.is_cuda and torch.cuda.get_device_capability()[0] == 10


@cache
def _say_once(reason: str) -> None:
    _LOGGER.warning("experts run one after another, and slower: %s.", reason)


def _experts(builder: Any, num_local_experts: int, config: TransformerConfig, **kwargs: Any) -> Any:
    # FP8 pads each expert's tokens and their weights, which is left to Megatron's own experts.
    if builder.func is SequentialMLP and not (config.fp8 or config.fp4):
        builder = partial(Experts, **builder.keywords)
    others = config.num_moe_experts - num_local_experts
    if not (others and config.use_cpu_initialization and config.perform_initialization):
        return builder(num_local_experts, _without_bias(config), **kwargs)
    # The CPU generator is the same on all ranks: without drawing the others' experts too, each rank
    # would have the experts of the first one.
    before = kwargs["pg_collection"].ep.rank() * num_local_experts
    _draw_experts(before, config)
    experts = builder(num_local_experts, _without_bias(config), **kwargs)
    _draw_experts(others - before, config)
    return experts


def _draw_experts(count: int, config: TransformerConfig) -> None:
    """Draw the weights of other ranks' experts, as Megatron draws its own, and discard them."""
    width = config.moe_ffn_hidden_size * (2 if config.gated_linear_unit else 1)
    for _ in range(count):
        config.init_method(torch.empty(width, config.hidden_size, device="cpu"))
        config.output_layer_init_method(
            torch.empty(config.hidden_size, config.moe_ffn_hidden_size, device="cpu")
        )


def _router(builder: Any, *, config: TransformerConfig, **kwargs: Any) -> Any:
    return builder(config=_without_bias(config), **kwargs)


def _shared_experts(
    submodules: MLPSubmodules, *, config: TransformerConfig, **kwargs: Any
) -> SharedExpertMLP:
    return SharedExpertMLP(_without_bias(config), submodules=submodules, **kwargs)


def _without_bias(config: TransformerConfig) -> TransformerConfig:
    copied = copy.copy(config)
    copied.add_bias_linear = False
    return copied
