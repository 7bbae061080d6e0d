"""Freed memory stays in the process, as page faults in a separate process show."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, torch
from megatron_smlp.platform import allocator

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a huge page is one fault, not 512

def step():
    for size in (40 << 20, 48 << 20):  # over 32 MiB glibc otherwise maps each block anew
        torch.ones(size, dtype=torch.uint8)

def faults():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
allocator.keep_freed_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_steps_after_the_first_fetch_no_pages() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    pages = 4 * (88 << 20) // 4096  # pages that four steps touch
    assert given_back > pages / 2
    assert kept < pages / 100
