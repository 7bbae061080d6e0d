"""Tells the C library what to do with freed memory, on a CPU.

Training keeps it. By default glibc returns large blocks to the kernel when freed, and the next step
faults them in again, page by page and zero-filled. A step frees and allocates the same activations
and gradients each time, and a tenth or more of it was page faults. CUDA's caching allocator does
the same on a GPU. Resident memory stays at its peak, which the next step needs anyway.

Conversion returns it: it holds one tensor after another, of different sizes.

Other than on Linux with glibc (as on musl or macOS), both functions are no-ops.
"""

from __future__ import annotations

import ctypes

# Constants of glibc's <malloc.h>, for mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
NEVER = -1
GROW_BY = 64 << 20  # bytes by which the heap grows, for fewer system calls
LARGE = 1 << 20  # bytes


def keep_freed_memory() -> None:
    """Keep every freed block in the process."""
    _tell({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: GROW_BY})


def return_large_blocks() -> None:
    """Return every block of a megabyte or more to the system when it is freed.

    Otherwise glibc raises that threshold to up to 32 MB by itself, and keeps some freed tensors.
    """
    _tell({M_MMAP_THRESHOLD: LARGE})


def _tell(settings: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for name, value in settings.items():
            library.mallopt(name, value)
