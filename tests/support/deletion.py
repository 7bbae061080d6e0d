"""What lies in a folder once nothing is deleted in the background any more."""

from pathlib import Path

from megatron_smlp.durable import delete_in_background


def names_in(folder: Path) -> list[str]:
    """Sorted, hidden ones too."""
    delete_in_background(folder / "absent").result()  # after all that was asked for before
    return sorted(path.name for path in folder.iterdir())


def hidden_in(run: Path) -> list[str]:
    """Names that begin with a dot, but for the lease's, which stays."""
    return [name for name in names_in(run) if name[0] == "." and not name.startswith(".lease-")]
