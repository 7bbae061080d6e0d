"""Keeps freed memory in the process, for training on a CPU.

glibc gives large blocks back to the kernel when they are freed, and fetches them again, page by
page and filled with zeros, at the next step. A training step frees and allocates the same
activations and gradients each time, and a tenth or more of it was page faults. CUDA's caching
allocator does the same for a GPU. Resident memory stays at its peak; the next step needs it anyway.
"""

from __future__ import annotations

import ctypes
import sys

# The numbers of glibc's <malloc.h>, for mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1
GROW_BY = 64 << 20  # bytes that the heap grows by: fewer calls to the kernel


def keep_freed_memory() -> bool:
    """Tell the C library's allocator to keep what it has; returns whether there is one that can.

    It needs Linux with glibc; elsewhere (musl, macOS) nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: GROW_BY}
    accepted = [library.mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)
