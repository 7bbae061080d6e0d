"""How the C library keeps memory that is freed."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def give_large_blocks_back() -> None:
    """Let glibc return every block of a megabyte or more to the system when it is freed.

    Otherwise it raises that size to 32 MB by itself, and keeps some of what tensors took.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
