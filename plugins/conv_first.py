"""Attention behind a short convolution: the first layer mixes tokens by plugins/gated_conv.py, so
that later ones need not attend for what stands just before a token."""

from megatron_smlp.plugins import register


def layers(number: int, count: int) -> tuple[str, str]:
    return ("attention" if number else "gated_conv"), "mlp"


register.architecture("conv_first", layers=layers)
