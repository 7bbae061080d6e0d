"""The HTTP side: OpenAI's /v1/completions and /v1/models over one model.

Requests wait in a queue for one thread, which runs them one at a time: what a client gets depends
on its own request alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving import engine
from megatron_smlp.serving.admission import Admission
from megatron_smlp.serving.answers import Answer, choice, logprobs_of
from megatron_smlp.serving.requests import CompletionRequest, RequestError, parse

logger = logging.getLogger(__name__)
Tell = Callable[[dict[str, Any]], None]
LOOK_AFTER_SECONDS = 0.2
"""How often a waiting request looks whether its client is still there."""


class Work:
    """A request on its way through the model's thread."""

    def __init__(self, lm: LanguageModel, request: CompletionRequest, tell: Tell | None) -> None:
        self.lm, self.request, self.tell = lm, request, tell
        self.cancelled = threading.Event()
        self.num_new = 0

    def run(self) -> list[dict[str, Any]]:
        """All choices; with `tell` given, also piece by piece as they come."""
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(self.request.prompts):
            choices += self._answers(prompt, first=number * self.request.n)
        return choices

    def _answers(self, prompt: list[int], *, first: int) -> list[dict[str, Any]]:
        asked, lm = self.request, self.lm
        echoed = engine.score(lm, prompt, asked.logprobs) if asked.echo else []
        echo = lm.decode(prompt) if asked.echo else ""
        answers = [Answer(lm, prompt, asked.stop) for _ in range(asked.n)]
        tokens = [list(echoed) for _ in answers]
        if asked.echo:
            for row in range(asked.n):
                self._tell(first + row, echo, echoed, None)

        def on_token(row: int, token: engine.Token) -> bool:
            self.num_new += 1
            tokens[row].append(token)
            ended = answers[row].push(token)
            self._tell(first + row, answers[row].news(ended=ended), [token], None)
            return ended

        engine.answer(lm, self._job(prompt, on_token))
        choices = []
        for row, answer in enumerate(answers):
            self._tell(first + row, answer.news(ended=True), [], answer.finish_reason)
            written = self._logprobs(tokens[row])
            text = echo + answer.text
            choices.append(choice(first + row, text, written, answer.finish_reason))
        return choices

    def _job(self, prompt: list[int], on_token: Callable[[int, engine.Token], bool]) -> engine.Job:
        asked = self.request
        return engine.Job(
            prompt=prompt,
            n=asked.n,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            repetition_penalty=asked.repetition_penalty,
            seed=asked.seed,
            logprobs=asked.logprobs,
            on_token=on_token,
            cancelled=self.cancelled,
        )

    def _logprobs(self, tokens: list[engine.Token]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        return logprobs_of(self.lm, tokens, offset=0)

    def _tell(self, index: int, text: str, tokens: list[engine.Token], reason: str | None) -> None:
        if self.tell is None or not (text or reason or self.request.logprobs is not None):
            return
        self.tell(choice(index, text, self._logprobs(tokens), reason))

    def usage(self) -> dict[str, int]:
        num_prompt = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": num_prompt + self.num_new,
        }


class Service:
    """One model, one thread, and a limit on how many requests may wait for it."""

    def __init__(
        self, lm: LanguageModel, *, max_body_bytes: int, max_waiting: int, admission: Admission
    ) -> None:
        self.lm, self.max_body_bytes, self.max_waiting = lm, max_body_bytes, max_waiting
        self.admission = admission
        self.created = int(time.time())
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.works: set[Work] = set()

    def close(self) -> None:
        for work in self.works:
            work.cancelled.set()
        self.thread.shutdown(wait=True, cancel_futures=True)

    def models(self, request: Request) -> dict[str, Any]:
        self.admission.check(request.headers, has_body=False)
        model = {"id": self.lm.name, "object": "model", "created": self.created}
        return {"object": "list", "data": [{**model, "owned_by": "megatron_smlp"}]}

    async def body(self, request: Request) -> bytes:
        """A request's body, as far as it may go."""
        read = bytearray()
        async for part in request.stream():
            read += part
            if len(read) > self.max_body_bytes:
                raise RequestError(
                    f"the body is over {self.max_body_bytes} bytes (--max-body-bytes)", status=413
                )
        return bytes(read)

    async def complete(self, request: Request) -> Response:
        self.admission.check(request.headers, has_body=True)
        body = await self.body(request)
        if len(self.works) >= self.max_waiting:
            raise RequestError(
                f"{len(self.works)} requests are waiting already (--max-waiting): try again later",
                status=429,
            )
        # Tokenizing a megabyte would keep the others waiting, were it done here.
        asked = await asyncio.to_thread(parse, body, self.lm)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.lm.name,
        }
        if asked.stream:
            return StreamingResponse(self._pieces(asked, head), media_type="text/event-stream")
        work = Work(self.lm, asked, None)
        done = self._start(work)
        while not done.done():
            await asyncio.wait({done}, timeout=LOOK_AFTER_SECONDS)
            if await request.is_disconnected():
                work.cancelled.set()
        return JSONResponse({**head, "choices": done.result(), "usage": work.usage()})

    def _start(self, work: Work) -> asyncio.Future[list[dict[str, Any]]]:
        self.works.add(work)
        done = asyncio.get_running_loop().run_in_executor(self.thread, work.run)
        done.add_done_callback(lambda _: self.works.discard(work))
        return done

    async def _pieces(self, asked: CompletionRequest, head: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events: a piece of an answer each, then [DONE]."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        work = Work(self.lm, asked, lambda piece: _on(loop, lambda: pieces.put_nowait(piece)))
        done = self._start(work)
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield _event({**head, "choices": [piece]})
            error = done.exception()
            if error is not None:
                logger.error("a request failed", exc_info=error)
                yield _event(_failure())
            yield "data: [DONE]\n\n"
        finally:
            work.cancelled.set()  # the client may have gone


def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(call)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _failure() -> dict[str, Any]:
    message = "the server failed at this request; its log says why"
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return {"error": error}


def build_app(
    lm: LanguageModel,
    *,
    max_body_bytes: int,
    max_waiting: int,
    admission: Admission = Admission(),  # noqa: B008 - frozen
) -> FastAPI:
    """The application for an ASGI server."""
    service = Service(
        lm, max_body_bytes=max_body_bytes, max_waiting=max_waiting, admission=admission
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def models(request: Request) -> JSONResponse:
        return JSONResponse(service.models(request))

    async def completions(request: Request) -> Response:
        try:
            return await service.complete(request)
        except RequestError:
            raise
        except Exception:
            logger.exception("a request failed")
            return JSONResponse(_failure(), status_code=500)

    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        wrong = RequestError(f"{error.detail}: this server has /v1/completions and /v1/models")
        return JSONResponse(wrong.body(), status_code=error.status_code)

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(
        RequestError, lambda _, error: JSONResponse(error.body(), status_code=error.status)
    )
    return app
