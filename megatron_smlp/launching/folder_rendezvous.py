"""Let machines that share a folder see each other there, by their heartbeats. No torch.

`RENDEZVOUS=file:FOLDER` needs a folder that is the same on all machines. One machine alone cannot
tell whether it is, so each has a heartbeat there, and counts those that it sees beat.
"""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import Callable
from pathlib import Path

from megatron_smlp.durable import NO_LOCKS, write_durably
from megatron_smlp.errors import UsageError
from megatron_smlp.lease import Heartbeat, Holder, Observer

INTERVAL = 1.0  # seconds


class Presence:
    """This machine's heartbeat in the folder of a run, until this process ends.

    Raises:
        UsageError: the folder is missing, cannot be written to, or has no file locks, with which
            torch guards its store there. Whether they work between machines is not checked.
    """

    def __init__(self, folder: Path, *, run: str, address: str) -> None:
        self.folder, self.run = folder, run
        self.file = folder / f"{run}@{socket.gethostname()}-{address}.here"
        if not folder.is_dir():
            raise UsageError(
                f"RENDEZVOUS=file:{folder}: no such folder. Create it where all machines see it "
                "under this path."
            )
        holder = Holder.here(expiry=INTERVAL)
        try:
            write_durably(self.file, holder.content())
            with self.file.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise UsageError(
                    f"RENDEZVOUS=file:{folder}: files there cannot be locked: {error.strerror}. "
                    "Mount it with locks that work between machines (Lustre: -o flock), or give "
                    "RENDEZVOUS=host or server."
                ) from error
            raise UsageError(
                f"RENDEZVOUS=file:{folder} cannot be written to: {error.strerror}. Give a folder "
                "that all machines can write to."
            ) from error
        self.heartbeat = Heartbeat(self.file, holder, interval=INTERVAL)

    def seen(
        self, wanted: int, *, seconds: float, gives_up: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Return the machines that are there, once `wanted` are or after `seconds`.

        Args:
            gives_up: returns whether to stop waiting.
        """
        observer, alive = Observer(), {self.file}
        deadline = time.monotonic() + seconds
        while len(alive) < wanted and time.monotonic() < deadline and not gives_up():
            files = self.folder.glob(f"{self.run}@*.here")
            alive |= {path for path in files if observer.look(path).beats}
            time.sleep(INTERVAL / 2)
        return sorted(
            path.name.removeprefix(f"{self.run}@").removesuffix(".here") for path in alive
        )
