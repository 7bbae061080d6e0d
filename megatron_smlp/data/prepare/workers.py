"""Worker processes that encode chunks; results come back in the order of the chunks."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from types import SimpleNamespace
from typing import Any, Self

from megatron_smlp.data.errors import DataError
from megatron_smlp.data.prepare.chunks import Chunk
from megatron_smlp.data.prepare.encoding import ChunkEncoder, EncodedChunk, EncodingSettings

IN_FLIGHT_BYTES = 64 << 20
"""Bound on the raw text between reading and writing; one larger record passes alone."""


def start_workers(settings: EncodingSettings, *, num_workers: int) -> "WorkerPool | InlineWorker":
    """Start processes that encode; one worker is this process. Use as a context manager.

    Raises:
        DataError: a worker could not start.
    """
    if num_workers == 1:
        return InlineWorker(settings)
    return WorkerPool(settings, num_workers=num_workers)


class InlineWorker:
    """The calling process, with the interface of `WorkerPool`."""

    def __init__(self, settings: EncodingSettings) -> None:
        self.encoder = ChunkEncoder(settings)
        self.description = self.encoder.encoder.description

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: there is no process to end."""

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        for chunk in chunks:
            yield chunk, self.encoder.encode(chunk)


class WorkerPool:
    """`num_workers` processes; use as a context manager, so that none outlives the work."""

    def __init__(self, settings: EncodingSettings, *, num_workers: int) -> None:
        self.num_workers = num_workers
        self.executor = ProcessPoolExecutor(
            num_workers,
            # A forked copy of a process with threads (progress bar, tokenizer) may lock up.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(settings,),
        )
        try:
            ready = [self.executor.submit(_work, None) for _ in range(num_workers)]
            self.description = [self._result(future, "at its start") for future in ready][-1]
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.executor.shutdown()
        else:
            self._kill()

    def _kill(self) -> None:
        for process in (self.executor._processes or {}).values():
            process.kill()
        self.executor.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """Encode every chunk; yield it, without its text, and its ids, in order.

        Raises:
            DataError: the encoding failed, or a worker died.
        """
        pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
        in_flight = 0
        for chunk in chunks:
            while len(pending) >= 3 * self.num_workers or (
                pending and in_flight + chunk.num_bytes > IN_FLIGHT_BYTES
            ):
                in_flight -= pending[0][0].num_bytes
                yield self._encoded(*pending.popleft())
            in_flight += chunk.num_bytes
            pending.append((chunk, self.executor.submit(_work, chunk)))
        while pending:
            yield self._encoded(*pending.popleft())

    def _encoded(self, chunk: Chunk, future: Future[EncodedChunk]) -> tuple[Chunk, EncodedChunk]:
        encoded = self._result(future, f"near {chunk.file}:{chunk.first_line}")
        chunk.release()
        return chunk, encoded

    def _result(self, future: Future[Any], place: str) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise self._death(place) from None
        except DataError as error:
            raise DataError(f"a worker process failed {place}: {error}") from None

    def _death(self, place: str) -> DataError:
        processes = list((self.executor._processes or {}).values())
        self.executor.shutdown()  # The executor has terminated the others, and waits for them.
        codes = [process.exitcode for process in processes if process.exitcode]
        code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
        return DataError(
            f"a worker process died {place} ({cause}{hint}); finished shards are kept: go on with "
            f"--resume, perhaps with fewer --workers"
        )


_process = SimpleNamespace()
"""What a worker process knows: an executor's functions reach it in no other way."""


def _start(settings: EncodingSettings) -> None:
    """Prepare a worker process."""
    # Ctrl-C reaches the whole group; the parent decides. And one process here is one core.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process.settings = settings


def _end_with_parent() -> None:
    """End this process with its parent: a killed one tells its executor's workers nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _encoder() -> ChunkEncoder:
    return ChunkEncoder(_process.settings)


def _work(chunk: Chunk | None) -> Any:
    """Encode a chunk; describe the encoder where there is none."""
    try:
        return _encoder().encoder.description if chunk is None else _encoder().encode(chunk)
    # Whatever it is, panics from Rust (which are no `Exception`) included: the parent reports it.
    except BaseException as error:
        raise DataError(f"{type(error).__name__}: {error}") from None
