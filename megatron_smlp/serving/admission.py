"""Admit requests: JSON, to a host that is this one, with the key if there is one.

A web page can send requests to a server on the machine of whoever reads it. A browser sends a
page's request of another type than JSON unasked (for JSON it asks first, and gets no leave), and
one to a name that the page's owner points at 127.0.0.1 (DNS rebinding) as if it were for the page's
own server; so both are refused.
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
    """Names in `Host`, in any case, beside this machine's own and numeric addresses, which nobody
    points elsewhere."""
    api_key: str | None = None
    max_body_bytes: int
    max_waiting: int
    """Requests that may be there at a time."""

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
                f"Host {host!r:.80} is not known to this server: start it with --allowed-hosts",
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
