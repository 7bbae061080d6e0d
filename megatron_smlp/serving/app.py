"""Serve OpenAI's /v1/completions and /v1/models over HTTP, from one model.

Requests queue for a single thread, which runs them one at a time: an answer depends on its own
request alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.admission import Admission
from megatron_smlp.serving.requests import RequestError, check_model, error_body, parse
from megatron_smlp.serving.work import Work

logger = logging.getLogger(__name__)
Choices = asyncio.Future[list[dict[str, Any]]]
Pieces = asyncio.Queue[dict[str, Any] | None]
POLL_SECONDS = 0.2
"""How often a waiting request checks that its client is still connected."""
FAILURE = error_body("the server failed on this request; see its log", "server_error")


class Service:
    """One model, one thread, and a limit on how many requests may wait for it."""

    def __init__(self, lm: LanguageModel, admission: Admission) -> None:
        self.lm, self.admission = lm, admission
        self.created = int(time.time())
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.works: set[Work] = set()
        self.num_waiting = 0
        """Requests that are being parsed, queued or answered."""

    def close(self) -> None:
        """Cancel all requests, and wait for the model's thread."""
        for work in self.works:
            work.cancelled.set()
        self.thread.shutdown(wait=True, cancel_futures=True)

    async def models(self, request: Request) -> dict[str, Any]:
        """Answer /v1/models."""
        return {"object": "list", "data": [await self.model(self.lm.name, request)]}

    async def model(self, name: str, request: Request) -> dict[str, Any]:
        """Answer /v1/models/NAME."""
        self.admission.check(request.headers, has_body=False)
        check_model(name, self.lm)
        about = {"object": "model", "created": self.created, "owned_by": "megatron_smlp"}
        return {"id": name, **about}

    async def body(self, request: Request) -> bytes:
        """Read a request's body, unless it is too long."""
        read = bytearray()
        async for part in request.stream():
            read += part
            if len(read) > (most := self.admission.max_body_bytes):
                raise RequestError(f"the body is over {most} bytes (--max-body-bytes)", status=413)
        return bytes(read)

    async def complete(self, request: Request) -> Response:
        """Answer /v1/completions."""
        self.admission.check(request.headers, has_body=True)
        body = await self.body(request)
        pieces: Pieces = asyncio.Queue()
        work, done = await self._started(body, pieces)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.lm.name,
        }
        if work.request.stream:
            done.add_done_callback(lambda _: pieces.put_nowait(None))
            events = _events(work, done, pieces, head)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            while not done.done():
                await asyncio.wait({done}, timeout=POLL_SECONDS)
                if await request.is_disconnected():
                    work.cancelled.set()
        finally:  # also when the server shuts down
            work.cancelled.set()
        return JSONResponse({**head, "choices": done.result(), "usage": work.usage()})

    async def _started(self, body: bytes, pieces: Pieces) -> tuple[Work, Choices]:
        """Parse a request and queue it for the model's thread; streamed pieces go to `pieces`.

        Raises:
            RequestError: it is invalid, or too many are waiting already.
        """
        if self.num_waiting >= self.admission.max_waiting:
            raise RequestError(
                f"{self.num_waiting} requests are already waiting (--max-waiting): try again later",
                status=429,
            )
        self.num_waiting += 1  # before the first await, so that a burst stays within the limit
        loop = asyncio.get_running_loop()

        def send(piece: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            # In a thread, as tokenizing a megabyte would block all other requests.
            asked = await asyncio.to_thread(parse, body, self.lm)
            work = Work(self.lm, asked, send if asked.stream else None)
            done = loop.run_in_executor(self.thread, work.run)
        except BaseException:
            self.num_waiting -= 1
            raise
        self.works.add(work)
        done.add_done_callback(lambda _: self._finish(work))
        return work, done

    def _finish(self, work: Work) -> None:
        self.works.discard(work)
        self.num_waiting -= 1


async def _events(
    work: Work, done: Choices, pieces: Pieces, head: dict[str, Any]
) -> AsyncIterator[str]:
    """Yield server-sent events: a piece of an answer each, then [DONE]."""
    try:
        while (piece := await pieces.get()) is not None:
            yield _event({**head, "choices": [piece]})
    finally:  # also when nobody reads them anymore
        work.cancelled.set()
    error = done.exception()
    if error is not None:
        logger.error("a request failed", exc_info=error)
        yield _event(FAILURE)
    elif work.request.stream_options.get("include_usage"):
        yield _event({**head, "choices": [], "usage": work.usage()})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def build_app(lm: LanguageModel, admission: Admission) -> FastAPI:
    """Return the application for an ASGI server."""
    service = Service(lm, admission)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:  # also when a second Ctrl-C skips the rest of the shutdown
            service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        wrong = RequestError(f"{error.detail}: this server has /v1/completions and /v1/models")
        return JSONResponse(wrong.body(), status_code=error.status_code)

    app.add_api_route("/v1/models", service.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response())  # nobody reads it
    # uvicorn logs it.
    app.add_exception_handler(Exception, lambda *_: JSONResponse(FAILURE, status_code=500))
    app.add_exception_handler(
        RequestError, lambda _, error: JSONResponse(error.body(), status_code=error.status)
    )
    return app
