"""Worker processes that encode chunks; results come back in the order of the chunks.

One thread of the parent talks to each worker over a separate pipe, strictly taking turns. A worker
that dies is thus noticed at once (its pipe closes), and workers end when the parent dies. A process
pool executor may wait forever for the result of a killed worker:
docs/decisions/0061-libraries-of-the-data-tools.md.
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
from typing import Any, Self

from megatron_smlp.data.prepare.chunks import Chunk
from megatron_smlp.data.prepare.encoding import ChunkEncoder, EncodedChunk, EncodingSettings
from megatron_smlp.errors import DataError
from megatron_smlp.signals import held

IN_FLIGHT_BYTES = 64 << 20
"""Bound on the raw text between reading and writing; a larger record passes on its own."""
WORKER_BYTES = 3 << 20
"""Lower limit of that bound per worker: one chunk, so that none waits for text."""
PIECE_BYTES = 1 << 20
JOIN_SECONDS = 5.0


class InlineWorker:
    """The calling process, which encodes as `WorkerPool` does."""

    def __init__(self, settings: EncodingSettings) -> None:
        self.encoder = ChunkEncoder(settings)
        self.description = self.encoder.encoder.description

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        for chunk in chunks:
            yield chunk, self.encoder.encode(chunk)


class WorkerPool:
    """`num_workers` processes; use as a context manager, so that none outlives the work.

    Raises:
        DataError: a worker could not start.
    """

    def __init__(self, settings: EncodingSettings, num_workers: int) -> None:
        # "spawn": a forked copy of a process with threads (progress bar, tokenizer) may deadlock.
        context = multiprocessing.get_context("spawn")
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        self.workers: list[_Worker] = []
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        try:
            with held(signal.SIGINT):
                self.workers += [_Worker(context, settings) for _ in range(num_workers)]
            for worker in self.workers:
                self.description = worker.wait_until_ready()
                self.idle.put(worker)
        except BaseException:
            self._end(at_once=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(at_once=error[0] is not None)

    def _end(self, *, at_once: bool) -> None:
        if at_once:
            for worker in self.workers:
                worker.process.kill()
        # A thread that waits for a killed worker sees its pipe close; then nobody uses the pipes.
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """Encode every chunk; yield it, without its text, along with its ids, in order.

        Raises:
            DataError: the encoding failed, or a worker died.
        """
        pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
        in_flight = 0
        most = max(IN_FLIGHT_BYTES, WORKER_BYTES * len(self.workers))
        for chunk in chunks:
            while len(pending) >= 3 * len(self.workers) or (
                pending and in_flight + chunk.num_bytes > most
            ):
                done, future = pending.popleft()
                in_flight -= done.num_bytes
                yield done, future.result()
            in_flight += chunk.num_bytes
            pending.append((chunk, self.threads.submit(self._call, chunk)))
        while pending:
            done, future = pending.popleft()
            yield done, future.result()

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
        theirs.close()  # Otherwise the pipe would stay open when the worker dies.

    def wait_until_ready(self) -> str:
        """Return the description of the worker's encoder."""
        return str(self._receive("at start-up"))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        place = f"near {chunk.file}:{chunk.first_line}"
        try:
            _send_chunk(self.connection, chunk)
        except OSError:
            raise self._death(place) from None
        return self._receive(place)

    def _receive(self, place: str) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._death(place) from None
        if isinstance(answer, DataError):
            raise DataError(f"a worker process failed {place}: {answer}")
        return answer

    def _death(self, place: str) -> DataError:
        self.process.join(JOIN_SECONDS)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = f"signal {signal.Signals(-code).name}"
        hint = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
        return DataError(
            f"a worker process died {place} ({cause}{hint}); finished shards are kept: rerun with "
            f"--resume, perhaps with fewer --workers"
        )

    def close(self) -> None:
        """Let the process end: its loop stops once the pipe is closed."""
        self.connection.close()
        self.process.join(JOIN_SECONDS)
        if self.process.is_alive():
            self.process.kill()


def _send_chunk(connection: Connection, chunk: Chunk) -> None:
    """Send a chunk and free its text. Raw lines go in pieces: a pickle would copy them whole."""
    if isinstance(chunk.payload, bytearray):
        connection.send(replace(chunk, payload=bytearray()))
        with memoryview(chunk.payload) as view:
            for at in range(0, len(view), PIECE_BYTES):
                connection.send_bytes(view[at : at + PIECE_BYTES])
    else:
        connection.send(chunk)
    chunk.payload.clear()


def _receive_chunk(connection: Connection) -> Chunk:
    """Receive what `_send_chunk` sends."""
    chunk: Chunk = connection.recv()
    if isinstance(chunk.payload, bytearray):
        while len(chunk.payload) < chunk.num_bytes:
            chunk.payload.extend(connection.recv_bytes())
    return chunk


def _serve(connection: Connection, settings: EncodingSettings) -> None:
    """Encode in a worker process, until the parent closes the pipe or dies."""
    # Each worker process is to use one core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        encoder = ChunkEncoder(settings)
        connection.send(encoder.encoder.description)
        while True:
            connection.send(encoder.encode(_receive_chunk(connection)))
    except (EOFError, BrokenPipeError):
        return  # The parent closed the pipe, or died.
    # The parent reports any error, including panics from Rust, which are not an `Exception`.
    except BaseException as error:
        connection.send(DataError(f"{type(error).__name__}: {error}"))
