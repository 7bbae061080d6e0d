"""Tell the C library what to do with memory that is freed, on a CPU.

Training keeps it. glibc gives large blocks back to the kernel when they are freed, and fetches them
again, page by page and filled with zeros, at the next step. A training step frees and allocates the
same activations and gradients each time, and a tenth or more of it was page faults. CUDA's caching
allocator does the same for a GPU. Resident memory stays at its peak; the next step needs it anyway.

Conversion gives it back: it holds one tensor after another, of different sizes.

Elsewhere than on Linux with glibc (musl, macOS) neither function changes anything.
"""

from __future__ import annotations

import ctypes

# The numbers of glibc's <malloc.h>, for mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
NEVER = -1
GROW_BY = 64 << 20  # bytes that the heap grows by: fewer calls to the kernel
LARGE = 1 << 20  # bytes


def keep_freed_memory() -> None:
    """Keep every block in the process."""
    _tell({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: GROW_BY})


def return_large_blocks() -> None:
    """Return every block of a megabyte or more to the system when it is freed.

    Otherwise glibc raises that size to 32 MB by itself, and keeps some of what tensors took.
    """
    _tell({M_MMAP_THRESHOLD: LARGE})


def _tell(settings: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for name, value in settings.items():
            library.mallopt(name, value)
