"""Attention after a short convolution: the first layer mixes tokens with plugins/gated_conv.py, so
later layers need not attend to what directly precedes a token."""

from megatron_smlp.plugins import register


def layers(number: int, count: int) -> tuple[str, str]:
    return ("attention" if number else "gated_conv"), "mlp"


register.architecture("conv_first", layers=layers)
