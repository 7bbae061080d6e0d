"""Which folders of a run are checkpoints, which are whole, and in which order they are tried.

| in the --save folder | what it is |
|---|---|
| `iter_0000010/` | a checkpoint, whole: it got this name when everything was on the disk |
| `latest_checkpointed_iteration.txt` | the tracker: the iteration of the newest |
| `.iter_0000010.partial-4f1c/` | a save in progress, or what an interrupted one left |
| `.iter_0000010.replaced/` | the older one of this name, for the moment of its replacement |
| `.iter_0000010.deleted/` | one that retention is deleting |
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from megatron_smlp.durable import sync_folder
from megatron_smlp.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
SUMS = "checksums.b2"
MARKER = "complete.b2"
MODEL = "model.json"
RUN = "run.json"

NAME = re.compile(r"iter_(\d{7,})")
LEFTOVER = re.compile(r"\.(iter_\d{7,}|release)\.(partial-\w+|replaced|deleted)")


def iteration_folder(run: str | Path, iteration: int) -> Path:
    return Path(run) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """10 for `iter_0000010`; None for another name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether this is one checkpoint, and not the folder of a run."""
    return iteration_of(folder) is not None or folder.name == "release"


def tracked_iteration(run: str | Path) -> int | None:
    """The iteration that the tracker names; None where it is missing or does not say one."""
    try:
        text = (Path(run) / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def release_folder(run: str | Path) -> Path | None:
    """The folder of weights without the state of a run, where the tracker names that.

    `release`, for tracker and folder, is Megatron's word; it starts with them at iteration 0.
    """
    try:
        text = (Path(run) / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return Path(run) / RELEASE if text == RELEASE else None


def tracked_folder(run: str | Path) -> Path | None:
    """The checkpoint folder that the tracker names, which may be gone; None where it names none."""
    latest = latest_iteration(run)
    return release_folder(run) if latest is None else iteration_folder(run, latest)


def checkpoint_of(path: str | Path) -> Path:
    """Return the folder of one checkpoint: `path` itself, or the newest of the run in `path`.

    Raises:
        UsageError: there is none.
    """
    path = Path(path)
    if path.is_dir() and (is_checkpoint_folder(path) or (path / ".metadata").is_file()):
        return path
    folder = tracked_folder(path)
    if folder is None:
        raise UsageError(
            f"{path} holds no checkpoint: give the --save folder of a run, or an iter_ folder."
        )
    return folder


def iterations(run: str | Path) -> list[int]:
    """Iterations of all checkpoint folders of a run, whole or not, in ascending order."""
    try:
        folders = [path for path in Path(run).iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(n for n in map(iteration_of, folders) if n is not None)


def loading_order(run: str | Path) -> list[int]:
    """Which checkpoint to try first, which next.

    What the tracker names, then older ones, newest first; then those that are later than the
    tracker says, which belong to another run, or to one whose tracker was set back by hand.
    """
    found = iterations(run)[::-1]
    tracked = tracked_iteration(run)
    if tracked is None:
        return found
    first = [n for n in found if n <= tracked]
    return first + [n for n in found if n > tracked]


def latest_iteration(run: str | Path) -> int | None:
    """The first in loading order that looks whole; the first of all where none does."""
    order = loading_order(run)
    whole = (n for n in order if looks_whole(iteration_folder(run, n)))
    return next(whole, order[0] if order else None)


def is_ours(folder: Path) -> bool:
    """Whether it was saved with checksums; Megatron's own and older ones were not."""
    return any((folder / name).exists() for name in (SUMS, MARKER, RUN))


def looks_whole(folder: Path) -> bool:
    """By the files that are there; `integrity.py` reads what is in them."""
    if is_ours(folder):
        return (folder / MARKER).exists()
    return (folder / "metadata.json").exists() and (folder / ".metadata").exists()


def partial_folder(final: Path) -> Path:
    """A new name for each save: what an interrupted one still writes must not get in."""
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def replace_folder(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of an older one of that name.

    At every moment one of both is there, whole; `tidy` finishes what a crash interrupts.

    Raises:
        OSError: the older one is still there.
    """
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(run: str | Path) -> list[str]:
    """Undo or finish what interrupted saves and deletions left in a run's folder.

    Returns:
        the names of what is gone.
    """
    if not Path(run).is_dir():
        return []
    gone = []
    for path in sorted(Path(run).iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match[1])
        if match[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
    return gone
