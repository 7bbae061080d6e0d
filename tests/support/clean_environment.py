"""A folder with some installed packages, their dependencies, and nothing else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def site_with(folder: Path, *packages: str) -> Path:
    """Link the packages and all that they require, for `python -I -S` to import from."""
    folder.mkdir(parents=True)
    waiting, done = list(packages), set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # one for another platform
        for text in found.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        for top in {file.parts[0] for file in found.files or []}:
            link = folder / top
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(str(found.locate_file(top)))
    return folder
