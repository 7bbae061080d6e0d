"""The contents of a folder once all background deletions are done."""

from pathlib import Path

from megatron_smlp.durable import delete_in_background


def names_in(folder: Path) -> list[str]:
    """Return the sorted names, including hidden ones."""
    delete_in_background(folder / "absent").result()  # runs after all earlier requests
    return sorted(path.name for path in folder.iterdir())


def hidden_in(run: Path) -> list[str]:
    """Return the names that begin with a dot, except the lease's, which stays."""
    return [name for name in names_in(run) if name[0] == "." and not name.startswith(".lease-")]
