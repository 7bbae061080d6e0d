"""Read and check the environment variables of the launchers in examples/. No torch.

A message names the variable, since that is what the user has set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.errors import UsageError

LAST_PORT = 65535
HOST, SERVER, FILE = "host", "server", "file"
CLOSING = "--closing"
"""Tells an agent to close the rendezvous when the run is over for good."""
ALONE = ("--standalone", "--local-addr=127.0.0.1")
"""torchrun's flags for one machine, whose own host name need not resolve to it."""


@dataclass(frozen=True)
class RendezvousSettings:
    """How the agents of several machines find each other."""

    kind: str
    """HOST: machine 0 keeps the store; SERVER: another process does; FILE: a shared folder."""
    address: str
    """Host name or address of the store; for FILE, the folder."""
    port: int
    is_host: bool
    """Whether this machine keeps the store."""
    min_nodes: int
    """Number of machines without which nothing starts."""
    max_nodes: int
    """Number of machines beyond which the others are spares."""
    run: str
    """The run's name, the same on all of its machines."""
    master: str
    """MASTER_ADDR; the route to it reveals this machine's own address. For FILE, maybe empty."""

    @property
    def endpoint(self) -> str:
        """Return the endpoint in torchrun's form."""
        if self.kind == FILE:
            return str(Path(self.address) / f"{self.run}.store")
        return f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """The settings of one launch; times are in seconds."""

    processes: int
    """Number of ranks on this machine."""
    rendezvous: RendezvousSettings | None
    """None on a single machine."""
    local_address: str
    """Address at which other machines reach this one; empty if it must be detected."""
    max_restarts: int
    """How many times an agent restarts its ranks."""
    shutdown_timeout: int
    """Seconds that ranks have to save after a signal."""
    start_timeout: int
    """Seconds at the start within which the store or the shared folder's machines must answer."""
    rejoin_timeout: int
    """Seconds within which all machines must come together again."""


def read(environment: Mapping[str, str], *, several: bool) -> Settings:
    """Read the variables that `--help` of a launcher lists.

    Raises:
        UsageError: one is missing, or has an invalid value.
    """
    return Settings(
        processes=whole_number(environment, "NPROC_PER_NODE", default="1", least=1),
        rendezvous=_rendezvous(environment) if several else None,
        local_address=environment.get("LOCAL_ADDR") or "",
        max_restarts=whole_number(environment, "MAX_RESTARTS", default="3"),
        shutdown_timeout=whole_number(environment, "SHUTDOWN_TIMEOUT", default="600"),
        start_timeout=whole_number(environment, "START_TIMEOUT", default="180"),
        rejoin_timeout=whole_number(environment, "REJOIN_TIMEOUT", default="600"),
    )


def _rendezvous(environment: Mapping[str, str]) -> RendezvousSettings:
    min_nodes, max_nodes = _nodes(_given(environment, "NNODES", "the number of machines"))
    kind, folder = _kind_and_folder(environment.get("RENDEZVOUS") or HOST)
    if kind == HOST:
        _given(environment, "NODE_RANK", "the number of this machine, from 0")
    rank = whole_number(environment, "NODE_RANK", default="0")
    _check_rank(rank, max_nodes, whole_number(environment, "SPARES", default="0"))
    address, port = folder, 0
    if kind != FILE:
        keeper = "machine 0" if kind == HOST else "the machine with the server"
        address = _given(environment, "MASTER_ADDR", f"the name or address of {keeper}")
        _given(environment, "MASTER_PORT", f"a free port on {keeper}")
        port = whole_number(environment, "MASTER_PORT", least=1, most=LAST_PORT)
    return RendezvousSettings(
        kind=kind,
        address=address,
        port=port,
        is_host=kind == HOST and rank == 0,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        run=environment.get("RUN_ID") or "smlp",
        master=environment.get("MASTER_ADDR") or "",
    )


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    smallest, largest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= smallest <= largest:
        raise UsageError(
            f"NNODES={text}: give the number of machines, or the smallest and the largest such as "
            "2:4."
        )
    return smallest, largest


def _check_rank(rank: int, nodes: int, spares: int) -> None:
    if rank >= nodes + spares:
        extra = f" and SPARES={spares}" if spares else ""
        raise UsageError(
            f"NODE_RANK={rank} must be below NNODES={nodes}{extra}: count from 0. Set SPARES to "
            "the number of machines beyond NNODES that wait as spares."
        )


def _kind_and_folder(text: str) -> tuple[str, str]:
    kind, _, folder = text.partition(":")
    if kind == FILE and folder:
        return FILE, folder
    if text in (HOST, SERVER):
        return text, ""
    raise UsageError(
        f"RENDEZVOUS={text}: give host (machine 0 keeps the store), server (MASTER_ADDR does, "
        "independent of the machines that train) or file:FOLDER (a shared folder)."
    )


def _given(environment: Mapping[str, str], name: str, what: str) -> str:
    value = environment.get(name)
    if not value:
        raise UsageError(f"{name} is not set: give {what}. `--help` lists all variables.")
    return value


def whole_number(
    environment: Mapping[str, str],
    name: str,
    *,
    default: str = "",
    least: int = 0,
    most: int = 10**9,
) -> int:
    """Return a variable's value.

    Raises:
        UsageError: it is not a whole number from `least` to `most`.
    """
    text = environment.get(name) or default
    if not re.fullmatch(r"\d+", text) or not least <= int(text) <= most:
        raise UsageError(f"{name}={text}: give a whole number from {least} to {most}.")
    return int(text)
