"""Operators that layers are made of, each with its slow twin; kernels/ has the Triton ones."""
