"""Triton kernels alone, one file a method. What calls them, and on what terms, is in ops/."""
