"""Count the parameters and FLOPs of a plugin's mixer by running it once on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_smlp.accounting.costs import Cost, ModelShape, column, norm_cost, row

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_smlp.plugins import FeatureRouter, Mixer, TokenRouter


class Counted(NamedTuple):
    """The cost of a mixer's forward pass over one sequence."""

    mixer: Mixer
    """The mixer on the meta device, without values."""
    flops: int
    """FLOPs of its products as torch counts them, in full squares."""
    above: int
    """The part of them above the diagonals of `causal_product`."""
    kept: int
    """Elements saved for the backward pass, excluding parameters."""


def counted(kind: type[Mixer], *, features: int, length: int, values: Mapping[str, Any]) -> Counted:
    """Run a mixer on the meta device and count its cost."""
    import torch

    from megatron_smlp.plugins import masked_product, mix

    with torch.device("meta"):
        mixer = kind(width=features, length=length, values=values)
        projected = [
            torch.empty(1, length, outputs * features, requires_grad=True)
            for outputs in kind.inner.values()
        ]
    above = 0

    def product(weight: Tensor, columns: Tensor) -> Tensor:
        nonlocal above
        above += columns.numel() * (len(weight) - 1)
        return masked_product(weight, columns)

    mixer.causal_product = product
    parameters = {parameter.untyped_storage()._cdata for parameter in mixer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flops = _flops(f"{kind.__name__}.forward", lambda: mix(mixer, projected))
    numbers = sum(count for storage, count in kept.items() if storage not in parameters)
    return Counted(mixer, flops, above, numbers)


def feature_router_cost(shape: ModelShape, kind: type[FeatureRouter], *, num_experts: int) -> Cost:
    """Return the cost of a plugin's rule scoring all chunks; every rank holds the whole rule."""
    import torch

    with torch.device("meta"):
        rule = kind(
            num_experts=num_experts,
            prefix_length=shape.prefix_length,
            values=values_of(shape, kind),
        )
        means = torch.empty(1, shape.prefix_length, shape.num_feature_chunks)
    flops = _flops(f"{kind.__name__}.scores", lambda: rule.scores(means))
    parameters = sum(parameter.numel() for parameter in rule.parameters())
    return Cost(replicated=parameters, summed=parameters, flops=flops)


def token_rule_parameters(shape: ModelShape, kind: type[TokenRouter]) -> int:
    """Return the number of parameters of a plugin's token router besides W."""
    values = values_of(shape, kind) | {"moe_router_topk": shape.moe_router_topk}
    rule = kind(num_experts=shape.num_experts, values=values)
    return sum(parameter.numel() for parameter in rule.parameters())


def values_of(shape: ModelShape, kind: type) -> dict[str, Any]:
    """Return the values of a class's options."""
    from megatron_smlp.plugins import options_of

    return {name: shape.plugin_values[name] for name in options_of(kind)}


def _flops(what: str, run: Callable[[], Any]) -> int:
    """Call `run` on the meta device and return the FLOPs that torch counts.

    Raises:
        ValueError: it cannot run without values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            run()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{what} cannot run on the meta device, where its FLOPs are counted "
            f"({' '.join(str(error).split())[:150]}): make tensors on the device of its inputs, "
            "and read no values from them (.item(), .tolist(), a kernel)."
        ) from error
    return counter.get_total_flops()


def plugin_cost(shape: ModelShape, kind: type[Mixer]) -> Cost:
    """Return the cost of a slot with a mixer of this class: norm, projections, and in between what
    torch counts or what the class's `cost` returns."""
    from megatron_smlp.plugins import weights_of

    values = values_of(shape, kind)
    features = kind.features(
        hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size, values=values
    )
    sizes: dict[str, Any] = {"features": features, "length": shape.seq_length, "values": values}
    mixer, square, above, kept = counted(kind, **sizes)
    flops, square = kind.cost(**sizes) or (square - above, square)
    weights = weights_of(mixer)
    cut = sum(it.weight.numel() for it in weights if it.cut is not None and not kind.whole)
    every = sum(it.weight.numel() for it in weights) - cut
    # The output projection saves its input, the mixed features.
    numbers = kept // shape.seq_length + features
    return (
        norm_cost(shape)
        + column(shape, sum(kind.inner.values()) * features)
        + row(shape, features)
        + Cost(sharded=cut, replicated=every, summed=0 if kind.whole else every)
        + Cost(flops=flops, above_flops=square - flops)
        + Cost(**{"kept_everywhere" if kind.whole else "kept": numbers})
    )
