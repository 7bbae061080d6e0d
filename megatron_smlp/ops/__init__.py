"""Operators that layers are made of, each with its reference; kernels/ has the Triton ones."""
