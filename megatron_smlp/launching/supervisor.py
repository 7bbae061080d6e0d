"""Start a training's agent on this machine, and restart it until the run is over.

    tools/launch.py one-node pretrain_smlp.py --config ...
    tools/launch.py several-nodes pretrain_smlp.py --config ...
    tools/launch.py serve 29500        # the store of RENDEZVOUS=server

The launchers in examples/ call it; it reads their variables from the environment (settings.py).
The agent (agent.py, torchrun's) restarts ranks that fail, and this program restarts an agent that
fails: it needs neither torch nor the network to stay alive. Exit codes: docs/resilience.md.
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
from megatron_smlp.launching.folder_rendezvous import Presence
from megatron_smlp.launching.parent import LAUNCHER_PID, end_with_launcher
from megatron_smlp.launching.settings import (
    CLOSING,
    FILE,
    HOST,
    LAST_PORT,
    RendezvousSettings,
    Settings,
    read,
    whole_number,
)
from megatron_smlp.launching.training_argv import (
    FROM_CHECKPOINT,
    check_counts,
    given,
    is_on,
    limit_connections,
)
from megatron_smlp.restart_note import note_cause

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TIMEOUT = "--distributed-timeout-minutes"
MINUTES = 2
"""Default of TIMEOUT, after which a rank gives up on one that does not answer."""
FIRST_DELAY = 5
"""Seconds before the agent is restarted, doubled with each failure without a newer checkpoint."""
QUIET_WAIT = 10
"""Seconds to wait silently for others to start; they import torch first."""
SHARING = 30
"""Seconds within which another machine's checkpoint becomes visible in a shared folder."""
AGENT = "agent"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line that the module docstring describes.

    Raises:
        UsageError: a variable is wrong, or the other machines cannot be reached.
    """
    options = build_parser().parse_args(argv)
    if not options.argv:
        raise UsageError(f"{options.what}: give the training script and its flags, or the port.")
    if options.what == AGENT:
        end_with_launcher()
        from megatron_smlp.launching import agent  # with torch, in a process of its own

        code = agent.main(options.argv)
        sys.stdout.flush()
        sys.stderr.flush()
        # The rendezvous' thread may be inside the store, where a normal exit would abort.
        os._exit(code)
    if options.what == "serve":
        return serve(whole_number({"serve": options.argv[0]}, "serve", most=LAST_PORT))
    several = options.what == "several-nodes"
    return Supervisor(read(os.environ, several=several), options.argv).run()


def serve(port: int) -> int:
    """Serve the store of RENDEZVOUS=server until SIGTERM or Ctrl-C.

    Raises:
        UsageError: the port is taken.
    """
    from torch.distributed import TCPStore

    network.check_port(port)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in the store's threads too
    store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
    print(f"serving at port {store.port}", flush=True)
    signal.sigwait(ends)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py",
        description="Run a training on this machine, restarting it on failure.",
        epilog="examples/one_node.sh --help and examples/several_nodes.sh --help list the "
        "variables; docs/resilience.md says what is restarted when.",
    )
    kinds = ("one-node", "several-nodes", "serve")
    parser.add_argument("what", choices=(*kinds, AGENT), metavar="|".join(kinds))
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="...",
        help="the training script and its flags; for serve: the port",
    )  # fmt: skip
    return parser


class Supervisor:
    """One launch on this machine.

    Args:
        argv: the training's script and flags.
    """

    def __init__(self, settings: Settings, argv: Sequence[str]) -> None:
        self.settings = settings
        self.argv = list(argv)
        if given(TIMEOUT, argv) is None and not is_on(FROM_CHECKPOINT, argv):
            self.argv += [TIMEOUT, str(MINUTES)]
        if settings.rendezvous:
            machines = range(settings.rendezvous.min_nodes, settings.rendezvous.max_nodes + 1)
            check_counts(argv, machines=machines, processes=settings.processes)
        self.failures = Failures(argv)
        self.environment = dict(os.environ)
        limit_connections(argv, self.environment)
        self.child: subprocess.Popen[bytes] | None = None
        self.signals = [number for number in SIGNALS if not _is_under_nohup(number)]
        self.is_signalled = False
        self.warned = False
        """Whether SIGUSR1 has come, after which a queue restarts the same command."""
        self.first = self.failures.newest
        """Iteration of the newest checkpoint at the start."""

    def run(self) -> int:
        """Run the agent, restart it until it ends for good, and return the exit code."""
        for number in self.signals:
            signal.signal(number, self._hand_on)
        torchrun = self._prepare()
        if self.is_signalled:
            return self._end_signalled(0)
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            code = self._run_agent(torchrun)
            if self.is_signalled:
                # Before its ranks run, as on a spare, a signal simply kills an agent; then other
                # machines save.
                died = -code in SIGNALS
                wait = self.settings.shutdown_timeout if died else SHARING
                return self._end_signalled(0 if died else _shells(code), wait=wait)
            if code == 0 or code in (*FOR_GOOD, CLOSED, MISSING):
                return code
            if self.failures.folder is None:
                return 1 if code >= AGAIN else _shells(code)
            delay = FIRST_DELAY if self.failures.latest() != self.failures.newest else delay
            counts = AGAIN <= code < AGAIN + Failures.LIMIT
            self.failures.add(within=code - AGAIN if counts else 0)
            code = 1 if counts else code
            ended = f"the agent {end_of(code)} after {time.monotonic() - began:.0f} s"
            if self.failures.count >= Failures.LIMIT:
                say(f"{ended}; {self.failures} after {self.failures.count} failures: giving up.")
                return NO_PROGRESS
            say(f"{ended}; {self.failures}; starting again in {delay} s.")
            cause = f"the agent of {socket.gethostname()} {end_of(code)}"
            note_cause(cause, self.environment)
            is_there = not self._sleep(delay) and self._wait_for_store()
            if self.is_signalled:
                return self._end_signalled(0)
            if not is_there:
                return MISSING
            delay *= 2  # at most twice: without a newer checkpoint Failures.LIMIT ends it

    def _end_signalled(self, code: int, *, wait: float = SHARING) -> int:
        """Return the exit code: NO_PROGRESS if SIGUSR1 came and no checkpoint was saved, since a
        queue would forever restart a job that is too short to save one.

        Args:
            wait: seconds in which one may still appear.
        """
        deadline = time.monotonic() + wait
        while self.warned and self.failures.latest() == self.first:
            if time.monotonic() > deadline:
                say(
                    f"signalled by SIGUSR1; {self.failures}, as at the start: giving up. Give "
                    "the job more time."
                )
                return NO_PROGRESS
            time.sleep(0.2)
        return code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the agent; if none runs, it ends the wait for the next one."""
        self.is_signalled = True
        self.warned |= number == signal.SIGUSR1
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def _sleep(self, seconds: float) -> bool:
        """Sleep until a signal comes or time is up; return whether a signal came."""
        deadline = time.monotonic() + seconds
        while not self.is_signalled and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.is_signalled

    def _wait_for_store(self) -> bool:
        """Wait until the store can be reached; return whether it can: its machine may be dead."""
        rendezvous, seconds = self.settings.rendezvous, self.settings.rejoin_timeout
        if rendezvous is None or rendezvous.kind == FILE or rendezvous.is_host:
            return True
        answers = self._answers(rendezvous, seconds=seconds)
        if not answers and not self.is_signalled:
            say(
                f"the store at {rendezvous.endpoint} has not answered within REJOIN_TIMEOUT, "
                f"{seconds} s: giving up. Start all machines again."
            )
        return answers

    def _answers(self, rendezvous: RendezvousSettings, *, seconds: float) -> bool:
        return network.answers(
            rendezvous.address, rendezvous.port, seconds=seconds, gives_up=lambda: self.is_signalled
        )

    def _run_agent(self, torchrun: Sequence[str]) -> int:
        # In a process group of its own, so that Ctrl-C reaches it once, through this process.
        command = [sys.executable, sys.argv[0], AGENT, *torchrun, *self.argv]
        self.child = subprocess.Popen(command, env=self.environment, process_group=0)
        if self.is_signalled:
            self.child.terminate()
        return self.child.wait()

    def _prepare(self) -> list[str]:
        """Check that the other machines can be reached, and return torchrun's flags.

        Raises:
            UsageError: they cannot.
        """
        settings, rendezvous = self.settings, self.settings.rendezvous
        # If the ranks shared the agents' store, those of one machine would wait forever after the
        # other's have failed (measured with torch 2.15).
        self.environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        # NCCL's own way: end a rank without aborting first, which may hang. torchrun's is older.
        self.environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        # Without it torchrun does not notice ranks that hang in the kernel.
        self.environment.setdefault("TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT", "600")
        self.environment[LAUNCHER_PID] = str(os.getpid())
        if rendezvous is None:
            address = settings.local_address or "127.0.0.1"
        else:
            # An environment may have a loopback MASTER_ADDR, although no machine keeps a store.
            ignored = rendezvous.kind == FILE and network.is_local(rendezvous.master)
            address = network.own_address(
                settings.local_address,
                towards="" if ignored else rendezvous.master,
                has_others=rendezvous.max_nodes > 1,
            )
        # By default gloo resolves the host name, which may hang or give a wrong address.
        self.environment[network.GLOO] = network.interface_of(address, self.environment)
        if rendezvous:
            self._reach(rendezvous, address)
        names = ",".join(number.name for number in (*self.signals, signal.SIGQUIT))
        return [
            *([CLOSING] if rendezvous and rendezvous.kind == HOST else []),
            f"--nproc-per-node={settings.processes}",
            f"--max-restarts={settings.max_restarts}",
            f"--shutdown-timeout={settings.shutdown_timeout}",
            f"--signals-to-handle={names}",
            f"--local-addr={address}",
            *(_rendezvous_flags(rendezvous, settings) if rendezvous else ["--standalone"]),
        ]

    def _reach(self, rendezvous: RendezvousSettings, address: str) -> None:
        """Wait for the other machines in a shared folder, or for a store that is elsewhere."""
        seconds, least = self.settings.start_timeout, rendezvous.min_nodes
        if rendezvous.kind == FILE:
            presence = Presence(Path(rendezvous.address), run=rendezvous.run, address=address)
            seen = presence.seen(least, seconds=seconds, gives_up=lambda: self.is_signalled)
            if len(seen) < least and not self.is_signalled:
                raise UsageError(
                    f"RENDEZVOUS=file:{rendezvous.address}: after {seconds} s {len(seen)} of "
                    f"{least} machines joined ({', '.join(seen)}). Start the others with "
                    f"RUN_ID={rendezvous.run}, or give a folder that all machines share."
                )
            return
        if rendezvous.is_host:
            network.check_port(rendezvous.port)
            return
        keeper = "machine 0" if rendezvous.kind == HOST else "its server (tools/launch.py serve)"
        answers = self._answers(rendezvous, seconds=min(seconds, QUIET_WAIT))
        if not answers and seconds > QUIET_WAIT and not self.is_signalled:
            say(f"waiting for {keeper} at {rendezvous.endpoint}, up to START_TIMEOUT, {seconds} s.")
            answers = self._answers(rendezvous, seconds=seconds - QUIET_WAIT)
        if not answers and not self.is_signalled:
            raise UsageError(
                f"MASTER_ADDR={rendezvous.address} MASTER_PORT={rendezvous.port} has not answered "
                f"{address} for {seconds} s: start {keeper}, or check the address, the port and "
                "the firewall."
            )


def _is_under_nohup(number: signal.Signals) -> bool:
    """Return whether a signal is SIGHUP under nohup, which all that is started here must ignore."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _rendezvous_flags(rendezvous: RendezvousSettings, settings: Settings) -> list[str]:
    is_host = str(rendezvous.is_host).lower()
    where = "store_type=file" if rendezvous.kind == FILE else f"is_host={is_host}"
    return [
        f"--nnodes={rendezvous.min_nodes}:{rendezvous.max_nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous.endpoint}",
        f"--rdzv-id={rendezvous.run}",
        f"--rdzv-conf={where},join_timeout={settings.rejoin_timeout}",
    ]


def _shells(code: int) -> int:
    """Return the exit code that a shell reports: 128 + N if signal N ended the process."""
    return 128 - code if code < 0 else code
