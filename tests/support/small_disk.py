"""Real file systems of a few kilobytes, each used in a process of its own.

A test calls `run_all(plan.json)` in a fork of a process that has imported everything and started
nothing. The plan is a list of cases: `work`, as an importable module:function, its `arguments`, the
`folder` over which the file system is mounted, its size in `kilobytes`, and `output`, a file. Each
case is a fork of that process with its own mount namespace: no other process sees the file system,
and it disappears with the process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

CANNOT_MOUNT = 77


def run_case(work: str, arguments: list[Any], folder: str, kilobytes: int, output: str) -> int:
    """Run a case in a process; return its exit code: 0, 1 with a traceback, or CANNOT_MOUNT."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _mount(Path(folder), kilobytes)
        if code == 0:
            module, _, function = work.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _mount(folder: Path, kilobytes: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    user, group = os.getuid(), os.getgid()
    try:
        try:
            os.unshare(os.CLONE_NEWNS)
        except PermissionError:
            os.unshare(os.CLONE_NEWNS | os.CLONE_NEWUSER)
            Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
        tmpfs = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "small", str(folder)]
        for arguments in (["--make-rprivate", "/"], tmpfs):
            subprocess.run(["mount", *arguments], check=True)
    except (AttributeError, OSError, subprocess.CalledProcessError) as error:  # not on Linux
        print(error)
        return CANNOT_MOUNT
    return 0


def free_kilobytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize // 1024


def fill(folder: Path, *, leave: int) -> Path:
    """Fill the file system of `folder` up to `leave` kilobytes; return the file that fills it."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(1024) * (free_kilobytes(folder) - leave))
    return ballast


def run_all(plan: Path) -> None:
    """Run the cases of a plan, and print their exit statuses as JSON."""
    import megatron_smlp.conversion.convert
    import megatron_smlp.training.reporting  # noqa: F401

    cases = json.loads(plan.read_text(encoding="utf-8"))
    print(json.dumps([run_case(**case) for case in cases]))
