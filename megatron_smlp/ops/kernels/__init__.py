"""Only Triton kernels, one file per method. What calls them, and when, is in ops/."""
