"""Check the folder that a conversion writes, so that nothing is lost by accident."""

from __future__ import annotations

from pathlib import Path

from megatron_smlp.errors import UsageError


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Raise UsageError if writing `target` would lose something."""
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(
            f"--save {target} holds --load {source}, which would be deleted: give another folder."
        )
    if target.resolve() == Path.cwd():
        raise UsageError(f"--save {target} must not be the current folder: give another.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save {target} is a file: give a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(
            f"--save {target} is not empty: give another folder, or --overwrite to replace it."
        )
