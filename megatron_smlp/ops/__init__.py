"""Operators that layers are built from, each with its reference; kernels/ has Triton kernels."""
