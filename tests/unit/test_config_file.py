"""YAML files that are damaged, or written to do damage: one line, at once."""

import os
import time
from pathlib import Path

import pytest

from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import MOST_BYTES, read_yaml


def laughs(line: str) -> str:
    """Each anchor holds nine of the one before; twenty would be 10^19."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} " + line.format(",".join([f"*a{n - 1}"] * 9)) for n in range(1, 21)]
    return "\n".join(lines)


def merges() -> str:
    lines = ["a0: &a0 {x0: 1}"]
    for n in range(1, 21):
        lines.append(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}")
    return "\n".join(lines)


BAD = {
    "laughs": (laughs("[{}]"), "'a1' is not a number"),
    "merges": (merges(), "merges: give the keys themselves"),
    "deep": ("a: " + "[" * 100_000, "cannot be read as YAML"),
    "nested": ("lr: {a: 1}", "'lr' is not a number"),
    "nested list": ("lr: [1, [2]]", "'lr' is not a number"),
    "twice": ("lr: 1\nseed: 2\nlr: 3\n", "'lr' is there twice.*line 3"),
    "twice spelt": ("num-layers: 1\nnum_layers: 3\n", "'num_layers' is there twice"),
    "date": ("lr: 2001-01-01", "put a date between quotes"),
    "no date": ("lr: 2001-99-99", "cannot be read as YAML"),
    "digits": ("seed: " + "9" * 5000, "cannot be read as YAML"),
    "tag": ("lr: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
    "long": ("lr: " + "x" * MOST_BYTES, f"more than {MOST_BYTES} bytes"),
    "a list as a key": ("? [1]\n: 2", "cannot be read as YAML"),
}


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_does_damage(tmp_path: Path, kind: str, included: bool) -> None:
    text, message = BAD[kind]
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    if included:
        (tmp_path / "top.yaml").write_text("include: config.yaml\n", encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(UsageError, match=message) as error:
        read_yaml(tmp_path / "top.yaml" if included else path)
    assert time.monotonic() - began < 30
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="it is not a regular file"):
            read_yaml(path)
        (tmp_path / "top.yaml").write_text(f"include: {path}\n", encoding="utf-8")
        with pytest.raises(UsageError, match="it is not a regular file"):
            read_yaml(tmp_path / "top.yaml")


def test_includes_that_go_on_and_on(tmp_path: Path) -> None:
    for number in range(1200):
        text = f"include: {number + 1}.yaml\n"
        (tmp_path / f"{number}.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"0\.yaml includes more than 20 files deep"):
        read_yaml(tmp_path / "0.yaml")


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1.0e-3\nseed: 7\nbf16: true\nsplit: 9,1,0\na: [1, x]\nb: null\n", "utf-8")
    assert read_yaml(path) == {
        "lr": 1e-3, "seed": 7, "bf16": True, "split": "9,1,0", "a": [1, "x"], "b": None,
    }  # fmt: skip
