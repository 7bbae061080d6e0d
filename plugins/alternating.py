"""Attention and spatial gating in alternation: the package's layers in a custom order."""

from megatron_smlp.plugins import register


def layers(number: int, count: int) -> tuple[str, str]:
    return ("spatial_gating", "none") if number % 2 else ("attention", "mlp")


register.architecture("alternating", layers=layers)
