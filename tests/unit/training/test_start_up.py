"""signals.py before the first step: SIGTERM ends a run with exit code 0, wherever it is."""

import os
import select
import signal
import subprocess
import sys

import pytest
from support.launches import REPOSITORY, clean_environment

# The main thread waits in native code (on a mutex), where no Python signal handler runs.
BLOCKED = """
import ctypes, os, sys
from megatron_smlp.signals import StartUp

with StartUp() as start_up:
    start_up.before_ending = lambda: os.write(1, b"released\\n")
    {what}
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""


def signalled(what: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(what=what)],
        cwd=REPOSITORY,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            output, errors = process.communicate(timeout=1 if what != "pass" else 60)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess([], 1000, "", "")
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def test_a_rank_that_waits_in_native_code_ends_at_once():
    done = signalled()
    assert done.returncode == 0
    assert done.stdout == "released\n"
    assert done.stderr == "SIGTERM: stopped before the first step, nothing is lost\n"


def test_other_ranks_say_nothing():
    done = signalled(RANK="1")
    assert (done.returncode, done.stderr) == (0, "")


def test_from_the_first_step_on_it_is_the_loops():
    """The loop would finish its step first; nothing else ends the process."""
    assert signalled("start_up.over()").returncode == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal of a parent's death")
def test_a_rank_ends_with_its_agent():
    """The agent is killed without a chance to end its ranks, as by the kernel's OOM killer."""
    rank = (
        "import os, time\n"
        "from megatron_smlp.launching.parent import end_with_agent\n"
        "end_with_agent()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    agent = (
        "import os, subprocess, sys, time\n"
        "os.environ |= {'SMLP_AGENT': str(os.getpid()), 'TORCHELASTIC_RUN_ID': 'x'}\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", agent, rank],
        cwd=REPOSITORY,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    rank_id, ended = 0, False
    try:
        rank_id = int(process.stdout.readline())
        process.kill()
        # The pipe closes once the rank, which also writes to it, has ended.
        ended = bool(select.select([process.stdout], [], [], 60)[0])
        assert ended
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        if rank_id and not ended:
            os.kill(rank_id, signal.SIGKILL)
