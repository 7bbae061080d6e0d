"""Find this machine's addresses and interfaces, and whether another one answers. No torch.

With wrong ones gloo and torch's store hang silently, so mistakes are found before they start.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping

import psutil

from megatron_smlp.errors import UsageError

GLOO = "GLOO_SOCKET_IFNAME"
LOOPBACK = ("127.", "::1", "localhost")


def addresses() -> dict[str, list[str]]:
    """Return the IP addresses of each interface that has one."""
    families = (socket.AF_INET, socket.AF_INET6)
    by_name = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: own for name, own in by_name.items() if own}


def own_address(given: str, *, towards: str, has_others: bool = True) -> str:
    """Return the address at which the others reach this machine: LOCAL_ADDR, or a guess.

    Args:
        given: LOCAL_ADDR.
        towards: MASTER_ADDR; the guess is the address of the interface that routes to it.
        has_others: whether there are other machines.

    Raises:
        UsageError: LOCAL_ADDR is another machine's, or there is nothing to guess it from.
    """
    if given:
        return _checked(given)
    if not towards:
        return _only_outside_address("LOCAL_ADDR is not set")
    own = _source_of_the_way_to(towards)
    if has_others and is_local(own) and not is_local(towards):
        # Debian gives a machine's own name the address 127.0.1.1, which no other can reach.
        return _only_outside_address(f"MASTER_ADDR={towards} resolves to {own} here (/etc/hosts)")
    return own


def _only_outside_address(why: str) -> str:
    outside = [ip for own in addresses().values() for ip in own if not is_local(ip)]
    outside = [ip for ip in outside if ":" not in ip] or outside
    if len(outside) != 1:
        raise UsageError(
            f"{why}, and this machine has {_list_of_addresses()}: set LOCAL_ADDR to the one that "
            "other machines can reach."
        )
    return outside[0]


def _checked(given: str) -> str:
    ip = resolved(given, variable="LOCAL_ADDR")
    if not any(ip in own for own in addresses().values()):
        raise UsageError(
            f"LOCAL_ADDR={given} is not an address of this machine, which has "
            f"{_list_of_addresses()}: give one of these, or leave it out."
        )
    return ip


def resolved(name: str, *, variable: str) -> str:
    """Return the IP address of a name.

    Raises:
        UsageError: the name cannot be resolved.
    """
    try:
        candidates = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"{variable}={name} cannot be resolved on this machine ({error.strerror}): give an "
            "address such as 10.0.0.1, or add the name to /etc/hosts."
        ) from error
    return str(candidates[0][4][0])


def _source_of_the_way_to(name: str) -> str:
    ip = resolved(name, variable="MASTER_ADDR")
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect((ip, 1))
        except OSError as error:
            raise UsageError(
                f"MASTER_ADDR={name} cannot be reached from this machine, which has "
                f"{_list_of_addresses()}: {error.strerror}. Check the address and the routes."
            ) from error
        return str(probe.getsockname()[0])


def is_local(name: str) -> bool:
    """Return whether a name or address is that of the loopback interface."""
    return name.startswith(LOOPBACK)


def _list_of_addresses() -> str:
    return ", ".join(f"{name} {' '.join(own)}" for name, own in sorted(addresses().items()))


def interface_of(ip: str, environment: Mapping[str, str]) -> str:
    """Return the interface for gloo to use: GLOO_SOCKET_IFNAME, or that of the address.

    Raises:
        UsageError: the given one does not exist.
    """
    given = environment.get(GLOO, "")
    for name in filter(None, given.split(",")):
        if name not in addresses():
            raise UsageError(
                f"{GLOO}={given}: {name} is not an interface with an address; this machine has "
                f"{_list_of_addresses()}. Give one of these, or leave it out."
            )
    return given or next((name for name, own in addresses().items() if ip in own), "")


def check_port(port: int) -> None:
    """Check that a server can listen on a port.

    Raises:
        UsageError: it cannot, for example because the port is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)  # with SO_REUSEADDR two may bind, but one listens
        except OSError as error:
            raise UsageError(
                f"MASTER_PORT={port} cannot be used on this machine: {error.strerror}. Give "
                "another one, the same on all machines."
            ) from error


def answers(
    name: str, port: int, *, seconds: float, gives_up: Callable[[], bool] = lambda: False
) -> bool:
    """Return whether a server listens there, or starts to within `seconds`.

    Args:
        gives_up: returns whether to stop waiting.
    """
    deadline = time.monotonic() + seconds
    while not gives_up():
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((name, port), timeout=max(0.1, min(5.0, left))):
                return True
        except OSError:
            if time.monotonic() + 0.5 > deadline:
                return False
            time.sleep(0.5)
    return False
