"""Attention and spatial gating in turns: layers of the package in an order of one's own."""

from megatron_smlp.plugins import register


def layers(number: int, count: int) -> tuple[str, str]:
    return ("spatial_gating", "none") if number % 2 else ("attention", "mlp")


register.architecture("alternating", layers=layers)
