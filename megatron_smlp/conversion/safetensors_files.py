"""Read folders of safetensors files one tensor at a time, and write them one file at a time."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.durable import naming_errors
from megatron_smlp.errors import DamagedCheckpointError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of all the files that its index names.

    Raises:
        UsageError: there is no such file in the folder.
        DamagedCheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        """A tensor's name -> its file, and its name there."""
        for path in _files(self.folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    self.specs[name] = Spec.of(file.get_tensor(name))  # mapped, not read
                    self._places[name] = path, name

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return one tensor, or one row of it; its memory maps the file until it is changed."""
        path, own = self._places[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(own) if row is None else file.get_slice(own)[row]
        return tensor

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Rename the tensors."""
        self.specs = {renamed(name): spec for name, spec in self.specs.items()}
        self._places = {renamed(name): place for name, place in self._places.items()}

    def leave_out(self, names: re.Pattern[str]) -> None:
        """Drop tensors that are not weights."""
        self.specs = {name: s for name, s in self.specs.items() if not names.fullmatch(name)}

    def leave_out_tied(self, head: str, embedding: str) -> None:
        """Drop `head`, the tied output layer, if these files hold it as a copy of `embedding`.

        Raises:
            UsageError: it is another tensor.
        """
        if head not in self.specs:
            return
        if embedding in self.specs and not torch.equal(self.read(embedding), self.read(head)):
            raise UsageError(
                f"{self.folder} holds {head}, which is not {embedding} although "
                'config.json ties them: set "tie_word_embeddings": false there to keep both.'
            )
        del self.specs[head]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / file for file in sorted(set(weights.values()))]
    if not (folder / SINGLE).is_file():
        raise UsageError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face "
            "model with safetensors weights."
        )
    return [folder / SINGLE]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file; the library checks its offsets, sizes, gaps and text."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error}).") from error


def shards(specs: Mapping[str, Spec], *, limit: int) -> list[list[str]]:
    """Split names, in order, into files of at most `limit` bytes; a larger tensor has its own."""
    files: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += spec.nbytes
    return files


def write_folder(
    folder: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], *, limit: int
) -> None:
    """Write `tensors`, in the order of `specs`, and an index if there is more than one file.

    Args:
        limit: maximum bytes of one file, which is held in memory as a whole.
    """
    parts = shards(specs, limit=limit)
    stream = iter(tensors)
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_file(folder / file, {name: specs[name] for name in names}, stream)
        where |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_file(path: Path, specs: dict[str, Spec], stream: Iterator[tuple[str, Tensor]]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in islice(stream, len(specs))}
    assert {name: Spec.of(tensor) for name, tensor in tensors.items()} == specs, path
    path.touch()
    mode = path.stat().st_mode
    with naming_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library lets only the owner read its files
