"""Who may ask: a JSON request, to a host that is this one, with the key if there is one.

A web page can send requests to a server on the machine of whoever reads it. A browser sends a
page's request of another type than JSON unasked, and one to a name that the page's owner points at
127.0.0.1 (DNS rebinding) as if it were for the page's own server; so both are refused.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from megatron_smlp.serving.requests import RequestError

ANY = "*"


def local_names() -> frozenset[str]:
    return frozenset({"localhost", socket.gethostname().lower()})


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a request's headers must say."""

    hosts: frozenset[str] = field(default_factory=local_names)
    """Names in `Host` and `Origin`; a `Host` may also be a number, which nobody points elsewhere,
    and an `Origin` the same as it."""
    api_key: str | None = None

    @classmethod
    def of(cls, hosts: Iterable[str], api_key: str | None) -> Admission:
        return cls(hosts=local_names() | {host.lower() for host in hosts}, api_key=api_key)

    def check(self, headers: Mapping[str, str], *, has_body: bool) -> None:
        """Look at a request's headers, before its body is read.

        Raises:
            RequestError: it may not ask.
        """
        self._check_key(headers.get("authorization", ""))
        host = _name_in(f"//{headers.get('host', '')}")
        if not _is_numeric(host):
            self._check_name("Host", host)
        if "origin" in headers and (origin := _name_in(headers["origin"])) != host:
            self._check_name("Origin", origin)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            raise RequestError(
                f"the body's Content-Type is {kind!r:.60}: send application/json", status=415
            )

    def _check_key(self, authorization: str) -> None:
        if self.api_key is None:
            return
        given = authorization.removeprefix("Bearer ").encode()
        if not secrets.compare_digest(given, self.api_key.encode()):
            raise RequestError("Authorization: Bearer KEY is missing or wrong", status=401)

    def _check_name(self, header: str, name: str) -> None:
        if ANY not in self.hosts and name not in self.hosts:
            raise RequestError(
                f"{header} {name!r:.80} is not known to this server: start it with --allowed-hosts",
                status=403,
            )


def _name_in(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _is_numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
