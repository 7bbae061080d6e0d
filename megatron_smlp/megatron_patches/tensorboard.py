"""A TensorBoard folder without room costs the run its curves, and not its life.

TensorBoard's writer raises what went wrong in its thread at whoever logs next, which is Megatron's
loop. `megatron.training.global_vars` holds the writer; what it holds afterwards is the same one
with its errors told once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_smlp.megatron_patches.wrapping import wrapped_in
from megatron_smlp.unwritable_log import UnwritableLog


class TolerantWriter:
    """Another writer, whose methods raise no OSError."""

    def __init__(self, writer: Any, folder: str) -> None:
        self.writer = writer
        self.lost = UnwritableLog(Path(folder))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.writer, name)
        return self.lost.tolerated()(value) if callable(value) else value


def forget_after(iteration: int) -> None:
    """Tell TensorBoard that the run goes on from there: it drops what it read of later steps."""
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    if writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    # What torch's writer does with a `purge_step`, which Megatron cannot know when it makes it.
    writer.file_writer.add_event(Event(step=iteration + 1, session_log=start))


def installed(folder: str | None) -> AbstractContextManager[None]:
    """Put a tolerant writer in the place of the one that Megatron has opened for this folder."""
    from megatron.training import global_vars

    def tolerant(writer: Any) -> Any:
        return TolerantWriter(writer, folder) if writer is not None and folder else writer

    return wrapped_in((global_vars, "_GLOBAL_TENSORBOARD_WRITER", tolerant))
