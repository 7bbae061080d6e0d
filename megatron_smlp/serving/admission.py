"""Admit requests that are JSON, address this host, and carry the API key if there is one.

A web page can send requests to a server on its reader's machine. A browser sends a page's non-JSON
request right away (before JSON it sends a preflight request, which this server does not grant), and
treats a name that the page's owner points at 127.0.0.1 (DNS rebinding) as the page's own server.
Both kinds of request are refused.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_smlp.serving.requests import RequestError

ANY = "*"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Requirements on a request's headers, and the server's limits."""

    hosts: Collection[str] = ()
    """Case-insensitive names accepted in `Host`, besides this machine's own and numeric addresses,
    which nobody can point elsewhere."""
    api_key: str | None = None
    max_body_bytes: int
    max_waiting: int
    """The most requests that may be queued or running at a time."""

    def check(self, headers: Mapping[str, str], *, has_body: bool) -> None:
        """Check a request's headers, before its body is read.

        Raises:
            RequestError: the request is refused.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.encode(), (self.api_key or "").encode())
        if self.api_key is not None and not (is_right and scheme.lower() == "bearer"):
            raise RequestError("Authorization: Bearer KEY is missing or wrong", status=401)
        host = _name_in(headers.get("host", ""))
        known = {name.lower() for name in self.hosts} | {"localhost", socket.gethostname().lower()}
        if ANY not in known and host not in known and not _is_numeric(host):
            raise RequestError(
                f"Host {host!r:.80} is not allowed: start the server with --allowed-hosts",
                status=403,
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            raise RequestError(
                f"the body's Content-Type is {kind!r:.60}: send application/json", status=415
            )


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
