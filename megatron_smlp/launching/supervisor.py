"""Start a training's agent on this machine, and start it again until the run is over.

    tools/launch.py one-node pretrain_smlp.py --config ...
    tools/launch.py several-nodes pretrain_smlp.py --config ...
    tools/launch.py serve 29500        # the store of RENDEZVOUS=server

The launchers in examples/ call it; their variables are read from the environment (settings.py).
A rank that fails is started again by the agent (agent.py, torchrun's), an agent that fails by this
program, which needs neither torch nor the network to live on. Exit codes: docs/resilience.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError
from megatron_smlp.launching import network
from megatron_smlp.launching.exit_codes import (
    AGAIN,
    CLOSED,
    FOR_GOOD,
    MISSING,
    NO_PROGRESS,
    end_of,
    say,
)
from megatron_smlp.launching.failures import Failures
from megatron_smlp.launching.folder_meeting import Presence
from megatron_smlp.launching.parent import LAUNCHER_PID, end_with_launcher
from megatron_smlp.launching.settings import CLOSING, FILE, HOST, Meeting, Settings, read
from megatron_smlp.launching.training_words import check_counts, given, limit_connections
from megatron_smlp.restart_note import note_cause

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TIMEOUT = "--distributed-timeout-minutes"
MINUTES = 2
"""After which a rank gives up one that does not answer, where the user does not say."""
FIRST_DELAY, LAST_DELAY = 5, 300
"""Seconds before the agent is started again: doubled with each failure, up to the second."""
QUIET_WAIT = 10
"""Seconds in which others may start without a word; they import torch first."""
SHARING = 30
"""Seconds in which another machine's checkpoint appears in a folder that all share."""
AGENT = "agent"
EXAMPLES = {"serve": "serve 29500"} | {
    what: f"{what} pretrain_smlp.py --config configs/cpu/gmlp.yaml"
    for what in ("one-node", "several-nodes", AGENT)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line that is described above.

    Raises:
        UsageError: a variable is wrong, or the other machines cannot be reached.
    """
    options = build_parser().parse_args(argv)
    if not options.words:
        what = "the port of the store" if options.what == "serve" else "the script that trains"
        raise UsageError(f"{options.what}: give {what}, for example {EXAMPLES[options.what]}.")
    if options.what == AGENT:
        end_with_launcher()
        from megatron_smlp.launching import agent  # with torch, in a process of its own

        code = agent.main(options.words)
        sys.stdout.flush()
        sys.stderr.flush()
        # The rendezvous' thread may be inside the store: an interpreter that ends aborts on it.
        os._exit(code)
    if options.what == "serve":
        from megatron_smlp.launching import server

        return server.main(options.words[0])
    several = options.what == "several-nodes"
    return Supervisor(read(os.environ, several=several), options.words).run()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py",
        description="Start a training on this machine, and again where it fails.",
        epilog="examples/one_node.sh --help and examples/several_nodes.sh --help name the "
        "variables that are read; docs/resilience.md says what is started again when.",
    )
    parser.add_argument("what", choices=list(EXAMPLES), metavar="one-node|several-nodes|serve")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...",
        help="the training's script and its flags; of serve: the port",
    )  # fmt: skip
    return parser


class Supervisor:
    """One launch on this machine.

    Args:
        words: the training's script and flags.
    """

    def __init__(self, settings: Settings, words: Sequence[str]) -> None:
        self.settings = settings
        self.words = list(words)
        if given(TIMEOUT, words) is None:
            self.words += [TIMEOUT, str(MINUTES)]
        if settings.meeting:
            machines = range(settings.meeting.least, settings.meeting.most + 1)
            check_counts(words, machines=machines, processes=settings.processes)
        self.failures = Failures(words)
        self.environment = dict(os.environ)
        limit_connections(words, self.environment)
        self.child: subprocess.Popen[bytes] | None = None
        self.signals = [number for number in SIGNALS if not _is_under_nohup(number)]
        self.told_to_end = False
        self.warned = False
        """Whether SIGUSR1 told it to end, after which a queue starts the same command again."""
        self.first = self.failures.newest
        """Iteration of the checkpoint that was there at the start."""

    def run(self) -> int:
        """Start the agent until it ends for good, and return its exit code."""
        for number in self.signals:
            signal.signal(number, self._hand_on)
        torchrun = self._meet()
        if self.told_to_end:
            return self._end_as_told(0)
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            code = self._run_agent(torchrun)
            if self.told_to_end:
                # Before its ranks run, as on a spare, an agent knows no better than to die; then
                # other machines save.
                died = -code in SIGNALS
                wait = self.settings.shutdown_timeout if died else SHARING
                return self._end_as_told(0 if died else _shells(code), wait=wait)
            if code == 0 or code in (*FOR_GOOD, CLOSED, MISSING):
                return code
            if self.failures.folder is None:
                return 1 if code >= AGAIN else _shells(code)
            delay = FIRST_DELAY if self.failures.latest() != self.failures.newest else delay
            counts = AGAIN <= code < AGAIN + Failures.LIMIT
            self.failures.add(within=code - AGAIN if counts else 0)
            code = 1 if counts else code
            ended = f"the agent {end_of(code)} after {time.monotonic() - began:.0f} s"
            if self.failures.is_stuck():
                say(f"{ended}; {self.failures} after {self.failures.count} failures: giving up.")
                return NO_PROGRESS
            say(f"{ended}; {self.failures}; starting again in {delay} s.")
            cause = f"the agent of {socket.gethostname()} {end_of(code)}"
            note_cause(cause, self.environment)
            is_there = not self._sleep(delay) and self._wait_for_store()
            if self.told_to_end:
                return self._end_as_told(0)
            if not is_there:
                return MISSING
            delay = min(2 * delay, LAST_DELAY)

    def _end_as_told(self, code: int, *, wait: float = SHARING) -> int:
        """Return the exit code: NO_PROGRESS if SIGUSR1 came and no checkpoint was made, since a
        queue would start a job again for ever that is too short for one.

        Args:
            wait: seconds in which one may appear.
        """
        deadline = time.monotonic() + wait
        while self.warned and self.failures.latest() == self.first:
            if time.monotonic() > deadline:
                say(
                    f"told to end by SIGUSR1; {self.failures}, as at the start: giving up. Give "
                    "the job more time."
                )
                return NO_PROGRESS
            time.sleep(0.2)
        return code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Tell the agent; a signal that finds none ends the wait for the next."""
        self.told_to_end = True
        self.warned |= number == signal.SIGUSR1
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def _sleep(self, seconds: float) -> bool:
        """Return whether a signal came in the meantime."""
        deadline = time.monotonic() + seconds
        while not self.told_to_end and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.told_to_end

    def _wait_for_store(self) -> bool:
        """Return whether the store can be reached: where another machine keeps it, it may die."""
        meeting, seconds = self.settings.meeting, self.settings.rejoin_timeout
        if meeting is None or meeting.kind == FILE or meeting.is_host:
            return True
        is_there = self._answers(meeting, seconds=seconds)
        if not is_there and not self.told_to_end:
            say(
                f"the store at {meeting.endpoint} has not answered within REJOIN_TIMEOUT, "
                f"{seconds} s: giving up. Start all machines again."
            )
        return is_there

    def _answers(self, meeting: Meeting, *, seconds: float) -> bool:
        return network.answers(
            meeting.address, meeting.port, seconds=seconds, gives_up=self._is_told
        )

    def _is_told(self) -> bool:
        return self.told_to_end

    def _run_agent(self, torchrun: Sequence[str]) -> int:
        # In a group of its own, so that Ctrl-C reaches it once, through this process.
        command = [sys.executable, sys.argv[0], AGENT, *torchrun, *self.words]
        self.child = subprocess.Popen(command, env=self.environment, process_group=0)
        if self.told_to_end:
            self.child.terminate()
        return self.child.wait()

    def _meet(self) -> list[str]:
        """Make sure that the others can be reached, and return torchrun's flags.

        Raises:
            UsageError: they cannot.
        """
        settings, meeting = self.settings, self.settings.meeting
        flags = [
            f"--nproc-per-node={settings.processes}",
            f"--max-restarts={settings.max_restarts}",
            f"--shutdown-timeout={settings.shutdown_timeout}",
        ]
        names = ",".join(number.name for number in (*self.signals, signal.SIGQUIT))
        flags += [f"--signals-to-handle={names}"]
        # Where the ranks share the agents' store, those of one machine wait for ever after the
        # other's have failed (measured with torch 2.15).
        self.environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        # NCCL's own way: to end a rank, without an abort first that may hang. torchrun's is older.
        self.environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        self.environment[LAUNCHER_PID] = str(os.getpid())
        if meeting is None:
            address = settings.local_address or "127.0.0.1"
            self._set_interface(address)
            flags += ["--standalone"]
        else:
            address = self._find(meeting)
            flags += _rendezvous(meeting, settings)
        flags += [f"--local-addr={address}"]
        return [*([CLOSING] if meeting and meeting.kind == HOST else []), *flags]

    def _set_interface(self, address: str) -> None:
        """Name gloo's interface: by default it looks the hostname up, which may mislead or hang."""
        self.environment[network.GLOO] = network.interface_of(address, self.environment)

    def _find(self, meeting: Meeting) -> str:
        seconds = self.settings.start_timeout
        master = meeting.master
        if meeting.kind == FILE and network.is_local(master):
            master = ""  # as an environment may have it: nobody is met there
        address = network.own_address(
            self.settings.local_address, towards=master, has_others=meeting.most > 1
        )
        self._set_interface(address)
        if meeting.kind == FILE:
            presence = Presence(Path(meeting.address), run=meeting.run, address=address)
            presence.keep()
            there = presence.seen(meeting.least, seconds=seconds, gives_up=self._is_told)
            if len(there) < meeting.least and not self.told_to_end:
                raise UsageError(
                    f"RENDEZVOUS=file:{meeting.address}: after {seconds} s {len(there)} of "
                    f"{meeting.least} machines are in it ({', '.join(there)}). Start the others "
                    f"with RUN_ID={meeting.run}, or give a folder that all machines share."
                )
            return address
        if meeting.is_host:
            network.check_port(meeting.port)
            return address
        keeper = "machine 0" if meeting.kind == HOST else "its server (tools/launch.py serve)"
        is_there = self._answers(meeting, seconds=min(seconds, QUIET_WAIT))
        if not is_there and seconds > QUIET_WAIT and not self.told_to_end:
            say(f"waiting for {keeper} at {meeting.endpoint}, up to START_TIMEOUT, {seconds} s.")
            is_there = self._answers(meeting, seconds=seconds - QUIET_WAIT)
        if not is_there and not self.told_to_end:
            raise UsageError(
                f"MASTER_ADDR={meeting.address} MASTER_PORT={meeting.port} has not answered "
                f"{address} for {seconds} s: start {keeper}, or check the address, the port and "
                "the firewall."
            )
        return address


def _is_under_nohup(number: signal.Signals) -> bool:
    """Return whether a signal is SIGHUP, and is to be ignored by all that is started here."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _rendezvous(meeting: Meeting, settings: Settings) -> list[str]:
    where = "store_type=file" if meeting.kind == FILE else f"is_host={str(meeting.is_host).lower()}"
    return [
        f"--nnodes={meeting.least}:{meeting.most}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-id={meeting.run}",
        f"--rdzv-conf={where},join_timeout={settings.rejoin_timeout}",
    ]


def _shells(code: int) -> int:
    """Return the exit code that a shell gives to a process that a signal has ended."""
    return 128 - code if code < 0 else code
