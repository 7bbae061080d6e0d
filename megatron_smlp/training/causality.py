"""Checks before the first step of a new run that no layer's token mixer reads later positions.

A model that does trains without complaint and looks better than it is. Each mixer runs on two small
inputs that differ in their second half only: its output over the first half must not change. It
runs in fp32 with weights drawn for this check, since some initial weights are near zero; a plugin's
own parameters keep their values plus a small perturbation, as it may take their logarithm. Routers
that look ahead by design (BASE in training, a capacity limit) are not checked.

Letters: T tokens, B batch, D hidden.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.collectives import gathered
from megatron_smlp.errors import UsageError
from megatron_smlp.ops.triton_ready import unsaid
from megatron_smlp.training.parts import Parts

LENGTH = 16
"""Tokens per tensor parallel rank; mixers accept sequences shorter than --seq-length."""
HOSTED_LENGTH = 256
"""Tokens for a plugin's mixer, which may work in chunks."""
DEVIATION = 0.2
"""Standard deviation of the weights that are drawn."""
MOVED = 0.1
"""Standard deviation of the perturbation of a plugin's own parameters."""
TOLERANCE = 1e-3
"""Largest change, as a share of the outputs' scale, that counts as rounding."""


def check_causality(parts: Parts) -> None:
    """Check every layer of this run. Collective.

    Raises:
        UsageError: one reads later positions or outputs non-finite numbers; on every rank.
    """
    if parts.args.tp_comm_overlap:
        return  # its buffers fit only the run's own shapes and dtypes
    # Transformer Engine's attention does not support fp32.
    has_engine = parts.args.transformer_impl != "local"
    layers = [
        (layer, getattr(chunk, "rotary_pos_emb", None))
        for chunk in unwrap_model(parts.model)
        for layer in chunk.decoder.layers
        if not (has_engine and isinstance(layer.self_attention, Attention))
    ]
    with unsaid():  # the kernels do not run in fp32
        leaks = [
            leak
            for layer, rotary in layers
            for leak in _leaks(layer, _length(layer, parts.args), rotary)
        ]
    if every := [leak for rank in gathered(leaks) for leak in rank]:
        raise UsageError(every[0])


def _length(layer: SlottedLayer, args: argparse.Namespace) -> int:
    ranks = args.tensor_model_parallel_size
    per_rank = HOSTED_LENGTH // ranks if hasattr(layer.self_attention, "mixer") else LENGTH
    return min(int(args.seq_length), per_rank * ranks)


def _leaks(layer: SlottedLayer, length: int, rotary: Any) -> Iterator[str]:
    """Yield a message for what is wrong with a layer's mixer, if anything."""
    half = length // 2 | 1  # odd: no chunk of a mixer begins there
    # Do not advance the run's generators, which its dropout and data draw from.
    generator = torch.Generator().manual_seed(layer.layer_number)
    first, other = torch.randn(2, length, 1, layer.config.hidden_size, generator=generator)
    other[:half] = first[:half]
    drawn = _drawn(layer.self_attention, generator)
    outputs = [_mixed(layer, drawn, x, rotary) for x in (first, other)]
    change = (outputs[0] - outputs[1]).abs().amax(dim=(1, 2))
    scale = float(outputs[0].abs().max())
    early = change[: max(0, half - _place(layer)[0] * len(change))]  # of this rank's positions
    mixer = layer.self_attention
    kind = type(getattr(mixer, "mixer", mixer)).__name__  # for a plugin, its own class
    named = f"layer {layer.layer_number} ({kind})"
    if not all(output.isfinite().all() for output in outputs):
        yield (
            f"{named} returns non-finite values for ordinary inputs: correct the mixer, or the "
            "initial values of its parameters."
        )
    elif len(early) and float(early.max()) > TOLERANCE * scale:
        yield (
            f"{named} reads later positions: changing inputs from position {half} on changes its "
            f"earlier output by {float(early.max()):.2g}, of {scale:.2g}: a language model that "
            "sees its targets learns nothing. Correct the mixer to read positions up to its own "
            "only."
        )


def _drawn(mixer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return fp32 weights by name, and the buffers with their own values; ranks with equal shapes
    draw equal weights."""
    drawn: dict[str, Tensor] = {}
    is_hosted = hasattr(mixer, "mixer")
    for name, parameter in mixer.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if is_hosted and name.startswith("mixer."):
            values = parameter.detach().float().cpu() + MOVED * values
        else:
            values *= DEVIATION
        drawn[name] = values.to(parameter.device)
    for name, buffer in mixer.named_buffers():
        drawn[name] = buffer.float() if buffer.is_floating_point() else buffer
    return drawn


def _mixed(layer: SlottedLayer, drawn: dict[str, Tensor], x: Tensor, rotary: Any) -> Tensor:
    """Run the mixer. x: <fp32>[T, B, D], alike on all ranks -> output at this rank's positions."""
    mixer = layer.self_attention
    rank, ranks = _place(layer)
    own = x.chunk(ranks)[rank].to(next(iter(drawn.values())).device)
    rotated = {"rotary_pos_emb": rotary(len(x))} if rotary is not None else {}
    was_training = mixer.training
    mixer.eval()
    try:
        with torch.no_grad():
            output = torch.func.functional_call(
                mixer, drawn, (own,), {"attention_mask": None, **rotated}
            )
    finally:
        mixer.train(was_training)
    mixed, bias = output
    return (mixed if bias is None else mixed + bias).float().cpu()


def _place(layer: SlottedLayer) -> tuple[int, int]:
    """Return this rank, and the number of ranks that sequence parallelism splits positions over."""
    if not layer.config.sequence_parallel:
        return 0, 1
    return layer.pg_collection.tp.rank(), layer.pg_collection.tp.size()
