"""The folders of a run: their names, their order, which are whole, and which may be deleted.

| in the --save folder | what it is |
|---|---|
| `iter_0000010/` | a whole checkpoint: it gets this name once everything is on the disk |
| `latest_checkpointed_iteration.txt` | the tracker: the iteration of the newest checkpoint |
| `.iter_0000010.partial-4f1c/` | a save in progress, or what an interrupted one left |
| `.iter_0000010.replaced/` | the older checkpoint of this name, while it is being replaced |
| `.iter_0000010.deleted/` | a checkpoint that is being deleted |
| `.lease-000007` | the lease of the run that writes here (save_lease.py) |
"""

from __future__ import annotations

import contextlib
import re
import secrets
from pathlib import Path

from megatron_smlp.durable import delete_in_background, remove_folder
from megatron_smlp.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
SUMS = "checksums.b2"
MARKER = "complete.b2"
MODEL = "model.json"
RUN = "run.json"

NAME = re.compile(r"iter_(\d{7,})")
LEFTOVER = re.compile(r"\.(iter_\d{7,}|release)\.(partial-\w+|replaced|deleted)(\.deleted)?")
TRACKER_IN_PROGRESS = f".{TRACKER}.*.tmp"


def iteration_folder(run: str | Path, iteration: int) -> Path:
    return Path(run) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Return 10 for `iter_0000010`, and None for any other name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def is_checkpoint_folder(folder: Path) -> bool:
    """Return whether this is the folder of one checkpoint, rather than of a run."""
    return iteration_of(folder) is not None or folder.name == RELEASE


def tracked_iteration(run: str | Path) -> int | None:
    """Return the iteration that the tracker names; None if it is missing or names none."""
    try:
        return int(_tracker(run))
    except ValueError:
        return None


def _tracker(run: str | Path) -> str:
    try:
        return (Path(run) / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def release_folder(run: str | Path) -> Path | None:
    """Return the folder of weights without a run's state, if the tracker names it.

    `release`, as tracker and folder name, is Megatron's word; it starts from them at iteration 0.
    """
    return Path(run) / RELEASE if _tracker(run) == RELEASE else None


def tracked_folder(run: str | Path) -> Path | None:
    """Return a run's newest checkpoint, else its release, which may be gone, else None."""
    latest = latest_iteration(run)
    return release_folder(run) if latest is None else iteration_folder(run, latest)


def folder_at(run: str | Path, iteration: int | None) -> Path | None:
    """Return the folder of an iteration; for None, that of the newest, or None if there is none."""
    return iteration_folder(run, iteration) if iteration else tracked_folder(run)


def is_same_folder(left: str | None, right: str | None) -> bool:
    """Return whether both are given and are the same folder."""
    return bool(left and right) and Path(str(left)).resolve() == Path(str(right)).resolve()


def checkpoint_of(path: str | Path) -> Path:
    """Return the folder of one checkpoint: `path` itself, or the newest of the run in `path`.

    Raises:
        UsageError: there is none.
    """
    path = Path(path) if Path(path).name else Path(path).resolve()  # "."
    if path.is_dir() and (is_checkpoint_folder(path) or (path / ".metadata").is_file()):
        return path
    folder = tracked_folder(path)
    if folder is None:
        raise UsageError(
            f"{path} holds no checkpoint: give the --save folder of a run, or an iter_ folder."
        )
    return folder


def check_listing(run: str | Path) -> None:
    """Check, at a start, that `iterations` finds nothing only where there is nothing.

    Raises:
        OSError: the folder cannot be listed, as on a stale mount.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        next(Path(run).iterdir(), None)


def iterations(run: str | Path) -> list[int]:
    """Return the iterations of all checkpoints of a run, whole or not, in ascending order."""
    try:
        numbered = [(iteration_of(path), path) for path in Path(run).iterdir()]
    except OSError:
        return []
    # Only checkpoints are looked at: each rank may also have a log here.
    return sorted(n for n, path in numbered if n is not None and path.is_dir())


def loading_order(run: str | Path, step: int | None = None) -> list[int]:
    """Return the iterations of a run's checkpoints in the order in which to try them.

    If --ckpt-step gives `step`, only that one is tried.

    Otherwise the one that the tracker names comes first, then older ones, newest first. Later ones
    come last: they belong to another run, or to one whose tracker was set back by hand.
    """
    if step:
        return [step]
    newest_first = iterations(run)[::-1]
    tracked = tracked_iteration(run)
    if tracked is None:
        return newest_first
    first = [n for n in newest_first if n <= tracked]
    return first + [n for n in newest_first if n > tracked]


def folders_to_try(run: str | Path, step: int | None = None) -> list[Path]:
    """Return the folders of a run's checkpoints in loading order; without any, its release."""
    release = release_folder(run)
    folders = [iteration_folder(run, iteration) for iteration in loading_order(run, step)]
    return folders or ([release] if release else [])


def latest_iteration(run: str | Path) -> int | None:
    """Return the first iteration in loading order that looks whole, or else the very first."""
    order = loading_order(run)
    whole = (n for n in order if looks_whole(iteration_folder(run, n)))
    return next(whole, order[0] if order else None)


def is_ours(folder: Path) -> bool:
    """Return whether it was saved with checksums, unlike Megatron's own and older checkpoints."""
    return any((folder / name).exists() for name in (SUMS, MARKER, RUN))


def looks_whole(folder: Path) -> bool:
    """Return whether its key files exist; `integrity.py` checks what is in them."""
    if is_ours(folder):
        return (folder / MARKER).exists()
    return (folder / "metadata.json").exists() and (folder / ".metadata").exists()


def superfluous(run: str | Path, *, newest: int, last: int | None, every: int | None) -> list[Path]:
    """Return the checkpoints to delete: neither among the last few nor at a multiple to keep.

    Checkpoints later than `newest` belong to another run, or are about to be replaced: they stay.
    Symlinks and incomplete checkpoints stay too, and are not counted: somebody may want to inspect
    them.

    Args:
        newest: iteration that was just saved.
        last: how many of the last checkpoints to keep; None: all.
        every: keep multiples of this many iterations forever.
    """
    if last is None:
        return []
    folders = {n: iteration_folder(run, n) for n in iterations(run) if n <= newest}
    whole = [n for n, path in folders.items() if looks_whole(path) and not path.is_symlink()]
    return [folders[n] for n in whole[:-last] if not (every and n % every == 0)]


def partial_folder(final: Path) -> Path:
    """Return a name of this save's own, into which no interrupted one can still be writing."""
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def tidy(run: str | Path) -> list[str]:
    """Undo or finish what interrupted saves and deletions left in a run's folder.

    Each folder is renamed before it is deleted, so that a writer that was presumed dead and comes
    back cannot publish a half-deleted one under its final name.

    Returns:
        the names of the folders that were removed.
    """
    if not Path(run).is_dir():
        return []
    for path in Path(run).glob(TRACKER_IN_PROGRESS):
        path.unlink(missing_ok=True)
    removed = []
    for path in sorted(Path(run).iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match[1])
        if match[3]:
            delete_in_background(path)
        elif match[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            with contextlib.suppress(OSError):
                remove_folder(path)
                removed.append(path.name)
    return removed
