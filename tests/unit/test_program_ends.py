"""A program ends at once, whatever happens, and without a traceback if the user ended it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.in_process import MINIMAL
from support.launches import REPOSITORY, clean_environment, run_command, start_program

from megatron_smlp.signals import FINISHING

# Like torch's writers: an object that a frame of the interruption holds, and that complains late.
INTERRUPTED = """
import os
from megatron_smlp.program import readable_errors, whole_program

class HalfDone:
    def __del__(self):
        os.write(2, b"write to closed file")

def save():
    writer = HalfDone()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        kept = error
        raise

with whole_program(), readable_errors("program"):
    save()
"""
TWICE = """
import os, signal
from megatron_smlp.program import readable_errors, whole_program
from megatron_smlp.signals import graceful_signals

signal.signal(signal.SIGTERM, lambda *_: None)
with whole_program(), readable_errors("program"), graceful_signals(announces=False):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
"""
LATE = """
import atexit, os, signal, time
from megatron_smlp.program import readable_errors, whole_program

@atexit.register
def tidy():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

with whole_program(), readable_errors("program"):
    pass
"""
# Native code that aborts the process when the interpreter releases its objects at exit.
ABORTED = """
import atexit, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from megatron_smlp.program import readable_errors, whole_program

class Native:
    def __del__(self):
        os.abort()

native = Native()
atexit.register(print, "tidied")
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.2), print("deleted", end=" ")))
with whole_program(), readable_errors("program"):
    print("done", end=" ", flush=True)
    sys.exit(CODE)
"""
# The reader of a run's output may end first, as `tee` with its terminal; or a disk may be full.
UNREAD = """
import sys
from rich.console import Console
from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.launching.exit_codes import say
from megatron_smlp.program import readable_errors
from megatron_smlp.unwritable_log import TolerantStream

sys.stdin.read()
console = Console(file=TolerantStream(sys.stdout, "standard output"), soft_wrap=True)
for _ in range(2):
    console.print("iteration")
    say("starting again")
with readable_errors("program"):
    raise NonFiniteLossError("non-finite loss")
"""
# A data loader worker ignores SIGTERM, and multiprocessing waits for it at exit.
BROKEN = """
import multiprocessing, signal, time
from megatron_smlp.program import readable_errors, whole_program

def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)

with whole_program(), readable_errors("program"):
    context = multiprocessing.get_context("fork")
    context.Process(target=work, daemon=True).start()
    time.sleep(0.3)
    raise RuntimeError("the connection to another rank is closed")
"""
INHERITED = """
import os, signal
from megatron_smlp.signals import graceful_signals

signal.signal(signal.SIGTERM, lambda *_: None)
with graceful_signals(announces=True):
    begun, ends = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(ends[1])
        os.write(begun[1], b".")
        os.read(ends[0], 1)
        os._exit(0)
    os.read(begun[0], 1)
    for sent in (signal.SIGINT, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker, sent)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.close(ends[1])
    assert os.waitpid(worker, 0)[1] == 0
"""
UNDER_NOHUP = """
import os, signal
from megatron_smlp.signals import graceful_signals

ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with graceful_signals(announces=True):
    os.kill(os.getpid(), signal.SIGHUP)
    assert not ended
    os.kill(os.getpid(), signal.SIGUSR1)
assert ended == [True]
"""
REFUSED = """
import os, signal, time
from megatron_smlp.errors import UsageError
from megatron_smlp.program import readable_errors

is_fast = os.environ["RANK"] == "1"
if is_fast:  # a handler like Megatron's, which only takes note
    signal.signal(signal.SIGTERM, lambda *_: None)
with readable_errors("program"):
    time.sleep(0 if is_fast else 2)
    raise UsageError("--lr 0: give more")
"""


def said(program: str, *, code: int = 0) -> str:
    """Run a program, check its exit code, and return its stderr."""
    return run_command([sys.executable, "-c", program], code=code, seconds=60).stderr


def test_a_second_ctrl_c_ends_it_at_once():
    assert said(TWICE, code=130) == "program: interrupted\n"


def test_what_an_interruption_leaves_half_done_stays_silent():
    assert said(INTERRUPTED, code=130) == "program: interrupted\n"


def test_an_interruption_after_the_end_is_none():
    assert said(LATE) == ""


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (3, 3), ("a word", 1)])
def test_nothing_that_the_interpreter_lets_go_of_changes_how_it_ended(code: object, expected: int):
    program = ABORTED.replace("CODE", repr(code))
    done = run_command([sys.executable, "-c", program], code=expected, seconds=60)
    assert done.stdout == "done deleted tidied\n"
    assert done.stderr == ("a word\n" if code == "a word" else "")


def test_under_torchrun_a_faster_rank_does_not_end_the_one_that_says_why(tmp_path: Path):
    (tmp_path / "program.py").write_text(REFUSED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_command([*torchrun, "--local-addr=127.0.0.1", tmp_path / "program.py"], code=1)
    assert done.stderr.count("program: error: --lr 0: give more\n") == 1


def test_under_torchrun_the_only_rank_that_refuses_says_why():
    at_once = f"from megatron_smlp import program\nprogram.SPEAKER_FIRST = 0\n{REFUSED}"
    place = {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    done = run_command([sys.executable, "-c", at_once], code=2, **place)
    assert done.stderr.endswith(": error: --lr 0: give more\n")


def test_an_unexpected_error_does_not_wait_for_workers():
    message = "RuntimeError: the connection to another rank is closed"
    assert message in said(BROKEN, code=1)


def test_workers_leave_the_keyboard_to_their_run():
    assert said(INHERITED) == ""


def test_a_run_under_nohup_outlives_its_terminal():
    assert said(UNDER_NOHUP) == f"SIGUSR1: {FINISHING}\n"


def test_a_dry_run_is_read_as_far_as_its_reader_likes(tmp_path: Path):
    """Here not at all: the reader is gone before anything is printed."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = f"--architecture gmlp {MINIMAL} --dry-run"
    process = start_program(flags.split(), log=pipe)
    pipe.open().close()
    process.join(200)
    assert process.exitcode == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_nothing_depends_on_who_reads_it(stream: str, is_pipe: bool):
    """The other stream gets all of its lines, and the exit code stays the program's own."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams |= {} if is_pipe else {stream: full}
        process = subprocess.Popen(
            [sys.executable, "-c", UNREAD], stdin=subprocess.PIPE, **streams, text=True,
            cwd=REPOSITORY, env=clean_environment(),
        )  # fmt: skip
        if is_pipe:
            getattr(process, stream).close()
            setattr(process, stream, None)
        printed, told = process.communicate("", timeout=60)
    assert process.returncode == 3
    if stream == "stderr":
        assert printed == "iteration\n" * 2
    else:
        assert told.count("starting again") == 2
        assert "program: error: non-finite loss" in told
        assert told.count("standard output cannot be written") == 1
