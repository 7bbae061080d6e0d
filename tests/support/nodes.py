"""Machines for tests: network namespaces on a bridge, with addresses and host names of their own.

Each has its own host name, its own mounts and its own interface, so that a link can be cut, slowed
down or removed. They share the disk, as machines share a file system, the clock and the
process table. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.launches import REPOSITORY, clean_environment
from support.living import children_of, command_of

ENTER = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


def missing() -> str:
    """Return why such machines cannot be made here; an empty string if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need `ip` and `unshare`"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


def ip(*argv: str) -> str:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(argv)}: {done.stderr}"
    return done.stdout


class Network:
    """A bridge and its machines, numbered from 0; use `network()`."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.tag = f"n{os.getpid() % 100000}"
        self.part = os.getpid() % 200 + 20

    def make(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for node in range(self.size):
            ip("netns", "add", self.name(node))
            self.plug_in(node)

    @property
    def bridge(self) -> str:
        return f"{self.tag}b"

    def name(self, node: int) -> str:
        return f"{self.tag}-{node}"

    def address(self, node: int) -> str:
        return f"10.77.{self.part}.{10 + node}"

    def plug_in(self, node: int) -> None:
        outside, inside = f"{self.tag}v{node}", "eth0"
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", self.name(node))
        ip("link", "set", outside, "master", self.bridge, "up")
        self.inside(node, "ip", "addr", "add", f"{self.address(node)}/24", "dev", inside)
        for device in ("lo", inside):
            self.inside(node, "ip", "link", "set", device, "up")

    def cut(self, node: int) -> None:
        """Take the link down: packets are lost without notice."""
        ip("link", "set", f"{self.tag}v{node}", "down")

    def mend(self, node: int) -> None:
        ip("link", "set", f"{self.tag}v{node}", "up")

    def slow(self, node: int, rate: str) -> None:
        """Limit this machine's sending rate, e.g. to `4mbit`."""
        command = f"tc qdisc replace dev eth0 root tbf rate {rate} burst 32kbit latency 400ms"
        self.inside(node, *command.split())

    def inside(self, node: int, *argv: str) -> None:
        ip("netns", "exec", self.name(node), *argv)

    def processes(self, node: int) -> list[int]:
        return [int(word) for word in ip("netns", "pids", self.name(node)).split()]

    def signal(self, node: int, number: signal.Signals) -> None:
        """Signal every process of a machine: SIGKILL is a crash, SIGSTOP a freeze."""
        for process in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def crash(self, node: int) -> None:
        """Kill a machine before it can send a last message to the others: the link goes first."""
        self.cut(node)
        while self.processes(node):
            self.signal(node, signal.SIGKILL)
            time.sleep(0.05)
        # What the kernel would still send for dead processes goes nowhere.

    def mount(self, node: int, *argv: str) -> None:
        """Run `mount` or `umount` with flags, in the mount namespace of what was started there."""
        # The launcher's, since ranks come and go.
        process = self.processes(node)[0]
        enter = ["nsenter", "--mount", f"--target={process}"]
        subprocess.run([*enter, *argv], check=True)

    def start(self, node: int, argv: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        """Run a command on a machine; its output goes to `folder`/node0.log."""
        enter = ["ip", "netns", "exec", self.name(node), "unshare", "--uts", "sh", "-c", ENTER]
        with (self.folder / f"node{node}.log").open("ab") as log:
            return subprocess.Popen(
                [*enter, f"node{node}", *argv],
                cwd=REPOSITORY,
                env=clean_environment(**variables),
                stdout=log,
                stderr=log,
            )

    def remove(self) -> None:
        """Clean up, whatever has happened: processes first, then namespaces."""
        for node in range(self.size):
            with contextlib.suppress(AssertionError):
                self.signal(node, signal.SIGCONT)
                while self.processes(node):
                    self.signal(node, signal.SIGKILL)
                    time.sleep(0.05)
            # A namespace ends in its own time, along with its end of the link: do not wait for it.
            with contextlib.suppress(AssertionError):
                ip("link", "del", f"{self.tag}v{node}")
            with contextlib.suppress(AssertionError):
                ip("netns", "del", self.name(node))
        with contextlib.suppress(AssertionError):
            ip("link", "del", self.bridge)


@contextlib.contextmanager
def network(size: int, folder: Path) -> Iterator[Network]:
    """Make machines for the duration of a block, and leave nothing of them behind."""
    made = Network(size, folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()


class Job:
    """Runs several_nodes.sh on the machines of a network, with its variables and flags."""

    def __init__(self, net: Network, flags: str, **variables: str) -> None:
        self.net, self.flags, self.variables = net, flags, variables
        self.save = net.folder / "run"
        self.launchers: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *nodes: int, **variables: str) -> None:
        for node in nodes:
            argv = [str(REPOSITORY / "examples" / "several_nodes.sh"), *self.flags.split()]
            given = {"MASTER_ADDR": self.net.address(0), "MASTER_PORT": "29500"}
            given |= {"NODE_RANK": str(node), "NPROC_PER_NODE": "1"} | self.variables | variables
            self.launchers[node] = self.net.start(node, [*argv, "--save", str(self.save)], **given)

    def records(self) -> list[dict[str, Any]]:
        """Return what has been logged; a line that is being written is left out."""
        path = self.save / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def iteration(self) -> int:
        return max((r["iteration"] for r in self.records() if "loss" in r), default=0)

    def log(self, node: int) -> str:
        return (self.net.folder / f"node{node}.log").read_text(encoding="utf-8", errors="replace")

    def wait_for_iteration(self, iteration: int, *, seconds: float) -> None:
        self.wait_until(lambda: self.iteration() >= iteration, seconds=seconds)

    def wait_until(self, is_true: Callable[[], bool], *, seconds: float) -> None:
        began = time.monotonic()
        while not is_true():
            took = time.monotonic() - began
            assert took < seconds, f"nothing for {seconds:.0f} s\n{self.ends_of_logs()}"
            time.sleep(0.02)

    def codes(self, *nodes: int, seconds: float = 300.0) -> list[int]:
        """Return the exit codes once all have ended."""
        launchers = [self.launchers[node] for node in nodes]
        self.wait_until(
            lambda: all(launcher.poll() is not None for launcher in launchers), seconds=seconds
        )
        return [launcher.returncode for launcher in launchers]

    def ranks(self, node: int) -> list[int]:
        """Return the training processes of a machine, without their workers."""
        found = [
            process
            for process in self.net.processes(node)
            if any(word.endswith("pretrain_smlp.py") for word in command_of(process)[:3])
        ]
        workers = {child for process in found for child in children_of(process)}
        return [process for process in found if process not in workers]

    def agents(self, node: int) -> list[int]:
        """Return the agents of a machine."""
        found = []
        for process in self.net.processes(node):
            argv = command_of(process)
            if len(argv) > 2 and argv[1].endswith("launch.py") and argv[2] == "agent":
                found.append(process)
        return found

    def ends_of_logs(self) -> str:
        return "\n".join(f"--- node{n}\n{self.log(n)[-2500:]}" for n in sorted(self.launchers))
