"""The steps of the Dockerfile, without docker: a folder replaces the image's root, and a virtual
environment finds this one's packages, as the image's Python finds NVIDIA's."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.launches import REPOSITORY, run_command

DOCKERFILE = REPOSITORY / "Dockerfile"
CONTEXT = REPOSITORY / ".dockerignore"


def instructions() -> list[tuple[str, str]]:
    """Return each instruction and its arguments, without comments, in order."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", kept).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    patterns = CONTEXT.read_text(encoding="utf-8").split()
    sources = [
        name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]
    ]
    assert {"setup.py", "pretrain_smlp.py", "megatron_smlp", "configs", "plugins"} <= set(sources)
    for name in sources:
        assert (REPOSITORY / name).exists(), name
        assert f"!{name}" in patterns, name
    assert {f"!{name}" for name in sources} == {name for name in patterns if name[0] == "!"}


@pytest.mark.slow
def test_every_step_works(tmp_path: Path) -> None:
    """Everything is installed only into the new environment, and starts from there."""
    environment, root = tmp_path / "venv", tmp_path / "root"
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(environment)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("python -m venv needs ensurepip, which this Python lacks")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = environment / "lib" / version / "site-packages"
    (site / "image.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    variables = {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "1",  # setuptools is in the image
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    folder = root
    for kind, rest in instructions():
        if kind == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir(parents=True)
        elif kind == "COPY":
            *sources, target = rest.split()
            for name in sources:
                copy(REPOSITORY / name, folder / target)
        elif kind == "RUN":
            words = rest.replace("/tmp/", f"{tmp_path}/")
            run_command(["bash", "-eo", "pipefail", "-c", words], cwd=folder, **variables)
        else:
            assert kind in ("ARG", "FROM")
    assert "torch==" in (tmp_path / "built.txt").read_text(encoding="utf-8")
    assert list(site.glob("megatron_smlp-*.dist-info"))
    assert not list(site.glob("torch-*"))  # the image's own is taken
    program = "import megatron_smlp; print(megatron_smlp.__file__)"
    python = environment / "bin" / "python"
    where = run_command([python, "-c", program], cwd=tmp_path, **variables)
    assert where.stdout.startswith(str(site))


def copy(source: Path, target: Path) -> None:
    """Copy like COPY: a file into a folder, or the contents of a folder."""
    if source.is_file():
        shutil.copy(source, target)
    else:
        shutil.copytree(
            source, target, ignore=lambda _, names: fnmatch.filter(names, "__pycache__")
        )
