"""Every damage to a file of a real checkpoint is found, and the file is named."""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_smlp.checkpoints.folders import MARKER, MODEL, RUN, SUMS, iteration_folder
from megatron_smlp.checkpoints.integrity import verify

DRAW = random.Random(5)


@pytest.fixture
def folder(run: Path) -> Path:
    return iteration_folder(run, 6)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[DRAW.randrange(len(data))] ^= 1 << DRAW.randrange(8)
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: DRAW.randrange(path.stat().st_size)])


def zeroes(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [flip, cut, zeroes, Path.unlink]


def test_a_good_one(folder: Path):
    assert verify(folder) == []
    names = {path.name for path in folder.iterdir()}
    assert names >= {".metadata", "metadata.json", "__0_0.distcp", MODEL, SUMS, MARKER}
    (folder / "notes.txt").write_text("of the user")
    assert verify(folder) == []


@pytest.mark.skipif(not shutil.which("b2sum"), reason="coreutils are not there")
def test_coreutils_agree(folder: Path):
    command = ["b2sum", "--quiet", "--check", MARKER, SUMS]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    flip(folder / MODEL)
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_whatever_happens_to_any_file_of_any_checkpoint(run: Path):
    whole = [sorted(iteration_folder(run, n).iterdir()) for n in (2, 4, 6)]
    accidents = [[(path, damage)] for path in whole[2] for damage in DAMAGES * 3]
    for _ in range(100):
        accidents.append(
            [(path, DRAW.choice(DAMAGES)) for path in DRAW.sample(DRAW.choice(whole), 2)]
        )
    for accident in accidents:
        before = {path: path.read_bytes() for path, _ in accident}
        for path, damage in accident:
            damage(path)
        changed = {p.name for p in before if not p.exists() or p.read_bytes() != before[p]}
        named = {text.split()[0] for text in verify(accident[0][0].parent)}
        if changed & {SUMS, MARKER}:  # their content can no longer be trusted
            assert named & {SUMS, MARKER}, (accident, changed, named)
        else:
            assert named == changed, (accident, changed, named)
        for path, content in before.items():
            path.write_bytes(content)
    assert [verify(iteration_folder(run, n)) for n in (2, 4, 6)] == [[], [], []]


def test_without_a_marker_it_is_not_whole(folder: Path):
    assert verify(folder.with_name("iter_0000008")) == ["the folder is missing"]
    (folder / MARKER).unlink()
    (folder / SUMS).unlink()
    (folder / RUN).touch()
    assert verify(folder) == [f"{SUMS} is missing"]


def test_half_of_a_save_by_another_program(folder: Path):
    for name in (SUMS, MARKER, RUN):
        (folder / name).unlink()
    assert verify(folder) == []
    (folder / "metadata.json").unlink()
    assert verify(folder) == ["metadata.json is missing"]
