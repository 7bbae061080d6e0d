"""Parameters and FLOPs of a plugin's mixer: counted on the meta device, where it runs once."""

from __future__ import annotations

from typing import Any

from megatron_smlp.accounting.costs import Cost, ModelShape, column, norm_cost, row


def plugin_cost(shape: ModelShape, kind: Any) -> Cost:
    """Return the cost of a slot with a mixer of this class: norm, projections, and between them
    what torch counts, or what the class's `cost` says.

    Raises:
        ValueError: it cannot run without numbers, and does not say what it costs.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_smlp.plugins import Weight, options_of

    values = {name: shape.plugin_values[name] for name in options_of(kind)}
    features = kind.features(
        hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size, values=values
    )
    outputs = sum(kind.inner.values())
    with torch.device("meta"):
        mixer = kind(width=features, length=shape.seq_length, values=values)
        inner = [
            torch.empty(1, shape.seq_length, features, *([n] if n > 1 else []), requires_grad=True)
            for n in kind.inner.values()
        ]
    kept: dict[int, int] = {id(tensor.untyped_storage()): 0 for tensor in mixer.parameters()}

    def keep(tensor: Any) -> Any:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.numel())
        return tensor

    counter = FlopCounterMode(display=False)
    for tensor in mixer.parameters():
        kept[tensor.untyped_storage()._cdata] = 0
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
            mixer(*inner)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{kind.__name__}.forward cannot run on the meta device, where its FLOPs are counted "
            f"({' '.join(str(error).split())[:150]}): make tensors on the device of its inputs."
        ) from error
    flops = square = counter.get_total_flops()
    if said := kind.cost(features=features, length=shape.seq_length, values=values):
        flops, square = said
    weights = [module for module in mixer.modules() if isinstance(module, Weight)]
    cut = sum(it.weight.numel() for it in weights if it.cut is not None and not kind.whole)
    every = sum(it.weight.numel() for it in weights) - cut
    numbers = (sum(kept.values()) + (outputs + 1) * features) // shape.seq_length
    return (
        norm_cost(shape)
        + column(shape, outputs * features)
        + row(shape, features)
        + Cost(sharded=cut, replicated=every, summed=0 if kind.whole else every)
        + Cost(flops=flops, above_flops=square - flops)
        + Cost(**{"kept_everywhere" if kind.whole else "kept": numbers})
    )
