"""Sparse all-MLP language models (arXiv 2203.06850) and their baselines on Megatron-Core."""

__version__ = "0.1.0"
