"""Spatial gating after a short convolution (plugins/gated_conv.py): gMLP's layers, the last two of
which have an FFN or token experts (--moe-layer-freq)."""

from megatron_smlp.plugins import register

SPARSE = 2


def layers(number: int, count: int) -> tuple[str, str]:
    if number == 0:
        return "gated_conv", "none"
    return "spatial_gating", ("mlp" if number >= count - SPARSE else "none")


register.architecture("conv_gating", layers=layers)
