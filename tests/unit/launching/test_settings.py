"""launching/settings.py and network.py: a launcher's settings are checked before it starts."""

import errno
import fcntl
import os
import re
import socket
from contextlib import closing
from pathlib import Path

import pytest

from megatron_smlp.errors import UsageError
from megatron_smlp.launching import network
from megatron_smlp.launching.folder_rendezvous import Presence
from megatron_smlp.launching.settings import FILE, SERVER, read

NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_defaults():
    settings = read({}, several=False)
    assert settings.rendezvous is None
    assert (settings.max_restarts, settings.shutdown_timeout, settings.processes) == (3, 600, 1)


def test_several_machines():
    rendezvous = read(NODES, several=True).rendezvous
    assert rendezvous is not None
    assert (rendezvous.min_nodes, rendezvous.max_nodes, rendezvous.is_host) == (2, 2, False)
    assert rendezvous.endpoint == "10.0.0.1:29500"
    host = read(NODES | {"NODE_RANK": "0", "NNODES": "2:4"}, several=True).rendezvous
    assert host is not None
    assert (host.min_nodes, host.max_nodes, host.is_host) == (2, 4, True)


def test_a_spare_has_a_rank_of_its_own():
    assert read(NODES | {"NODE_RANK": "2", "SPARES": "1"}, several=True).rendezvous
    with pytest.raises(UsageError, match="NODE_RANK=3 must be below NNODES=2 and SPARES=1"):
        read(NODES | {"NODE_RANK": "3", "SPARES": "1"}, several=True)


def test_a_file_and_a_server_need_no_rank():
    shared = read({"NNODES": "2", "RENDEZVOUS": "file:/shared", "RUN_ID": "a"}, several=True)
    assert shared.rendezvous is not None
    assert (shared.rendezvous.kind, shared.rendezvous.endpoint) == (FILE, "/shared/a.store")
    nodes = {name: value for name, value in NODES.items() if name != "NODE_RANK"}
    served = read(nodes | {"RENDEZVOUS": "server"}, several=True)
    assert served.rendezvous is not None
    assert (served.rendezvous.kind, served.rendezvous.is_host) == (SERVER, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"NNODES": "4:2"},
        {"MASTER_PORT": "70000"},
        {"NPROC_PER_NODE": "0"},
        {"RENDEZVOUS": "etcd"},
        {"RENDEZVOUS": "file:"},
        {"MAX_RESTARTS": "-1"},
        {"SHUTDOWN_TIMEOUT": "10m"},
        {"MASTER_ADDR": ""},
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, str]):
    with pytest.raises(UsageError, match=f"^{next(iter(changes))}[= ]"):
        read(NODES | changes, several=True)


def test_the_address_is_that_of_the_way_out():
    assert network.own_address("", towards="127.0.0.1") == "127.0.0.1"
    assert network.own_address("localhost", towards="") in ("127.0.0.1", "::1")
    assert network.interface_of("127.0.0.1", {}) == "lo"


@pytest.mark.parametrize("given", ["192.0.2.7", "no.such.name.invalid"])
def test_an_address_of_another_machine(given: str):
    with pytest.raises(UsageError, match=f"LOCAL_ADDR={given}"):
        network.own_address(given, towards="")


def test_a_name_that_is_the_machines_own_loopback(monkeypatch: pytest.MonkeyPatch):
    """As in Debian's /etc/hosts: the other machines would be told 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    own = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7", "fe80::7"]}
    monkeypatch.setattr(network, "addresses", lambda: own)
    assert network.own_address("", towards="node0") == "10.0.0.7"
    assert network.own_address("", towards="localhost").startswith("127.")
    assert network.own_address("", towards="node0", has_others=False).startswith("127.")
    own["ib0"] = ["10.1.0.7"]
    message = r"MASTER_ADDR=node0 resolves to 127\S+ here.*set LOCAL_ADDR"
    with pytest.raises(UsageError, match=message):
        network.own_address("", towards="node0")


def test_an_interface_that_is_not_there():
    with pytest.raises(UsageError, match="none7 is not an interface with an address; this machine"):
        network.interface_of("127.0.0.1", {network.GLOO: "none7"})
    assert network.interface_of("127.0.0.1", {network.GLOO: "lo"}) == "lo"


def test_a_port_that_somebody_has():
    with closing(socket.create_server(("", 0))) as server:
        port = server.getsockname()[1]
        message = f"MASTER_PORT={port} cannot be used on this machine"
        with pytest.raises(UsageError, match=message):
            network.check_port(port)
        assert network.answers("127.0.0.1", port, seconds=5)


def test_a_port_that_is_free():
    with closing(socket.create_server(("", 0))) as server:
        port = server.getsockname()[1]
    network.check_port(port)
    assert not network.answers("127.0.0.1", port, seconds=0.1)


def test_machines_see_each_other_in_a_folder_that_they_share(tmp_path: Path):
    first = Presence(tmp_path, run="run", address="10.0.0.1")
    left_by_one_that_is_gone = tmp_path / "run@node9-10.0.0.9.here"
    left_by_one_that_is_gone.write_text("1 1 1", encoding="utf-8")
    Presence(tmp_path, run="run", address="10.0.0.2")
    for name in ("another", "run.2"):
        Presence(tmp_path, run=name, address="10.0.0.3")
    seen = first.seen(2, seconds=30)
    assert [re.sub(".*-", "", name) for name in seen] == ["10.0.0.1", "10.0.0.2"]


def test_a_folder_of_its_own_is_not_shared(tmp_path: Path):
    alone = Presence(tmp_path, run="run", address="10.0.0.1").seen(2, seconds=0.1)
    assert [re.sub(".*-", "", name) for name in alone] == ["10.0.0.1"]
    with pytest.raises(UsageError, match=r"no such folder\. Create it where all"):
        Presence(tmp_path / "none", run="run", address="10.0.0.1")


def test_a_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Like Lustre without -o flock: torch would say that a connection has failed."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match=r"cannot be locked: Function not impl.*Lustre: -o flock"):
        Presence(tmp_path, run="run", address="10.0.0.1")
