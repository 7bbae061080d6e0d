"""Machines that share a folder show each other in it that they are there. No torch.

`RENDEZVOUS=file:FOLDER` needs a folder that is one and the same on all machines. Whether it is
cannot be seen from one of them: each rewrites a file of its own there for as long as it lives, and
counts the files that change, by its own clock alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_smlp.durable import NO_LOCKS, write_durably
from megatron_smlp.errors import UsageError

INTERVAL = 1.0  # seconds


class Presence:
    """This machine's file in the folder of a run.

    Raises:
        UsageError: the folder is not there, cannot be written to, or has no locks, by which torch
            guards its store there. Whether they work between machines is not seen.
    """

    def __init__(self, folder: Path, *, run: str, address: str) -> None:
        self.folder = folder
        self.run = run
        self.file = folder / f"{run}.{socket.gethostname()}-{address}.here"
        self.beats = 0
        if not folder.is_dir():
            raise UsageError(
                f"RENDEZVOUS=file:{folder}: there is no such folder. Make it where all machines "
                "have it under this path."
            )
        try:
            self._beat()
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
                "in which all machines may write."
            ) from error

    def _beat(self) -> None:
        self.beats += 1
        write_durably(self.file, f"{os.getpid()} {self.beats} {time.time()}")

    def keep(self) -> None:
        """Go on showing it, in the background, until this process ends."""
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        while True:
            time.sleep(INTERVAL)
            try:
                self._beat()
            except OSError:
                continue  # a full or vanished disk: others then do not see this machine

    def seen(
        self, wanted: int, *, seconds: float, gives_up: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Return the machines that are there, as soon as there are so many, or at last.

        Args:
            gives_up: whether to wait no longer.
        """
        first, alive = self._files(), {self.file.name}
        deadline = time.monotonic() + seconds
        while len(alive) < wanted and time.monotonic() < deadline and not gives_up():
            time.sleep(INTERVAL / 2)
            now = self._files()
            alive |= {name for name, text in now.items() if text != first.get(name, "")}
        return sorted(name.removeprefix(f"{self.run}.").removesuffix(".here") for name in alive)

    def _files(self) -> dict[str, str]:
        found = {}
        for path in self.folder.glob(f"{self.run}.*.here"):
            try:
                found[path.name] = path.read_text(encoding="utf-8")
            except OSError:
                continue  # its machine is replacing it
        return found
