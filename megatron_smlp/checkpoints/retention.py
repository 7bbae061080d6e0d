"""Choose and delete the checkpoints of a run that a new one makes superfluous."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from megatron_smlp.checkpoints.folders import iteration_folder, iterations, looks_whole
from megatron_smlp.durable import remove_folder


def superfluous(
    run: str | Path,
    *,
    newest: int,
    last: int | None,
    every: int | None,
    damaged: Set[int] = frozenset(),
) -> list[int]:
    """Return the iterations to delete: not among the last few, and no multiple to keep.

    What is later than the newest belongs to another run, or is about to be replaced: it stays.
    Links, incomplete and damaged checkpoints stay too, and are not counted: somebody may want to
    inspect them.

    Args:
        newest: iteration that was just saved.
        last: how many of the last to keep; None: all.
        every: iterations that are a multiple of it are kept forever.
        damaged: those whose checksums were found to be wrong.
    """
    if last is None:
        return []
    complete = [n for n in iterations(run) if n <= newest and n not in damaged]
    folders = {n: iteration_folder(run, n) for n in complete}
    whole = [n for n, path in folders.items() if looks_whole(path) and not path.is_symlink()]
    return [n for n in whole[:-last] if not (every and n % every == 0)]


def delete(run: str | Path, doomed: list[int]) -> list[str]:
    """Delete checkpoints, and return a sentence for each that could not be."""
    problems = []
    for iteration in doomed:
        folder = iteration_folder(run, iteration)
        try:
            remove_folder(folder)
        except OSError as error:
            problems.append(f"{folder} could not be deleted: {error.strerror}")
    return problems
