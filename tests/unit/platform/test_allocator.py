"""Freed memory stays in the process: measured by page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from megatron_smlp.platform import allocator

if sys.argv[1] == "kept":
    assert allocator.keep_freed_memory()

def step():
    for size in (40 << 20, 48 << 20):  # over 32 MiB glibc otherwise maps each block anew
        torch.ones(size, dtype=torch.uint8)

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(kind: str) -> int:
    command = [sys.executable, "-c", PROGRAM, kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_steps_after_the_first_fetch_no_pages() -> None:
    pages = 10 * (88 << 20) // 4096  # what ten steps touch
    assert _page_faults("given back") > pages / 2
    assert _page_faults("kept") < pages / 100
