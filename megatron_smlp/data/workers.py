"""Worker processes that encode chunks; results come back in the order of the chunks.

One thread of the parent speaks with each worker over a pipe of its own, strictly in turns. So a
worker that dies is seen at once (its pipe closes), and workers end when the parent dies.
"""

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from megatron_smlp.data.encoding import ChunkEncoder, EncodedChunk, EncodingSettings
from megatron_smlp.data.errors import DataError
from megatron_smlp.data.sources import Chunk

IN_FLIGHT_BYTES = 64 << 20
"""Bound on the raw text between reading and writing; one larger record passes alone."""
JOIN_SECONDS = 5.0


def encode_chunks(
    chunks: Iterable[Chunk], *, settings: EncodingSettings, num_workers: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Encode every chunk, in order, and give it back with its position; one worker means this
    process.

    Raises:
        DataError: the encoding failed, or a worker died.
    """
    if num_workers == 1:
        encoder = ChunkEncoder(settings)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    with WorkerPool(settings, num_workers=num_workers) as pool:
        yield from pool.encode(chunks)


class WorkerPool:
    """`num_workers` processes; use as a context manager, so that none outlives the work."""

    def __init__(self, settings: EncodingSettings, *, num_workers: int) -> None:
        # "spawn": a forked copy of a process with threads (progress bar, tokenizer) may lock up.
        context = multiprocessing.get_context("spawn")
        self.workers = [_Worker(context, settings) for _ in range(num_workers)]
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.stop(at_once=error[0] is not None)
        self.threads.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
        in_flight = 0
        for chunk in chunks:
            while pending and self._is_full(len(pending), in_flight + chunk.num_bytes):
                done, future = pending.popleft()
                in_flight -= done.num_bytes
                yield done, future.result()
            in_flight += chunk.num_bytes
            future = self.threads.submit(self._call, chunk)
            # The text itself is freed as soon as a worker has it.
            pending.append((replace(chunk, payload=b""), future))
        while pending:
            done, future = pending.popleft()
            yield done, future.result()

    def _is_full(self, num_pending: int, num_bytes: int) -> bool:
        return num_pending >= 3 * len(self.workers) or num_bytes > IN_FLIGHT_BYTES

    def _call(self, chunk: Chunk) -> EncodedChunk:
        worker = self.idle.get()
        try:
            return worker.encode(chunk)
        finally:
            self.idle.put(worker)


class _Worker:
    """A process and the parent's end of its pipe."""

    def __init__(self, context: Any, settings: EncodingSettings) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()  # Else the pipe would stay open when the worker dies.

    def encode(self, chunk: Chunk) -> EncodedChunk:
        try:
            self.connection.send(chunk)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(JOIN_SECONDS)
            raise DataError(_death(self.process.exitcode, chunk)) from None
        if isinstance(answer, EncodedChunk):
            return answer
        raise DataError(f"{chunk.file}:{chunk.first_line}: a worker failed: {answer}")

    def stop(self, *, at_once: bool) -> None:
        """End the process, waiting for it unless `at_once`."""
        if at_once:
            self.process.kill()
        self.connection.close()
        self.process.join(JOIN_SECONDS)
        if self.process.is_alive():
            self.process.kill()


def _death(exit_code: int | None, chunk: Chunk) -> str:
    cause = f"exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        cause = f"signal {signal.Signals(-exit_code).name}"
    hint = ", most likely for lack of memory" if exit_code == -signal.SIGKILL else ""
    return (
        f"a worker process died ({cause}{hint}) near {chunk.file}:{chunk.first_line}; "
        f"what is finished is kept: go on with --resume, perhaps with fewer --workers"
    )


def _serve(connection: Connection, settings: EncodingSettings) -> None:
    """The worker's loop: until the parent closes the pipe or dies."""
    # Ctrl-C reaches the whole group; the parent decides. And one process here is one core.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = ChunkEncoder(settings)
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        connection.send(_encode_or_explain(encoder, chunk))


def _encode_or_explain(encoder: ChunkEncoder, chunk: Chunk) -> EncodedChunk | str:
    try:
        return encoder.encode(chunk)
    # Whatever it is, panics from Rust (which are no `Exception`) included: the parent reports it.
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
