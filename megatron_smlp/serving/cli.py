"""The command line of tools/serve.py: listen, load a model, and serve it over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser, require_positive
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.generation.cli import add_model_arguments, check_model_arguments

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from megatron_smlp.generation.language_model import LanguageModel

SHUTDOWN_SECONDS = 3
"""How long running requests may continue after Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serve.py",
        description="Serve a checkpoint or an exported model as OpenAI's /v1/completions.",
        allow_abbrev=False,
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="(default: this machine only)")
    server.add_argument("--port", type=int, default=8000, help="0: a free port (default 8000)")
    server.add_argument("--model-name", metavar="NAME", help="(default: the folder's name)")
    server.add_argument(
        "--max-body-bytes", type=int, default=2**20, metavar="N",
        help="per request; more is refused with 413 (default 1048576)",
    )  # fmt: skip
    server.add_argument(
        "--max-waiting", type=int, default=256, metavar="N",
        help="requests at a time; more are refused with 429 (default 256)",
    )  # fmt: skip
    server.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="host names for clients to use besides this machine's, localhost and numeric "
        "addresses; *: any",
    )  # fmt: skip
    server.add_argument(
        "--api-key", metavar="KEY", help="clients must send it (default: no key needed)"
    )
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    check_model_arguments(options)
    require_positive(options, "max_body_bytes", "max_waiting")
    if options.api_key is not None and not options.api_key.strip():
        raise UsageError(f"--api-key '{options.api_key}' is empty: give a key, or omit it")
    for package in ("fastapi", "pydantic", "uvicorn"):
        require_package(package, purpose="serve.py", extra="'megatron-smlp[serve]'")
    listening = _listen(options.host, options.port)
    from megatron_smlp.generation.language_model import load
    from megatron_smlp.library_logging import quiet_libraries

    with quiet_libraries():
        _serve(load(options), options, listening)


def server_config(app: FastAPI) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    import uvicorn

    return uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS, lifespan="on"
    )


def _serve(lm: LanguageModel, options: argparse.Namespace, listening: socket.socket) -> None:
    import uvicorn

    from megatron_smlp.serving.admission import Admission
    from megatron_smlp.serving.app import build_app

    admission = Admission(
        hosts=[options.host, *options.allowed_hosts],
        api_key=options.api_key,
        max_body_bytes=options.max_body_bytes,
        max_waiting=options.max_waiting,
    )
    config = server_config(build_app(lm, admission))
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {lm.name!r} at http://{shown}:{port}/v1 (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn re-raises it after its shutdown
        uvicorn.Server(config).run(sockets=[listening])


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message says more than that Ctrl-C cancelled running requests."""
    error = record.exc_info[1] if record.exc_info else None
    is_cancelled = isinstance(error, asyncio.CancelledError)
    return not (is_cancelled or record.getMessage().rstrip().endswith("CancelledError"))


def _listen(host: str, port: int) -> socket.socket:
    """Listen before the model is loaded, so that a port in use is found at once."""
    try:
        family = socket.getaddrinfo(host, None)[0][0]
        # Clients that connect before the model is loaded wait in the backlog.
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {host} --port {port} cannot be used: {error}") from error
